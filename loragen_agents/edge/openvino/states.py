"""Keys and values as states of an infer request, behind the interface of a `KVCache`.

Each pass appends a slot for every token that is fed, to every row, and nothing is ever cut out: slots that do not count
are masked. So what was read stays where it is, and a snapshot is only the list of its slots. Whoever continues it goes
on in the same request if nobody else is at work there, and copies it otherwise.
"""

import threading
import weakref
from collections.abc import Sequence

import numpy as np
import openvino as ov
import torch

from loragen_agents.edge.kv_cache import Snapshot
from loragen_agents.edge.openvino.compiled import CompiledLM, Request

# A request with more slots than this for each that counts is not continued: what is masked takes time, too.
_MOST_SLOTS = 4


class Lease:
    """The use of an infer request, by the snapshots that lie in it and at most one cache that writes to it.

    Attributes:
        positions: of the token in each slot, shape (rows, slots).
    """

    def __init__(self, compiled: CompiledLM, rows: int) -> None:
        self.compiled = compiled
        self.request: Request = compiled.request()
        self.positions = np.zeros((rows, 0), dtype=np.int64)
        self.lock = threading.Lock()
        self._writer: weakref.ref[StateCache] | None = None
        weakref.finalize(self, compiled.release, self.request)

    def taken_by(self, cache: "StateCache") -> bool:
        """Let `cache` write, if no other does."""
        with self.lock:
            if self._writer is not None and self._writer() is not None:
                return False
            self._writer = weakref.ref(cache)
            return True

    def copied(self, row: int, slots: np.ndarray) -> tuple[torch.Tensor, ...]:
        """Some slots of a row, per layer with shape (2, 1, heads, slots, head size)."""
        chosen = _chosen(slots)
        with self.lock:
            states = self.request.states
            return tuple(
                torch.from_numpy(
                    np.stack([states[f"{side}_{n}"].state.data[row][:, chosen] for side in ("key", "value")])[:, None]
                )
                for n in range(len(states) // 2)
            )

    def values(self, row: int, slots: np.ndarray, layers: Sequence[int]) -> list[torch.Tensor]:
        """The values in some slots of a row, of each layer with shape (heads, slots, head size); copies."""
        chosen = _chosen(slots)
        with self.lock:
            states = self.request.states
            return [torch.from_numpy(np.array(states[f"value_{n}"].state.data[row][:, chosen])) for n in layers]


def _chosen(slots: np.ndarray) -> slice | np.ndarray:
    """Slots as an index; those from the first on need no copy."""
    return slice(0, len(slots)) if not len(slots) or slots[-1] == len(slots) - 1 else slots


class HeldSnapshot(Snapshot):
    """A row's keys and values that still lie in an infer request; copied out of it when they are asked for."""

    def __init__(self, lease: Lease, row: int, slots: np.ndarray) -> None:
        object.__setattr__(self, "_held", (lease, row, slots))
        object.__setattr__(self, "_copied", None)

    @property
    def held(self) -> tuple[Lease, int, np.ndarray] | None:
        """The lease, the row and the slots; None once the states were copied."""
        found: tuple[Lease, int, np.ndarray] | None = self.__dict__["_held"]
        return found

    @property
    def layers(self) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        held = self.held
        if held is not None:
            object.__setattr__(self, "_copied", held[0].copied(*held[1:]))
            object.__setattr__(self, "_held", None)
        copied: tuple[torch.Tensor, ...] = self.__dict__["_copied"]
        return copied

    def values(self, layers: Sequence[int]) -> list[torch.Tensor]:
        """As `Snapshot.values`; the states go on lying in the request."""
        held = self.held
        return super().values(layers) if held is None else held[0].values(held[1], held[2], layers)

    def first(self, tokens: int) -> Snapshot:
        held = self.held
        return super().first(tokens) if held is None else HeldSnapshot(held[0], held[1], held[2][:tokens])


class StateCache:
    """Keys and values of `rows` sequences.

    Attributes:
        lengths: tokens of each row that count.
        valid: for each row and slot, whether its token counts, shape (rows, slots).

    Not safe for use by two threads at once.
    """

    def __init__(self, compiled: CompiledLM, rows: int) -> None:
        self.compiled = compiled
        self.lengths = [0] * rows
        self.valid = np.zeros((rows, 0), dtype=bool)
        # Which row of the states each row continues; None: they are as they were.
        self.order: np.ndarray | None = None
        self._lease: Lease | None = None
        self._written = 0

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def slots(self) -> int:
        return self.valid.shape[1]

    @property
    def lease(self) -> Lease:
        """The infer request that the states are in."""
        if self._lease is None:
            self._lease = Lease(self.compiled, self.rows)
            self._lease.taken_by(self)
        return self._lease

    @property
    def positions(self) -> np.ndarray:
        """Of the token in each slot, shape (rows, slots)."""
        return self.lease.positions if self.order is None else self.lease.positions[self.order]

    def written(self, positions: np.ndarray) -> None:
        """Note the slots that a pass has appended. positions: shape (rows, width)."""
        self.lease.positions = np.concatenate((self.positions, positions), axis=1)
        self.valid = np.concatenate((self.valid, np.zeros(positions.shape, dtype=bool)), axis=1)
        self.order = None
        self._written = positions.shape[1]

    def advance(self, counts: Sequence[int]) -> None:
        """Declare the first counts[b] tokens valid of those that the last pass wrote to row b."""
        first = self.slots - self._written
        for row, count in enumerate(counts):
            self.valid[row, first : first + count] = True
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these."""
        chosen = list(rows)
        self.lengths = [self.lengths[row] for row in chosen]
        self.valid = self.valid[chosen]
        order = np.array(chosen, dtype=np.int32)
        self.order = order if self.order is None else self.order[order]

    def fill(self, states: Sequence[Snapshot | None], lengths: Sequence[int]) -> None:
        """Begin row b with the first lengths[b] slots of states[b]. Only for a cache that is still empty."""
        longest = max(lengths, default=0)
        pattern = next((snapshot for snapshot in states if snapshot is not None), None)
        if pattern is None or not longest or self._continued(states, longest):
            return
        layers = [None if snapshot is None else snapshot.layers for snapshot in states]
        _, _, heads, _, size = pattern.layers[0].shape
        for layer in range(len(pattern.layers)):
            for side, name in enumerate(("key", "value")):
                filled = np.zeros((self.rows, heads, longest, size), dtype=np.float32)
                for row, (own, length) in enumerate(zip(layers, lengths, strict=True)):
                    if own is not None and length:
                        filled[row, :, :length] = own[layer][side, 0, :, :length].numpy()
                self.lease.request.states[f"{name}_{layer}"].state = ov.Tensor(filled)
        self.lengths = list(lengths)
        self.lease.positions = np.tile(np.arange(longest, dtype=np.int64), (self.rows, 1))
        self.valid = self.lease.positions < np.array(lengths)[:, None]

    def _continued(self, states: Sequence[Snapshot | None], length: int) -> bool:
        """Go on in the request that a single row's states lie in, where that is possible."""
        held = states[0].held if self.rows == 1 and isinstance(states[0], HeldSnapshot) else None
        if held is None or self._lease is not None:
            return False
        lease, _, slots = held
        rows, span = lease.positions.shape
        if rows != 1 or lease.compiled is not self.compiled or span > _MOST_SLOTS * length + 256:
            return False
        if not lease.taken_by(self):
            return False
        self._lease = lease
        self.lengths = [length]
        self.valid = np.zeros((1, lease.positions.shape[1]), dtype=bool)
        self.valid[0, slots[:length]] = True
        return True

    def snapshot(self, row: int) -> Snapshot:
        """The valid slots of a row."""
        if self.order is not None or self.rows > 1:
            source = row if self.order is None else int(self.order[row])
            return Snapshot(self.lease.copied(source, self.valid[row].nonzero()[0]))
        return HeldSnapshot(self.lease, 0, self.valid[0].nonzero()[0])
