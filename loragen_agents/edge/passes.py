"""What a forward pass over a `KVCache` is: what it is given, what it gives back, and how tokens lie in their rows.

`lean_forward` and `module_forward` have the passes themselves.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from loragen_agents.adapter.updates import DownUpdates
from loragen_agents.edge.kv_cache import KVCache, Snapshot


@dataclass(frozen=True)
class Layout:
    """Tokens that do not simply follow one another in their row, such as several continuations of one prefix.

    Attributes:
        positions: of the tokens fed, shape (rows, width).
        visible: slots that each token attends to, boolean, shape (rows, width, span).
        slot_positions: the position held in each slot, shape (rows, span).
    """

    positions: Tensor
    visible: Tensor
    slot_positions: Tensor


Captured = dict[int, Tensor | None]
"""Layer -> inputs of its `down_proj` at the kept places, with shape (rows, kept, intermediate size)."""

RowUpdates = Sequence[DownUpdates | None]
"""The updates of each row of a batch; None runs a row with the bare model."""


class Cache(Protocol):
    """Keys and values of several sequences, as the forward pass that made it keeps them; see `KVCache`."""

    lengths: list[int]

    def advance(self, counts: Sequence[int]) -> None: ...

    def keep(self, rows: Sequence[int]) -> None: ...

    def fill(self, states: Sequence[Snapshot | None], lengths: Sequence[int]) -> None: ...

    def snapshot(self, row: int) -> Snapshot: ...


class Forward(Protocol):
    """Feeds tokens behind the valid slots of each row; the caller declares how many of them count (`advance`)."""

    def cache(self, rows: int, capacity: int = 0, layers: Collection[int] = ()) -> Cache:
        """An empty cache for passes of this model.

        Args:
            rows: number of sequences.
            capacity: slots to set aside for each.
            layers: those whose updates or activations the passes will ask for.
        """

    def __call__(
        self,
        ids: Tensor,
        cache: Any,
        keep: Tensor,
        layout: Layout | None = None,
        captured: Captured | None = None,
        updates: RowUpdates | None = None,
    ) -> Tensor:
        """Run the model on `ids`.

        Args:
            ids: tokens, shape (rows, width).
            cache: one that this forward pass has made.
            keep: places within the width, shape (rows, kept).
            layout: where tokens stand that do not simply follow one another.
            captured: filled for each layer that it has as a key.
            updates: of each row.

        Returns:
            Logits with shape (rows, kept, vocabulary).
        """


def at_places(x: Tensor, keep: Tensor) -> Tensor:
    """x (rows, width, size) at the places `keep` (rows, kept)."""
    return x.gather(1, keep[:, :, None].expand(-1, -1, x.shape[-1]))


def in_order(cache: KVCache, ids: Tensor) -> Layout:
    """Tokens that follow one another behind each row's valid slots."""
    device = ids.device
    slots = torch.arange(cache.span, device=device)[None]
    positions = torch.tensor(cache.starts, device=device)[:, None] + torch.arange(ids.shape[1], device=device)
    return Layout(positions, slots[:, None] <= positions[:, :, None], slots.expand(ids.shape[0], -1))


def rows_by_updates(updates: RowUpdates | None) -> list[tuple[DownUpdates, list[int]]]:
    """The different updates of a batch, each with the rows that have it."""
    groups: dict[int, tuple[DownUpdates, list[int]]] = {}
    for row, one in enumerate(updates or ()):
        if one is not None:
            groups.setdefault(id(one), (one, []))[1].append(row)
    return list(groups.values())
