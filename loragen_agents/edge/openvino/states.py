"""Keys and values as states of an infer request, behind the interface of a `KVCache`.

Each pass appends a slot for every token that is fed, to every row. Slots of tokens that do not count (padding, or
continuations that were only scored) stay where they are and are masked from then on, so nothing has to be cut out.
"""

import weakref
from collections.abc import Sequence

import numpy as np
import openvino as ov
import torch

from loragen_agents.edge.kv_cache import Snapshot
from loragen_agents.edge.openvino.compiled import CompiledLM, Request


class StateCache:
    """Keys and values of `rows` sequences.

    lengths: tokens of each row that count. valid, positions: for each row and slot, whether its token counts, and the
    token's position, both with shape (rows, slots).

    Not safe for use by two threads at once.
    """

    def __init__(self, compiled: CompiledLM, rows: int) -> None:
        self.compiled = compiled
        self.lengths = [0] * rows
        self.valid = np.zeros((rows, 0), dtype=bool)
        self.positions = np.zeros((rows, 0), dtype=np.int64)
        # Which row of the states each row continues; None: they are as they were.
        self.order: np.ndarray | None = None
        self.request: Request = compiled.request()
        self._written = 0
        weakref.finalize(self, compiled.release, self.request)

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def slots(self) -> int:
        return self.valid.shape[1]

    def written(self, positions: np.ndarray) -> None:
        """Note the slots that a pass has appended. positions: shape (rows, width)."""
        self.valid = np.concatenate((self.valid, np.zeros(positions.shape, dtype=bool)), axis=1)
        self.positions = np.concatenate((self.positions, positions), axis=1)
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
        self.valid, self.positions = self.valid[chosen], self.positions[chosen]
        order = np.array(chosen, dtype=np.int32)
        self.order = order if self.order is None else self.order[order]

    def fill(self, states: Sequence[Snapshot | None], lengths: Sequence[int]) -> None:
        """Begin row b with the first lengths[b] slots of states[b]. Only for a cache that is still empty."""
        pattern = next((snapshot for snapshot in states if snapshot is not None), None)
        longest = max(lengths, default=0)
        if pattern is None or not longest:
            return
        _, _, heads, _, size = pattern.layers[0].shape
        for layer in range(len(pattern.layers)):
            for side, name in enumerate(("key", "value")):
                if self.rows == 1:
                    assert states[0] is not None
                    filled = np.ascontiguousarray(states[0].layers[layer][side, :, :, :longest].numpy())
                else:
                    filled = np.zeros((self.rows, heads, longest, size), dtype=np.float32)
                    for row, (snapshot, length) in enumerate(zip(states, lengths, strict=True)):
                        if snapshot is not None and length:
                            filled[row, :, :length] = snapshot.layers[layer][side, 0, :, :length].numpy()
                self.request.states[f"{name}_{layer}"].state = ov.Tensor(filled)
        self.lengths = list(lengths)
        self.positions = np.tile(np.arange(longest, dtype=np.int64), (self.rows, 1))
        self.valid = self.positions < np.array(lengths)[:, None]

    def snapshot(self, row: int) -> Snapshot:
        """Copy the valid slots of a row."""
        chosen = self.valid[row].nonzero()[0]
        source = row if self.order is None else int(self.order[row])
        # Mostly all that counts lies in front.
        slots = slice(0, len(chosen)) if not len(chosen) or chosen[-1] == len(chosen) - 1 else chosen
        layers = []
        for layer in range(len(self.request.states) // 2):
            sides = [self.request.states[f"{name}_{layer}"].state.data[source][:, slots] for name in ("key", "value")]
            layers.append(torch.from_numpy(np.stack(sides)[:, None]))
        return Snapshot(tuple(layers))
