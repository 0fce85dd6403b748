"""Keys and values of sequences that were read: a cache of rows that differ in length, and a store of read prefixes.

Row b of a `KVCache` holds its tokens in the first `lengths[b]` slots; those behind are unused: never attended to, and
overwritten by the next write. So rows of different lengths advance together, each by its own number of tokens, without
padding in between. A `PrefixStore` keeps snapshots that nobody writes to: whoever continues one copies it, so
two threads never write into the same keys.

Knows shapes, not models: which layer attends to what is the caller's business.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loragen_agents.errors import ModelLoadError


class KVCache:
    """Keys and values of `rows` sequences, per layer in one tensor with shape (2, rows, heads, slots, head size).

    Attributes:
        lengths: number of valid slots of each row.
        starts, span: while tokens are written, each row's first slot for them, and the slots that any of them can see
            (up to the furthest row's end).

    Layers are allocated when first written to, so that shapes need not be known before. Not safe for use by two threads
    at once.
    """

    def __init__(self, rows: int, capacity: int = 0) -> None:
        self.lengths = [0] * rows
        self.starts = [0] * rows
        self.span = 0
        self._capacity = capacity
        self._layers: list[Tensor] = []
        self._width = 0
        self._together = True
        self._slots: Tensor | None = None

    @property
    def rows(self) -> int:
        return len(self.lengths)

    def begin(self, width: int) -> None:
        """Prepare to write `width` tokens behind each row's valid slots, in every layer."""
        self.starts = list(self.lengths)
        self.span = max(self.starts) + width
        self._width = width
        self._together = len(set(self.starts)) == 1
        self._slots = None
        if self.span > self._capacity:
            # Doubling keeps the copying in proportion to what is written.
            self._capacity = max(self.span, 2 * self._capacity, 64)
            for layer, old in enumerate(self._layers):
                self._layers[layer] = self._empty(old[0])
                self._layers[layer][:, :, :, : old.shape[3]] = old

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's new states; return the layer's keys and values as far as they can be seen.

        Args:
            keys, values: shape (rows, heads, width, head size).

        Returns:
            Views with shape (rows, heads, span, head size).

        Raises:
            ModelLoadError: keys and values differ in shape.
        """
        if keys.shape != values.shape:
            raise ModelLoadError(
                f"layer {layer} has keys of shape {tuple(keys.shape)} and values of shape {tuple(values.shape)}; only "
                "models whose keys and values are of one size can be decoded here"
            )
        if layer == len(self._layers):
            self._layers.append(self._empty(keys))
        states = self._layers[layer]
        if self._together:
            states[0].narrow(2, self.starts[0], self._width).copy_(keys)
            states[1].narrow(2, self.starts[0], self._width).copy_(values)
        else:
            if self._slots is None:
                starts = torch.tensor(self.starts, device=keys.device)
                self._slots = starts[:, None] + torch.arange(self._width, device=keys.device)
            rows = torch.arange(self.rows, device=keys.device)[:, None]
            # Indexed along rows and slots, the heads come last: (rows, width, heads, head size).
            states[0][rows, :, self._slots] = keys.transpose(1, 2)
            states[1][rows, :, self._slots] = values.transpose(1, 2)
        return states[0].narrow(2, 0, self.span), states[1].narrow(2, 0, self.span)

    def write_token(self, layer: int, states: Tensor) -> tuple[Tensor, Tensor]:
        """As `write`, for one token of a single row, with fewer steps. states: shape (2, 1, heads, 1, head size)."""
        if layer == len(self._layers):
            self._layers.append(self._empty(states[0]))
        all_states = self._layers[layer]
        all_states.narrow(3, self.starts[0], 1).copy_(states)
        keys, values = all_states.narrow(3, 0, self.span).unbind()
        return keys, values

    def advance(self, counts: Sequence[int]) -> None:
        """Declare the first counts[b] slots valid of those that were written to row b."""
        self.lengths = [start + count for start, count in zip(self.starts, counts, strict=True)]

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these."""
        self.lengths = [self.lengths[row] for row in rows]
        for layer, states in enumerate(self._layers):
            self._layers[layer] = states[:, list(rows)]

    def fill(self, states: "Sequence[Snapshot | None]", lengths: Sequence[int]) -> None:
        """Begin row b with the first lengths[b] slots of states[b]. Only for a cache that is still empty."""
        pattern = next((snapshot for snapshot in states if snapshot is not None), None)
        if pattern is None:
            return
        self._capacity = max(self._capacity, *lengths)
        self._layers = [self._empty(layer[0]) for layer in pattern.layers]
        for row, (snapshot, length) in enumerate(zip(states, lengths, strict=True)):
            if snapshot is not None and length:
                for own, old in zip(self._layers, snapshot.layers, strict=True):
                    own[:, row, :, :length] = old[:, 0, :, :length]
        self.lengths = list(lengths)

    def snapshot(self, row: int) -> "Snapshot":
        """Copy the valid slots of a row."""
        return Snapshot(tuple(states[:, row : row + 1, :, : self.lengths[row]].clone() for states in self._layers))

    def _empty(self, like: Tensor) -> Tensor:
        """like: one layer's keys. Zeros: what is masked out still enters products, and 0 x NaN is NaN."""
        return like.new_zeros(2, self.rows, like.shape[1], self._capacity, like.shape[3])


@dataclass(frozen=True, eq=False)
class Snapshot:
    """One row's keys and values, per layer with shape (2, 1, heads, tokens, head size); never written to."""

    layers: tuple[Tensor, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(layer.nbytes for layer in self.layers)

    def values(self, layers: Sequence[int]) -> list[Tensor]:
        """The values of some layers, each with shape (heads, tokens, head size)."""
        return [self.layers[layer][1, 0] for layer in layers]

    def first(self, tokens: int) -> "Snapshot":
        """A view of the first tokens."""
        return Snapshot(tuple(layer[:, :, :, :tokens] for layer in self.layers))

    def copy(self) -> "Snapshot":
        """The same in memory of its own, which does not hold on to that of a longer snapshot."""
        return Snapshot(tuple(layer.clone() for layer in self.layers))


History = tuple[tuple[int, Any], ...]
"""How tokens were read: (place, updates) for each place from which on the model ran with other updates than before.

Empty where the model itself read all of them. States are the same only where tokens and history are.
"""


def extended(history: History, place: int, updates: Any) -> History:
    """The history of tokens that were read with `updates` from `place` on, behind tokens with `history`."""
    if place == 0:
        history = ()
    before = history[-1][1] if history else None
    return history if updates is before else (*history, (place, updates))


@dataclass(frozen=True, eq=False)
class _Entry:
    tokens: np.ndarray
    history: History
    states: Snapshot
    pinned: bool


class PrefixStore:
    """The most recently used prefixes that a model has read, and their snapshots. Safe for use by several threads.

    Args:
        entries, size: how many are kept, and how many bytes in all. Pinned prefixes are kept beyond that, until
            `clear`.
    """

    def __init__(self, entries: int = 8, size: int = 256 * 2**20) -> None:
        self.entries = entries
        self.size = size
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[bytes, History], _Entry] = OrderedDict()  # oldest use first

    def find(self, tokens: Sequence[int], history: History = ()) -> tuple[Snapshot | None, int]:
        """The snapshot that shares the longest beginning with `tokens`, and the length of that beginning.

        Args:
            history: how the tokens are to be read; what was read in another way is not shared.
        """
        wanted = np.asarray(tokens, dtype=np.int64)
        best: tuple[bytes, History] | None = None
        longest = 0
        with self._lock:
            for key, entry in self._kept.items():
                length = _read_alike(entry.history, history, _common_length(entry.tokens, wanted))
                if length > longest:
                    best, longest = key, length
            if best is None:
                return None, 0
            self._kept.move_to_end(best)
            return self._kept[best].states, longest

    def add(self, tokens: Sequence[int], states: Snapshot, *, pinned: bool = False, history: History = ()) -> None:
        """Keep a snapshot of `tokens`, unless a longer one is there; those that it contains go, if not pinned."""
        new = np.asarray(tokens, dtype=np.int64)
        history = tuple(change for change in history if change[0] < len(new))
        key = new.tobytes(), history
        with self._lock:
            for other, entry in list(self._kept.items()):
                common = _read_alike(entry.history, history, _common_length(entry.tokens, new))
                if common == len(new) and not pinned:
                    self._kept.move_to_end(other)
                    return
                if common == len(entry.tokens) and not entry.pinned:
                    del self._kept[other]
            self._kept[key] = _Entry(new, history, states, pinned)
            self._kept.move_to_end(key)
            free = [other for other, entry in self._kept.items() if not entry.pinned]
            size = sum(self._kept[other].states.size for other in free)
            while free and (len(free) > self.entries or size > self.size):
                oldest = free.pop(0)
                size -= self._kept.pop(oldest).states.size

    def clear(self) -> None:
        """Forget everything, pinned prefixes too."""
        with self._lock:
            self._kept.clear()

    def __len__(self) -> int:
        with self._lock:
            return len(self._kept)


def _read_alike(one: History, other: History, length: int) -> int:
    """How many of the first `length` tokens were read with the same updates in both."""
    for place in range(max(len(one), len(other))):
        changes = [history[place] for history in (one, other) if place < len(history)]
        if len(changes) == 1 or changes[0][0] != changes[1][0] or changes[0][1] is not changes[1][1]:
            return min(length, *(change[0] for change in changes))
    return length


def _common_length(one: np.ndarray, other: np.ndarray) -> int:
    shorter = min(len(one), len(other))
    differing = np.nonzero(one[:shorter] != other[:shorter])[0]
    return int(differing[0]) if len(differing) else shorter
