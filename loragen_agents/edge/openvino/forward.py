"""The forward pass on OpenVINO: what `passes.Forward` promises, by a compiled graph."""

import threading
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import openvino as ov
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from loragen_agents.adapter.lora_weights import LoRAWeights
from loragen_agents.adapter.updates import DownUpdates
from loragen_agents.edge.openvino.compiled import CompiledLM, Request, compiled_lm
from loragen_agents.edge.openvino.graph import layer_kinds
from loragen_agents.edge.openvino.states import StateCache
from loragen_agents.edge.passes import Captured, Layout, RowUpdates

# Ranks of updates are padded to a multiple of this: each new shape costs OpenVINO some preparation.
_RANKS = 16
# What is masked. Far below any score, and finite in every precision.
_MASKED = np.float32(-1e30)


def padded(width: int) -> int:
    """The width of the pass that this many tokens are read in.

    Each new width costs OpenVINO as much time as a dozen tokens, and requests come in all lengths.
    """
    if width <= 2:
        return width
    step = 4 if width <= 64 else 8 if width <= 128 else 16 if width <= 256 else 32
    return -(-width // step) * step


class OpenVINOForward:
    """Runs a model for which `why_not` gives None. Safe for use by several threads.

    Updates and activations are there for the last third of the layers; where others are asked for, the graph is
    compiled again with them.

    Args:
        model, merged, fingerprint: as `compiled_lm` takes them.
    """

    def __init__(
        self, model: PreTrainedModel, merged: LoRAWeights | None = None, fingerprint: str | None = None
    ) -> None:
        self._model, self._weights = model, (merged, fingerprint)
        self._embed = model.get_input_embeddings()
        self._kinds = sorted(set(layer_kinds(model)))
        self._window: int = getattr(model.config, "sliding_window", None) or 2**31
        self._tables: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._lock = threading.Lock()
        layers = model.config.num_hidden_layers
        self.compiled = compiled_lm(model, range(layers - -(-layers // 3), layers), *self._weights)

    def cache(self, rows: int, capacity: int = 0, layers: Collection[int] = ()) -> StateCache:
        """As `passes.Forward`; states grow by themselves, so `capacity` does not matter here."""
        with self._lock:
            missing = set(layers) - set(self.compiled.updated)
            if missing:
                self.compiled = compiled_lm(self._model, {*self.compiled.updated, *missing}, *self._weights)
            return StateCache(self.compiled, rows)

    def __call__(
        self,
        ids: Tensor,
        cache: Any,
        keep: Tensor,
        layout: Layout | None = None,
        captured: Captured | None = None,
        updates: RowUpdates | None = None,
    ) -> Tensor:
        """As `passes.Forward`. Logits are in float32."""
        rows, given = ids.shape
        width = padded(given)
        request: Request = cache.lease.request
        if layout is None:
            positions = np.array(cache.lengths, dtype=np.int64)[:, None] + np.arange(width)
        else:
            positions = np.pad(layout.positions.expand(rows, -1).numpy(), ((0, 0), (0, width - given)), mode="edge")
        inputs = {
            "embeddings": self._embed(F.pad(ids, (0, width - given))).float().numpy(),
            "beam_idx": np.arange(rows, dtype=np.int32) if cache.order is None else cache.order,
            "keep": np.ascontiguousarray(keep.numpy()),
        }
        near, span = self._visible(cache, positions, layout), cache.slots + width
        for kind in self._kinds:
            inputs[f"cos_{kind}"], inputs[f"sin_{kind}"] = self._rotary(kind, positions)
            inputs[f"mask_{kind}"] = self._mask(kind, near, cache, positions, rows, width, span)
        self._bind(request, cache.compiled, updates or [None] * rows)
        infer = request.infer_request
        for name, array in inputs.items():
            infer.set_tensor(name, ov.Tensor(array, shared_memory=True))
        with cache.lease.lock:
            infer.infer(None, share_outputs=True)
            cache.written(positions)
        wanted = [layer for layer in captured or () if layer in cache.compiled.updated]
        if wanted and captured is not None:
            activations = infer.get_tensor("captured").data
            for layer in wanted:
                captured[layer] = torch.from_numpy(activations[cache.compiled.updated.index(layer)].copy())
        return torch.from_numpy(infer.get_tensor("logits").data.copy())

    def _visible(self, cache: StateCache, positions: np.ndarray, layout: Layout | None) -> np.ndarray | None:
        """(rows, width, span): which slots each token attends to; None where it is all of them."""
        rows, width = positions.shape
        if layout is None:
            if width == 1 and cache.valid.all():
                return None
            old = np.broadcast_to(cache.valid[:, None], (rows, width, cache.slots))
            new = np.broadcast_to(np.tri(width, dtype=bool), (rows, width, width))
            return np.concatenate((old, new), axis=2)
        visible = np.zeros((rows, width, cache.slots + width), dtype=bool)
        for row, shown in enumerate(layout.visible.expand(rows, -1, -1).numpy()):
            length, given = cache.lengths[row], len(shown)
            visible[row, :given, cache.valid[row].nonzero()[0]] = shown[:, :length].T
            visible[row, :given, cache.slots : cache.slots + given] = shown[:, length : length + given]
        return visible

    def _mask(
        self,
        kind: str,
        visible: np.ndarray | None,
        cache: StateCache,
        positions: np.ndarray,
        rows: int,
        width: int,
        span: int,
    ) -> np.ndarray:
        if kind == "sliding_attention" and positions.max() >= self._window:
            slots = np.concatenate((cache.positions, positions), axis=1)
            near = positions[:, :, None] - slots[:, None, :] < self._window
            visible = near if visible is None else visible & near
        if visible is None:
            return np.zeros((rows, 1, width, span), dtype=np.float32)
        return np.where(visible, np.float32(0), _MASKED)[:, None]

    def _rotary(self, kind: str, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and sines at the positions, each with shape (rows, 1, width, head size)."""
        last = int(positions.max())
        table = self._tables.get(kind)
        if table is None or len(table[0]) <= last:
            count = torch.arange(max(256, 1 << last.bit_length()))[None]
            module, like = self._model.model.rotary_emb, torch.empty(0)
            # Models that have several kinds of layers have an embedding for each.
            several = any(name.startswith(kind) for name, _ in module.named_buffers())
            cos, sin = module(like, count, kind) if several else module(like, count)
            table = self._tables[kind] = cos[0].numpy(), sin[0].numpy()
        return table[0][positions][:, None], table[1][positions][:, None]

    def _bind(self, request: Request, compiled: CompiledLM, updates: Sequence[DownUpdates | None]) -> None:
        """Set the inputs for the updates, unless the request holds them from its last pass."""
        # Rows that share their updates share the inputs.
        rows = list(updates[:1]) if all(one is updates[0] for one in updates) else list(updates)
        held = request.updates
        if held is not None and len(held) == len(rows) and all(a is b for a, b in zip(held, rows, strict=True)):
            return
        found = [{} if one is None else one.on(torch.device("cpu"), torch.float32) for one in rows]
        hidden: int = self._model.config.hidden_size
        intermediate: int = self._model.config.intermediate_size
        for layer in compiled.updated:
            rank = max([1, *(len(own[layer][0]) for own in found if layer in own)])
            rank = rank if rank == 1 else -(-rank // _RANKS) * _RANKS
            a = np.zeros((len(rows), rank, intermediate), dtype=np.float32)
            b = np.zeros((len(rows), hidden, rank), dtype=np.float32)
            for row, own in enumerate(found):
                if layer in own:
                    width = len(own[layer][0])
                    a[row, :width], b[row, :, :width] = own[layer][0].numpy(), own[layer][1].numpy()
            request.infer_request.set_tensor(f"a_{layer}", ov.Tensor(a))
            request.infer_request.set_tensor(f"b_{layer}", ov.Tensor(b))
        request.updates = rows
