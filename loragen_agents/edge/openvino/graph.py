"""The graph of a causal LM in OpenVINO's opset, written from the model's modules.

Inputs of the graph (rows, width: the tokens fed; span: all slots, those of the tokens fed last):

- `embeddings` (rows, width, hidden size), and `cos_K`, `sin_K` (rows, 1, width, head size) for each kind K of attention
- `mask_K` (rows, 1, width, span): 0 where a token attends to a slot, a large negative number elsewhere
- `beam_idx` (rows,): which row of the states each row continues
- `keep` (rows, kept): places whose logits and activations are wanted
- `a_L` (1 or rows, r, intermediate size) and `b_L` (1 or rows, hidden size, r): updates of `down_proj` in layer L

Outputs: `logits` (rows, kept, vocabulary), and `captured` (layers, rows, kept, intermediate size) if there are any
layers that can be updated: the inputs of their `down_proj`. Keys and values are states of an infer request, named
`key_L` and `value_L`, with shape (rows, heads, slots, head size).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import torch
from openvino.op import util
from transformers import (
    Gemma3ForCausalLM,
    GemmaForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from loragen_agents.edge.openvino.quantise import Quantisation, quantised
from loragen_agents.models.arrangement import FIXED_ROTARY, is_untouched

ARCHITECTURES: tuple[type[PreTrainedModel], ...] = (
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    GemmaForCausalLM,
    Gemma3ForCausalLM,
)
_KINDS = ("full_attention", "sliding_attention")


def why_not(model: PreTrainedModel) -> str | None:
    """Why no graph can be written of a model, or None where one can."""
    name = type(model).__name__
    if type(model) not in ARCHITECTURES:
        return f"{name} is none of {', '.join(one.__name__ for one in ARCHITECTURES)}"
    if model.device.type != "cpu":
        return f"the model is on {model.device}"
    kinds = set(layer_kinds(model))
    if not kinds <= set(_KINDS):
        return f"{name} has layers of the kind {', '.join(sorted(kinds - set(_KINDS)))}"
    if getattr(model.config, "final_logit_softcapping", None) or getattr(model.config, "attn_logit_softcapping", None):
        return f"{name} caps its logits"
    parameters = model.config.rope_parameters
    rotary = [parameters[kind] for kind in kinds] if kinds & parameters.keys() else [parameters]
    unknown = {one["rope_type"] for one in rotary} - FIXED_ROTARY
    if unknown:
        return f"its rotary embedding is of the kind {', '.join(sorted(unknown))}"
    if not is_untouched(model):
        return f"modules of this {name} are wrapped or have hooks"
    return None


def layer_kinds(model: PreTrainedModel) -> list[str]:
    """The kind of attention of each layer."""
    config = model.config
    found = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if window is None:
        return ["full_attention"] * config.num_hidden_layers
    return list(found) if found else ["sliding_attention"] * config.num_hidden_layers


def write_graph(model: PreTrainedModel, updated: Sequence[int], to: Quantisation, head: Quantisation) -> ov.Model:
    """The graph of a model for which `why_not` gives None.

    Args:
        model: on the CPU, in any dtype.
        updated: layers whose `down_proj` has updates and captured activations.
        to: how matrices are kept. head: how that of the output layer is.
    """
    return GraphWriter(model, updated, to, head).graph()


class GraphWriter:
    """Writes the graph that `write_graph` gives; its parameters are those of that function."""

    def __init__(self, model: PreTrainedModel, updated: Sequence[int], to: Quantisation, head: Quantisation) -> None:
        self._model, self._updated, self._to, self._head = model, sorted(updated), to, head
        config = model.config
        self._hidden: int = config.hidden_size
        self._intermediate: int = config.intermediate_size
        self._head_size: int = model.model.layers[0].self_attn.head_dim
        self._query_heads: int = config.num_attention_heads
        self._heads: int = config.num_key_value_heads
        self._gemma = isinstance(model, (GemmaForCausalLM, Gemma3ForCausalLM))
        self._kinds = layer_kinds(model)
        self._inputs: list[Any] = []
        self._sinks: list[Any] = []

    def graph(self) -> ov.Model:
        states, captured = self._begin(), []
        for index, layer in enumerate(self._model.model.layers):
            mlp = layer.mlp
            gemma3 = hasattr(layer, "pre_feedforward_layernorm")
            seen = self._attention(index, layer.self_attn, self._norm(states, layer.input_layernorm))
            if gemma3:
                seen = self._norm(seen, layer.post_attention_layernorm)
            states = ops.add(states, seen)
            before = layer.pre_feedforward_layernorm if gemma3 else layer.post_attention_layernorm
            gate_up = self._linear(self._norm(states, before), mlp.gate_proj, mlp.up_proj)
            gate, up = ops.variadic_split(gate_up, _whole(-1), _whole([self._intermediate] * 2)).outputs()
            x = ops.multiply(self._activation(gate), up)
            y = self._linear(x, mlp.down_proj)
            if index in self._updated:
                captured.append(ops.unsqueeze(ops.matmul(self._selection, x, False, False), _whole(0)))
                a = self._input(f"a_{index}", [-1, -1, self._intermediate], ov.Type.f32)
                b = self._input(f"b_{index}", [-1, self._hidden, -1], ov.Type.f32)
                y = ops.add(y, ops.matmul(ops.matmul(x, a, False, True), b, False, True))
            if gemma3:
                y = self._norm(y, layer.post_feedforward_layernorm)
            states = ops.add(states, y)
        states = self._norm(self._kept(states), self._model.model.norm)
        results = [_result("logits", self._linear(states, self._model.lm_head, to=self._head))]
        if captured:
            results.append(_result("captured", ops.concat(captured, 0)))
        return ov.Model(results, self._sinks, self._inputs, type(self._model).__name__)

    def _begin(self) -> Any:
        """The embeddings of the tokens fed; notes positions, masks, rows and which places are kept."""
        embeddings = self._input("embeddings", [-1, -1, self._hidden], ov.Type.f32)
        self._positions = {
            kind: tuple(
                self._input(f"{side}_{kind}", [-1, 1, -1, self._head_size], ov.Type.f32) for side in ("cos", "sin")
            )
            for kind in sorted(set(self._kinds))
        }
        self._masks = {
            kind: self._input(f"mask_{kind}", [-1, 1, -1, -1], ov.Type.f32) for kind in sorted(set(self._kinds))
        }
        self._beam = self._input("beam_idx", [-1], ov.Type.i32)
        self._keep = self._input("keep", [-1, -1], ov.Type.i64)
        shape = ops.shape_of(embeddings, "i64")
        self._rows = ops.gather(shape, _whole([0]), _whole(0))
        # Activations are kept by a product: what a plain gather hands out, the CPU plugin computes in float32, with all
        # that leads up to it, and this takes a tenth of a pass.
        one, zero = ops.constant(np.float32(1)), ops.constant(np.float32(0))
        self._selection = ops.one_hot(self._keep, ops.gather(shape, _whole(1), _whole(0)), one, zero, -1)
        return embeddings

    def _attention(self, index: int, attention: Any, x: Any) -> Any:
        kind, size = self._kinds[index], self._head_size
        joined = self._linear(x, attention.q_proj, attention.k_proj, attention.v_proj)
        sizes = _whole([self._query_heads * size, self._heads * size, self._heads * size])
        q, k, v = (
            ops.reshape(part, _whole([0, 0, heads, size]), True)
            for part, heads in zip(
                ops.variadic_split(joined, _whole(-1), sizes).outputs(),
                (self._query_heads, self._heads, self._heads),
                strict=True,
            )
        )
        if getattr(attention, "q_norm", None) is not None:
            q, k = self._norm(q, attention.q_norm), self._norm(k, attention.k_norm)
        q, k, v = (ops.transpose(part, _whole([0, 2, 1, 3])) for part in (q, k, v))
        q, k = self._turned(q, kind), self._turned(k, kind)
        keys, values = self._state(f"key_{index}", k), self._state(f"value_{index}", v)
        scale = ops.constant(np.float32(attention.scaling))
        seen = ops.scaled_dot_product_attention(q, keys, values, self._masks[kind], scale, causal=False)
        seen = ops.reshape(ops.transpose(seen, _whole([0, 2, 1, 3])), _whole([0, 0, self._query_heads * size]), True)
        return self._linear(seen, attention.o_proj)

    def _state(self, name: str, new: Any) -> Any:
        """All keys or values of a layer, with the new ones behind those of the state, one for each query head."""
        shape = [-1, self._heads, -1, self._head_size]
        info = util.VariableInfo()
        info.data_shape, info.data_type, info.variable_id = ov.PartialShape(shape), ov.Type.f32, name
        variable = util.Variable(info)
        empty = ops.concat([self._rows, _whole([self._heads]), _whole([0]), _whole([self._head_size])], 0)
        before = ops.read_value(ops.broadcast(ops.constant(np.float32(0)), empty), variable)
        states = ops.concat([ops.gather(before, self._beam, _whole(0)), new], 2)
        self._sinks.append(ops.assign(states, variable))
        group = self._query_heads // self._heads
        if group == 1:
            return states
        # The form that OpenVINO's CPU plugin recognises: nothing is multiplied, and states stay one for each key head.
        ones = ops.constant(np.ones((1, 1, group, 1, 1), dtype=np.float32))
        spread = ops.multiply(ops.unsqueeze(states, _whole(2)), ones)
        return ops.reshape(spread, _whole([0, self._query_heads, -1, self._head_size]), True)

    def _turned(self, x: Any, kind: str) -> Any:
        """Rotary embedding: x·cos + (-second half, first half)·sin."""
        cos, sin = self._positions[kind]
        half, last, one, axis = _whole([self._head_size // 2]), _whole([2**31 - 1]), _whole([1]), _whole([3])
        second, first = ops.slice(x, half, last, one, axis), ops.slice(x, _whole([0]), half, one, axis)
        swapped = ops.concat([ops.multiply(second, ops.constant(np.float32(-1))), first], -1)
        return ops.add(ops.multiply(x, cos), ops.multiply(swapped, sin))

    def _norm(self, x: Any, module: Any) -> Any:
        weight = module.weight.detach().float()
        if self._gemma:
            weight = weight + 1.0
        eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
        square = ops.reduce_mean(ops.power(x, ops.constant(np.float32(2))), _whole([-1]), True)
        root = ops.sqrt(ops.add(square, ops.constant(np.float32(eps))))
        scaled = ops.multiply(x, ops.divide(ops.constant(np.float32(1)), root))
        return ops.multiply(scaled, ops.constant(weight.numpy()))

    def _linear(self, x: Any, *linears: Any, to: Quantisation | None = None) -> Any:
        """x·Wᵀ + b of linear layers that read the same vectors, one below the other."""
        weight = torch.cat([linear.weight.detach() for linear in linears])
        product = ops.matmul(x, quantised(weight, to or self._to), False, True)
        if linears[0].bias is None:
            return product
        bias = torch.cat([linear.bias.detach() for linear in linears]).float()
        return ops.add(product, ops.constant(bias.numpy()))

    def _activation(self, x: Any) -> Any:
        name = getattr(self._model.config, "hidden_activation", None) or self._model.config.hidden_act
        if name == "silu":
            return ops.swish(x)
        return ops.gelu(x, "tanh" if name == "gelu_pytorch_tanh" else "erf")

    def _kept(self, x: Any) -> Any:
        return ops.gather(x, self._keep, _whole(1), batch_dims=1)

    def _input(self, name: str, shape: list[int], type_: ov.Type) -> Any:
        node = ops.parameter(ov.PartialShape(shape), type_)
        _name(node, name)
        self._inputs.append(node)
        return node


def _whole(values: int | Sequence[int]) -> Any:
    return ops.constant(np.array(values, dtype=np.int64))


def _name(node: Any, name: str) -> None:
    node.set_friendly_name(name)
    node.output(0).get_tensor().set_names({name})


def _result(name: str, node: Any) -> Any:
    result = ops.result(node)
    _name(result, name)
    return result
