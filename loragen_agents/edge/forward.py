"""One forward pass of a causal LM over a `KVCache`: by transformers' own modules, or leaner over the same weights.

A pass feeds each row of the cache some tokens and gives logits where they are asked for. `Runtime.bind` chooses how:

- `LeanForward` for the architectures in `LEAN_ARCHITECTURES` whose modules are untouched (no hooks, no adapters). It
  reads the modules' own weights, without a copy of any, and computes what the modules compute in fewer, larger steps.
  A single token costs about a third of the operations.
- `ModuleForward` for any other causal LM: transformers' forward with this package's cache and masks.

Which tokens to feed and what to do with the logits is `decoding`'s part.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    GemmaForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
)
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, CacheLayerMixin

from loragen_agents.edge.kv_cache import KVCache
from loragen_agents.errors import ModelLoadError

LEAN_ARCHITECTURES: tuple[type[PreTrainedModel], ...] = (
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    GemmaForCausalLM,
)
# Kinds of rotary embedding whose angles depend on the position alone, so that a table of them holds.
_FIXED_ROTARY = frozenset({"default", "linear", "llama3", "yarn"})


@dataclass(frozen=True)
class Layout:
    """Tokens that do not simply follow one another in their row, such as several continuations of one prefix.

    positions: of the tokens fed, shape (rows, width). visible: slots that each token attends to, boolean, shape
    (rows, width, span). slot_positions: the position held in each slot, shape (rows, span).
    """

    positions: Tensor
    visible: Tensor
    slot_positions: Tensor


class Forward(Protocol):
    """Feeds tokens behind the valid slots of each row; the caller declares how many of them count (`advance`)."""

    def __call__(self, ids: Tensor, cache: KVCache, keep: Tensor, layout: Layout | None = None) -> Tensor:
        """ids: tokens, shape (rows, width). keep: places within the width, shape (rows, kept).

        Returns logits in the model's dtype, shape (rows, kept, vocabulary).
        """


class Runtime:
    """Chooses how `model` is run, anew for each request, so that a model merged or wrapped in between is followed.

    Raises:
        ModelLoadError: a kind of attention that the cache does not serve.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._tables: dict[torch.dtype, _RotaryTable] = {}

    def bind(self) -> Forward:
        if not _is_lean(self.model):
            return ModuleForward(self.model)
        dtype = self.model.lm_head.weight.dtype
        if dtype not in self._tables:
            self._tables[dtype] = _RotaryTable(self.model.model.rotary_emb, dtype)
        return LeanForward(self.model, self._tables[dtype])

    def state(self) -> list[Any]:
        """Everything that makes the model compute what it computes: its parameters and hooks, by identity."""
        found: list[Any] = []
        for module in self.model.modules():
            found += module._parameters.values()
            found += module._forward_hooks.values()
            found += module._forward_pre_hooks.values()
        return found


def _is_lean(model: PreTrainedModel) -> bool:
    if type(model) not in LEAN_ARCHITECTURES:
        return False
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None) if not kinds else None
    if window is not None or kinds - {"full_attention"} or config.rope_parameters["rope_type"] not in _FIXED_ROTARY:
        return False
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


class _RotaryTable:
    """Cosines and sines of the rotary embedding by position, as the model's own module computes them."""

    def __init__(self, module: Any, dtype: torch.dtype) -> None:
        self._module = module
        self._dtype = dtype
        self._rows: tuple[Tensor, Tensor] | None = None

    def upto(self, length: int) -> tuple[Tensor, Tensor]:
        """(cosines, signed sines), each with shape (at least `length`, head size).

        The sines of the first half are negated: x·cos + swap(x)·sin then is the rotation, where swap exchanges the
        halves of x, and no half has to be negated each time.
        """
        rows = self._rows
        if rows is None or len(rows[0]) < length:
            count = max(256, 1 << (length - 1).bit_length())
            device = self._module.inv_freq.device
            positions = torch.arange(count, device=device)[None]
            cos, sin = self._module(torch.empty(0, dtype=self._dtype, device=device), positions)
            half = sin.shape[-1] // 2
            rows = self._rows = (cos[0], torch.cat((-sin[0, :, :half], sin[0, :, half:]), dim=-1))
        return rows


class _Layer:
    """One layer's weights, transposed views for products with a row vector on the left, and its two norms."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.attention_norm = _Norm(layer.input_layernorm)
        self.mlp_norm = _Norm(layer.post_attention_layernorm)
        self.q, self.k, self.v, self.o = (
            (linear.weight, linear.bias)
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        )
        self.gate, self.up, self.down = (
            (linear.weight, linear.bias) for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        )


class _Norm:
    """Root mean square norm, by the model's module or, for a single CPU row, in fewer steps to the same rounding."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.eps: float = module.eps if hasattr(module, "eps") else module.variance_epsilon
        self.weight: Tensor = module.weight
        # Gemma multiplies by 1 + weight before rounding, the others by the weight after it.
        self.shifted = 1.0 + self.weight.float() if hasattr(module, "eps") else None

    def row(self, x: Tensor) -> Tensor:
        """x: shape (1, size)."""
        full = x.float()
        flat = full[0]
        normed = full * (1.0 / math.sqrt(torch.dot(flat, flat).item() / flat.shape[0] + self.eps))
        if self.shifted is not None:
            return normed.mul_(self.shifted).to(x.dtype)
        return normed.to(x.dtype).mul_(self.weight)


class LeanForward:
    """Llama, Mistral, Qwen2 and Gemma: rotary attention with grouped heads, gated FFN, pre-norm."""

    def __init__(self, model: PreTrainedModel, rotary: _RotaryTable) -> None:
        config = model.config
        self._embed = model.model.embed_tokens
        self._layers = [_Layer(layer) for layer in model.model.layers]
        self._norm = _Norm(model.model.norm)
        self._head: tuple[Tensor, Tensor | None] = (model.lm_head.weight, model.lm_head.bias)
        self._rotary = rotary
        attention = model.model.layers[0].self_attn
        self._head_size: int = attention.head_dim
        self._scale: float = attention.scaling
        self._query_heads: int = config.num_attention_heads
        self._heads: int = config.num_key_value_heads
        self._activation: Callable[[Tensor], Tensor] = ACT2FN[config.hidden_act]

    def __call__(self, ids: Tensor, cache: KVCache, keep: Tensor, layout: Layout | None = None) -> Tensor:
        cache.begin(ids.shape[1])
        if ids.numel() == 1 and layout is None and ids.device.type == "cpu":
            return self._one_token(ids, cache)
        return self._many_tokens(ids, cache, keep, layout)

    def _one_token(self, ids: Tensor, cache: KVCache) -> Tensor:
        """One token of one row: products of a row vector with each matrix, written to where they are needed."""
        position = cache.starts[0]
        cos, sin = (table[position] for table in self._rotary.upto(position + 1))
        heads, size, half = self._heads, self._head_size, self._head_size // 2
        queries = self._query_heads
        group = (1, heads, queries // heads, size)
        h = self._embed(ids[0])
        # Queries, keys and values of one layer side by side; the next layer overwrites them.
        qkv = h.new_empty(1, (queries + 2 * heads) * size)
        q_end, k_end = queries * size, (queries + heads) * size
        q_part, k_part, v_part = qkv[:, :q_end], qkv[:, q_end:k_end], qkv[:, k_end:]
        rotated = qkv[:, :k_end].view(queries + heads, size)
        swapped = h.new_empty(queries + heads, size)
        new_values = v_part.view(1, heads, 1, size)
        for index, layer in enumerate(self._layers):
            x = layer.attention_norm.row(h)
            _product(x, layer.q, q_part)
            _product(x, layer.k, k_part)
            _product(x, layer.v, v_part)
            torch.cat((rotated[:, half:], rotated[:, :half]), dim=1, out=swapped)
            both = (rotated * cos).add_(swapped.mul_(sin))
            keys, values = cache.write(index, both[queries:].view(1, heads, 1, size), new_values)
            # The query heads that share a key head stand in for as many queries: one token needs no causal mask.
            seen = F.scaled_dot_product_attention(both[:queries].view(group), keys, values, scale=self._scale)
            h.add_(_product(seen.view(1, -1), layer.o))
            x = layer.mlp_norm.row(h)
            gated = self._activation(_product(x, layer.gate)).mul_(_product(x, layer.up))
            h.add_(_product(gated, layer.down))
        return _product(self._norm.row(h), self._head)[None]

    def _many_tokens(self, ids: Tensor, cache: KVCache, keep: Tensor, layout: Layout | None) -> Tensor:
        rows, width = ids.shape
        # Where all rows begin, the order alone says what is seen, and the kernel needs no mask.
        fresh = layout is None and not any(cache.starts)
        layout = layout or _in_order(cache, ids)
        cos, sin = (table[layout.positions][:, None] for table in self._rotary.upto(int(layout.positions.max()) + 1))
        half = self._head_size // 2
        mask = None if fresh else self._for_groups(layout.visible)
        h = self._embed(ids)
        for index, layer in enumerate(self._layers):
            x = layer.attention_norm.module(h)
            q, k, v = (
                F.linear(x, *weights).view(rows, width, -1, self._head_size).transpose(1, 2)
                for weights in (layer.q, layer.k, layer.v)
            )
            q, k = ((x * cos).add_(torch.cat((x[..., half:], x[..., :half]), dim=-1).mul_(sin)) for x in (q, k))
            keys, values = cache.write(index, k, v)
            seen = self._attend(q, keys, values, mask)
            h = h + F.linear(seen.transpose(1, 2).reshape(rows, width, -1), *layer.o)
            x = layer.mlp_norm.module(h)
            gated = self._activation(F.linear(x, *layer.gate)).mul_(F.linear(x, *layer.up))
            h = h + F.linear(gated, *layer.down)
        h = h.gather(1, keep[:, :, None].expand(-1, -1, h.shape[-1]))
        return F.linear(self._norm.module(h), *self._head)

    def _for_groups(self, visible: Tensor) -> Tensor:
        """(rows, width, span) -> (rows, 1, group size x width, span)."""
        rows, width, span = visible.shape
        group = self._query_heads // self._heads
        return visible[:, None].expand(rows, group, width, span).reshape(rows, 1, group * width, span)

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """q: shape (rows, query heads, width, head size), as is the result; keys and values have fewer heads."""
        rows, _, width, size = q.shape
        if mask is None:
            group = self._query_heads // self._heads
            keys, values = (
                states[:, :, None].expand(-1, -1, group, -1, -1).reshape(rows, -1, states.shape[2], size)
                for states in (keys, values)
            )
            return F.scaled_dot_product_attention(q, keys, values, is_causal=True, scale=self._scale)
        # As in `_one_token`, but each of the stand-in queries brings its own row of the mask.
        grouped = q.reshape(rows, self._heads, -1, size)
        seen = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=self._scale)
        return seen.view(rows, self._query_heads, width, size)


class ModuleForward:
    """Any causal LM with full or sliding attention, run by transformers' modules.

    Raises:
        ModelLoadError: layers of another kind, or an attention implementation that takes no mask.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config(decoder=True)
        self._model = model
        kinds = set(getattr(config, "layer_types", None) or ())
        self._window: int | None = getattr(config, "sliding_window", None)
        self._by_kind = len(kinds) > 1
        if self._window is None or kinds == {"full_attention"}:
            kinds, self._window = {"full_attention"}, None
        self._additive = config._attn_implementation == "eager"
        unserved = kinds - {"full_attention", "sliding_attention"}
        if unserved:
            raise ModelLoadError(
                f"{type(model).__name__} has layers of the kind {', '.join(sorted(unserved))}; only full and sliding "
                "attention can be decoded here"
            )
        if config._attn_implementation not in ("sdpa", "eager"):
            raise ModelLoadError(
                f"{type(model).__name__} was loaded with the attention {config._attn_implementation!r}, which takes no "
                "mask; load it with attn_implementation='sdpa'"
            )

    def __call__(self, ids: Tensor, cache: KVCache, keep: Tensor, layout: Layout | None = None) -> Tensor:
        cache.begin(ids.shape[1])
        layout = layout or _in_order(cache, ids)
        mask: Any = self._mask(layout.visible)
        if self._window is not None:
            near = layout.positions[:, :, None] - layout.slot_positions[:, None, :] < self._window
            sliding = self._mask(layout.visible & near)
            mask = {"full_attention": mask, "sliding_attention": sliding} if self._by_kind else sliding
        # All rows share one set of places here; each then takes its own from them.
        places, own = torch.unique(keep, return_inverse=True)
        logits: Tensor = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=layout.positions,
            past_key_values=_TransformersCache(cache),
            use_cache=True,
            logits_to_keep=places,
        ).logits
        return logits.gather(1, own[:, :, None].expand(-1, -1, logits.shape[-1]))

    def _mask(self, visible: Tensor) -> Tensor:
        """(rows, width, span) -> (rows, 1, width, span), as the attention implementation wants it."""
        if not self._additive:
            return visible[:, None]
        dtype = self._model.dtype
        return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(
            ~visible, torch.finfo(dtype).min
        )[:, None]


def _in_order(cache: KVCache, ids: Tensor) -> Layout:
    """Tokens that follow one another behind each row's valid slots."""
    device = ids.device
    slots = torch.arange(cache.span, device=device)[None]
    positions = torch.tensor(cache.starts, device=device)[:, None] + torch.arange(ids.shape[1], device=device)
    return Layout(positions, slots[:, None] <= positions[:, :, None], slots.expand(ids.shape[0], -1))


def _product(x: Tensor, weights: tuple[Tensor, Tensor | None], out: Tensor | None = None) -> Tensor:
    """x·Wᵀ + b for a row vector x with shape (1, in)."""
    weight, bias = weights
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


class _TransformersCache(Cache):
    """A `KVCache` as transformers' modules write to it. What they would ask of it else, masks and positions say."""

    def __init__(self, cache: KVCache) -> None:
        super().__init__(layer_class_to_replicate=_TransformersLayer)
        self._states = cache

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return self._states.write(layer_idx, key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max(self._states.starts, default=0)


class _TransformersLayer(CacheLayerMixin):
    """Never made: the states live in the `KVCache`. It satisfies the base class, which asks for a kind of layer."""
