"""Which models are run leanly, and how their matrices are laid out in memory for products with a single vector."""

import torch
from torch import Tensor, nn
from transformers import (
    GemmaForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
)

LEAN_ARCHITECTURES: tuple[type[PreTrainedModel], ...] = (
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    GemmaForCausalLM,
)
# Kinds of rotary embedding whose angles depend on the position alone, so that a table of them holds.
FIXED_ROTARY = frozenset({"default", "linear", "llama3", "yarn"})
_CACHE_LINE = 64


def is_lean(model: PreTrainedModel) -> bool:
    """Whether the model is of `LEAN_ARCHITECTURES`, with fixed rotary angles and untouched modules."""
    if type(model) not in LEAN_ARCHITECTURES:
        return False
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None) if not kinds else None
    if window is not None or kinds - {"full_attention"} or config.rope_parameters["rope_type"] not in FIXED_ROTARY:
        return False
    return is_untouched(model)


def is_untouched(model: PreTrainedModel) -> bool:
    """Whether no module of a model of a known architecture has hooks, or is wrapped, quantised or patched."""
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return False
    # Wrapped or quantised layers compute something else than their weight says.
    return all(
        type(linear) is nn.Linear
        for layer in model.model.layers
        for linear in (
            *(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj, layer.self_attn.o_proj),
            *(layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj),
        )
    )


def arrange_weights(model: PreTrainedModel, base: PreTrainedModel | None = None) -> None:
    """Arrange a lean model's matrices in memory for products with a single vector on a CPU.

    Queries, keys and values, and gate and up, come to lie side by side, so that they are one product each, and no
    matrix begins off a cache line, as they do in a mapped safetensors file. Together this saves a tenth of a token's
    time. The parameters stay the same objects with the same values, and only their storage moves. Does nothing for
    models that are not run leanly or not on a CPU.

    Args:
        base: a model whose parameters stay where they are. Others must not be in use in another thread: arrange a model
            right after it was loaded, and a merged one, less its base, right after merging.
    """
    if not is_lean(model) or model.device.type != "cpu":
        return
    fixed = set() if base is None else {id(parameter) for parameter in base.parameters()}
    groups: list[tuple[Tensor, ...]] = [(model.lm_head.weight,)]
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        groups += [
            (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight),
            (attention.o_proj.weight,),
            (mlp.gate_proj.weight, mlp.up_proj.weight),
            (mlp.down_proj.weight,),
        ]
    # Tensors made in inference mode could not be trained later.
    with torch.inference_mode(False), torch.no_grad():
        for weights in groups:
            arranged = as_one_matrix(*weights) is not None and weights[0].data_ptr() % _CACHE_LINE == 0
            if not arranged and not any(id(weight) in fixed for weight in weights):
                joined = torch.cat([weight.detach() for weight in weights])
                for weight, part in zip(weights, joined.split([len(weight) for weight in weights]), strict=True):
                    weight.data = part


def as_one_matrix(*weights: Tensor) -> Tensor | None:
    """The matrix that the weights are, one below the other, if that is how they lie in memory."""
    first = weights[0].detach()
    end = first.storage_offset()
    for weight in weights:
        same = weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() and weight.dtype == first.dtype
        if not (same and weight.is_contiguous() and weight.storage_offset() == end):
            return None
        end += weight.numel()
    return first.as_strided((sum(map(len, weights)), first.shape[1]), first.stride())
