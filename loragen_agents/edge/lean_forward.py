"""The forward pass of known architectures, leaner than transformers' modules and over the same weights.

It reads the modules' own weights, without a copy of any, and computes the same in fewer steps. On a CPU the many small
operations between the matrix products cost as much time as half of the products.
"""

import math
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from loragen_agents.adapter.updates import DownUpdates
from loragen_agents.edge.kv_cache import KVCache
from loragen_agents.edge.passes import Captured, Layout, RowUpdates, at_places, in_order, rows_by_updates
from loragen_agents.models.arrangement import as_one_matrix
from loragen_agents.models.cpu import cpu_computes_bf16

# A CPU without bf16 instructions emulates products in bf16. Of one vector that costs nothing, since reading the weights
# takes longer; of more vectors than this, it is slower than to convert the weights to float32 for each product.
_EMULATED_ROWS = 32
# For so many vectors at once MKL takes W·xᵀ faster than x·Wᵀ: on two cores of a Cascade Lake Xeon in 0.4 to 0.9 of the
# time for the matrices of SmolLM2-135M, for fewer and for more of them in up to twice the time.
_FEW_ROWS = range(4, 49)


class RotaryTable:
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


class _Linear:
    """Weights of one or several linear layers that read the same vectors, one below the other.

    Layers that `arrange_weights` has put next to each other in memory are one matrix, and one product.
    """

    def __init__(self, *linears: Any) -> None:
        self.sizes = [linear.weight.shape[0] for linear in linears]
        joined = as_one_matrix(*(linear.weight for linear in linears))
        biased = linears[0].bias is not None
        if joined is not None:
            bias = torch.cat([linear.bias.detach() for linear in linears]) if biased else None
            self._parts = [(joined, joined.t(), bias)]
        else:
            self._parts = [(linear.weight, linear.weight.t(), linear.bias) for linear in linears]
        weight = self._parts[0][0]
        emulated = weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and not cpu_computes_bf16()
        self._most_emulated = _EMULATED_ROWS if emulated else None
        on_mkl = weight.dtype == torch.float32 and weight.device.type == "cpu" and torch.backends.mkl.is_available()
        self._few = _FEW_ROWS if on_mkl else range(0)

    def row(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x·Wᵀ + b for a row vector x with shape (1, in); `out` has shape (1, sum of the sizes)."""
        if len(self._parts) > 1:
            out = x.new_empty(1, sum(self.sizes)) if out is None else out
            for (_, transposed, bias), part in zip(self._parts, out.split(self.sizes, dim=1), strict=True):
                _product(x, transposed, bias, part)
            return out
        return _product(x, *self._parts[0][1:], out)

    def rows(self, x: Tensor) -> tuple[Tensor, ...]:
        """The layers' outputs for x with shape (..., in)."""
        count = x.numel() // x.shape[-1]
        product: Callable[[Tensor, Tensor, Tensor | None], Tensor] = F.linear
        if self._most_emulated is not None and count > self._most_emulated:
            product = _linear_in_float32
        elif count in self._few:
            product = _linear_transposed
        parts = [product(x, weight, bias) for weight, _, bias in self._parts]
        return parts[0].split(self.sizes, dim=-1) if len(parts) == 1 else tuple(parts)


def _linear_in_float32(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same sums, rounded once at the end as in bf16 products, which also add up in float32."""
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def _linear_transposed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product = torch.mm(weight, x.reshape(-1, x.shape[-1]).t()).t().contiguous()
    return (product if bias is None else product.add_(bias)).view(*x.shape[:-1], len(weight))


def _product(x: Tensor, transposed: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    return torch.mm(x, transposed, out=out) if bias is None else torch.addmm(bias, x, transposed, out=out)


class _Norm:
    """Root mean square norm, by the model's module or, for a single CPU row, in fewer steps to the same rounding."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self._eps: float = module.eps if hasattr(module, "eps") else module.variance_epsilon
        self._weight: Tensor = module.weight
        # Gemma multiplies by 1 + weight before rounding, the others by the weight after it.
        self._shifted = 1.0 + self._weight.float() if hasattr(module, "eps") else None

    def row(self, x: Tensor) -> Tensor:
        """x: shape (1, size)."""
        length = torch.linalg.vector_norm(x, dtype=torch.float32).item()
        scale = 1.0 / math.sqrt(length * length / x.shape[1] + self._eps)
        if self._shifted is not None:
            return x.float().mul(scale).mul_(self._shifted).to(x.dtype)
        # A product with a number is rounded once, from float32, as if the norm had been taken in float32.
        return x.mul(scale).mul_(self._weight)


class _Layer:
    """One layer's weights and norms."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.attention_norm = _Norm(layer.input_layernorm)
        self.mlp_norm = _Norm(layer.post_attention_layernorm)
        self.qkv = _Linear(attention.q_proj, attention.k_proj, attention.v_proj)
        self.o = _Linear(attention.o_proj)
        self.gate_up = _Linear(mlp.gate_proj, mlp.up_proj)
        self.down = _Linear(mlp.down_proj)


class LeanForward:
    """Llama, Mistral, Qwen2 and Gemma: rotary attention with grouped heads, gated FFN, pre-norm."""

    def __init__(self, model: PreTrainedModel, rotary: RotaryTable) -> None:
        config = model.config
        self._embed = model.model.embed_tokens
        self._layers = [_Layer(layer) for layer in model.model.layers]
        self._norm = _Norm(model.model.norm)
        self._head = _Linear(model.lm_head)
        self._rotary = rotary
        attention = model.model.layers[0].self_attn
        self._head_size: int = attention.head_dim
        self._scale: float = attention.scaling
        self._query_heads: int = config.num_attention_heads
        self._heads: int = config.num_key_value_heads
        self._swap = torch.arange(self._head_size, device=self._norm.module.weight.device).roll(self._head_size // 2)
        self._activation: Callable[[Tensor], Tensor] = ACT2FN[config.hidden_act]

    def cache(self, rows: int, capacity: int = 0, layers: Collection[int] = ()) -> KVCache:
        """As `passes.Forward`; any layer takes updates here."""
        return KVCache(rows, capacity)

    def __call__(
        self,
        ids: Tensor,
        cache: KVCache,
        keep: Tensor,
        layout: Layout | None = None,
        captured: Captured | None = None,
        updates: RowUpdates | None = None,
    ) -> Tensor:
        cache.begin(ids.shape[1])
        captured = {} if captured is None else captured
        groups = rows_by_updates(updates)
        if ids.numel() == 1 and layout is None and ids.device.type == "cpu":
            return self._one_token(ids, cache, captured, groups[0][0] if groups else None)
        return self._many_tokens(ids, cache, keep, layout, captured, groups)

    def _one_token(self, ids: Tensor, cache: KVCache, captured: Captured, updates: DownUpdates | None) -> Tensor:
        """One token of one row: products of a row vector with each matrix, written to where they are needed next."""
        position = cache.starts[0]
        cos, sin = (table[position] for table in self._rotary.upto(position + 1))
        heads, queries, size = self._heads, self._query_heads, self._head_size
        h = self._embed(ids[0])
        added = {} if updates is None else updates.on(h.device, h.dtype)
        # These are overwritten layer by layer, so that all views of them are made once.
        qkv = h.new_empty(1, (queries + 2 * heads) * size)
        parts = qkv.view(queries + 2 * heads, size)
        turned, swapped = parts[: queries + heads], h.new_empty(queries + heads, size)
        new_states = parts[queries:].view(2, 1, heads, 1, size)
        # The query heads that share a key head stand in for as many queries: one token needs no causal mask.
        grouped = parts[:queries].view(1, heads, queries // heads, size)
        gate_up = h.new_empty(1, sum(self._layers[0].gate_up.sizes))
        gate, up = gate_up.split(self._layers[0].gate_up.sizes, dim=1)
        for index, layer in enumerate(self._layers):
            layer.qkv.row(layer.attention_norm.row(h), qkv)
            torch.index_select(turned, 1, self._swap, out=swapped)
            turned.mul_(cos).add_(swapped.mul_(sin))
            keys, values = cache.write_token(index, new_states)
            seen = F.scaled_dot_product_attention(grouped, keys, values, scale=self._scale)
            h.add_(layer.o.row(seen.view(1, -1)))
            layer.gate_up.row(layer.mlp_norm.row(h), gate_up)
            x = self._activation(gate).mul_(up)
            if index in captured:
                captured[index] = x[None]
            h.add_(layer.down.row(x))
            if index in added:
                a, b = added[index]
                h.addmm_(torch.mm(x, a.t()), b.t())
        return self._head.row(self._norm.row(h))[None]

    def _many_tokens(
        self,
        ids: Tensor,
        cache: KVCache,
        keep: Tensor,
        layout: Layout | None,
        captured: Captured,
        groups: list[tuple[DownUpdates, list[int]]],
    ) -> Tensor:
        rows, width = ids.shape
        # Where all rows begin, the order alone says what is seen, and the kernel needs no mask.
        fresh = layout is None and not any(cache.starts)
        layout = layout or in_order(cache, ids)
        cos, sin = (table[layout.positions][:, None] for table in self._rotary.upto(int(layout.positions.max()) + 1))
        half = self._head_size // 2
        mask = None if fresh else self._for_groups(layout.visible)
        h = self._embed(ids)
        for index, layer in enumerate(self._layers):
            x = layer.attention_norm.module(h)
            q, k, v = (part.reshape(rows, width, -1, self._head_size).transpose(1, 2) for part in layer.qkv.rows(x))
            q, k = ((x * cos).add_(torch.cat((x[..., half:], x[..., :half]), dim=-1).mul_(sin)) for x in (q, k))
            keys, values = cache.write(index, k, v)
            seen = self._attend(q, keys, values, mask)
            h = h + layer.o.rows(seen.transpose(1, 2).reshape(rows, width, -1))[0]
            gate, up = layer.gate_up.rows(layer.mlp_norm.module(h))
            x = self._activation(gate).mul_(up)
            if index in captured:
                captured[index] = at_places(x, keep)
            h = h + layer.down.rows(x)[0]
            for updates, own in groups:
                found = updates.on(h.device, h.dtype).get(index)
                if found is not None:
                    h[own] += F.linear(F.linear(x[own], found[0]), found[1])
        h = at_places(h, keep)
        return self._head.rows(self._norm.module(h))[0]

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
