"""The forward pass of any causal LM with full or sliding attention, by transformers' own modules."""

import threading
from collections.abc import Collection
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from loragen_agents.adapter.updates import DownUpdates
from loragen_agents.edge.kv_cache import KVCache
from loragen_agents.edge.passes import Captured, Layout, RowUpdates, at_places, in_order, rows_by_updates
from loragen_agents.errors import ModelLoadError
from loragen_agents.models.clone import clone_sharing_tensors
from loragen_agents.models.language_models import gated_ffn_layers


@dataclass(frozen=True)
class _Pass:
    """What the hooks of one pass do: the rows that each updates are for, and where captured activations go."""

    updates: list[tuple[DownUpdates, list[int]]]
    captured: Captured
    keep: Tensor


# A pass runs its hooks in the thread, and so in the context, that it was started in.
_current: ContextVar[_Pass | None] = ContextVar("loragen_agents_pass", default=None)


class _DownHook:
    """A forward hook of one layer's `down_proj`, which does what the pass that runs asks for."""

    def __init__(self, layer: int) -> None:
        self._layer = layer

    def __call__(self, module: nn.Module, arguments: tuple[Tensor], output: Tensor) -> Tensor:
        current = _current.get()
        if current is None:
            return output
        (x,) = arguments
        if self._layer in current.captured:
            current.captured[self._layer] = at_places(x, current.keep)
        for updates, rows in current.updates:
            found = updates.on(output.device, output.dtype).get(self._layer)
            if found is not None:
                output[rows] += F.linear(F.linear(x[rows], found[0]), found[1])
        return output


class ModuleForward:
    """Any causal LM with full or sliding attention, run by transformers' modules.

    Raises:
        ModelLoadError: layers of another kind, or an attention implementation that takes no mask.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config(decoder=True)
        self._model = model
        self._hooked: PreTrainedModel | None = None
        self._lock = threading.Lock()
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
        """As `Forward`.

        Raises:
            ModelLoadError: activations or updates are asked for, and the model has no gated FFNs, or can't be cloned.
        """
        groups = rows_by_updates(updates)
        model, current = self._model, None
        if captured or groups:
            model, current = self._with_hooks(), _Pass(groups, {} if captured is None else captured, keep)
        cache.begin(ids.shape[1])
        layout = layout or in_order(cache, ids)
        mask: Any = self._mask(layout.visible)
        if self._window is not None:
            near = layout.positions[:, :, None] - layout.slot_positions[:, None, :] < self._window
            sliding = self._mask(layout.visible & near)
            mask = {"full_attention": mask, "sliding_attention": sliding} if self._by_kind else sliding
        # All rows share one set of places here; each then takes its own from them.
        places, own = torch.unique(keep, return_inverse=True)
        token = _current.set(current)
        try:
            logits: Tensor = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=layout.positions,
                past_key_values=_TransformersCache(cache),
                use_cache=True,
                logits_to_keep=places,
            ).logits
        finally:
            _current.reset(token)
        return at_places(logits, own)

    def _with_hooks(self) -> PreTrainedModel:
        """The model with hooks on each `down_proj`, over the same tensors; the user's own modules get none."""
        with self._lock:
            if self._hooked is None:
                hooked = clone_sharing_tensors(self._model)
                for layer, (_, mlp) in enumerate(gated_ffn_layers(hooked)):
                    mlp.down_proj.register_forward_hook(_DownHook(layer))  # type: ignore[operator, union-attr]
                self._hooked = hooked
            return self._hooked

    def _mask(self, visible: Tensor) -> Tensor:
        """(rows, width, span) -> (rows, 1, width, span), as the attention implementation wants it."""
        if not self._additive:
            return visible[:, None]
        dtype = self._model.dtype
        return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(
            ~visible, torch.finfo(dtype).min
        )[:, None]


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
