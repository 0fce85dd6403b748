"""Rank-one updates of `down_proj` that write tools into a model, and the last steps in which they depend on each other.

The generator's tool memory maps what it has read of a tool; what all tools of a registry have in common is taken off
afterwards. So the same mapped updates give those of a tool alone, which are in place while its call is written, and the
sum over a registry. Knows nothing of how tools are read.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
import torch.nn.functional as F
from torch import Tensor

from loragen_agents.adapter.lora_weights import Entry, LoRAWeights
from loragen_agents.adapter.updates import DownUpdates


class UpdateKind(IntEnum):
    """What an update raises.

    NAME_START: the first token of a tool's name. NAME: a later one, or the line's end behind it.
    ARGUMENT: a token of an argument's name, in a json input.
    INPUT: the token with which an input begins, by which json inputs differ from csv.
    DECISION: the token that says that a tool is called.
    OWN_INPUT: as INPUT, where this tool's input begins otherwise than those of others (`{}` without arguments).
    """

    NAME_START = 0
    NAME = 1
    ARGUMENT = 2
    INPUT = 3
    DECISION = 4
    OWN_INPUT = 5


# Kinds that tell tools apart: what all tools of a registry have in common is subtracted. That a tool is called at all,
# and how inputs are written, is the same for all of them and stays.
_CENTRED = (UpdateKind.NAME_START, UpdateKind.NAME, UpdateKind.ARGUMENT, UpdateKind.OWN_INPUT)
# A direction that keeps less of its length than this without the mean is the same for all tools.
_SMALLEST_PART = 1e-3


@dataclass(frozen=True, eq=False)
class ValueMaps:
    """How directions become the values of updates; the same for all tools.

    Attributes:
        layers: the edge layers that hold updates, in order.
        scale: of each kind in each of these layers, with shape (kinds, layers).
        down, up: W and V of `MappedUpdates.entries`, with shapes (layers, hidden size, rank) and (layers, rank, hidden
            size).
    """

    layers: tuple[int, ...]
    scale: Tensor
    down: Tensor
    up: Tensor


@dataclass(frozen=True, eq=False)
class MappedUpdates:
    """Updates of one tool or several, before what they have in common is taken off.

    Attributes:
        keys: mapped activations c, with shape (layers, updates, intermediate size).
        directions: what raises the logit of the next token, with shape (updates, hidden size).
        kinds: an `UpdateKind` each, with shape (updates,).
    """

    keys: Tensor
    directions: Tensor
    kinds: Tensor

    @classmethod
    def joined(cls, parts: "Sequence[MappedUpdates]") -> "MappedUpdates":
        """The updates of several tools, one behind the other."""
        return cls(
            torch.cat([part.keys for part in parts], dim=1),
            torch.cat([part.directions for part in parts]),
            torch.cat([part.kinds for part in parts]),
        )

    def split(self, counts: Sequence[int]) -> "list[MappedUpdates]":
        """The updates of single tools. counts: how many each of them has."""
        parts = zip(
            self.keys.split(list(counts), dim=1),
            self.directions.split(list(counts)),
            self.kinds.split(list(counts)),
            strict=True,
        )
        return [MappedUpdates(*part) for part in parts]

    def unit_keys(self) -> Tensor:
        """k = norm(c), less the mean of the updates of the same kind where kinds tell tools apart; shape as `keys`."""
        keys = torch.zeros_like(self.keys)
        for kind, chosen in self._by_kind():
            own = F.normalize(_less_mean(kind, self.keys[:, chosen]), dim=-1)
            keys = keys.index_copy(1, chosen, own)
        return keys

    def entries(self, maps: ValueMaps) -> dict[Entry, tuple[Tensor, Tensor]]:
        """As LoRA entries of `down_proj`: A (updates, intermediate size) and B (hidden size, updates).

        A holds the keys k, B the values s · (e + V W e), where e is the direction, less the mean as in `unit_keys`, and
        normalised. The INPUT updates of all tools answer to the same activations, so they share one s.
        """
        keys, kinds = self.unit_keys(), self.kinds
        e = torch.zeros_like(self.directions)
        for kind, chosen in self._by_kind():
            e = e.index_copy(0, chosen, _less_mean(kind, self.directions[None, chosen])[0])
        # Where all tools go on with the same token, only rounding errors are left, which must not become directions.
        length = torch.maximum(e.norm(dim=-1), _SMALLEST_PART * self.directions.norm(dim=-1)).clamp(min=1e-12)
        e = (e / length[:, None]).expand(len(maps.layers), -1, -1)
        values = e + torch.bmm(torch.bmm(e, maps.down), maps.up)
        inputs = kinds == UpdateKind.INPUT
        shares = torch.where(inputs, 1 / inputs.sum().clamp(min=1), 1.0)
        values = values * (maps.scale[kinds] * shares[:, None]).T[..., None]
        return {(layer, "down_proj"): (keys[n], values[n].T) for n, layer in enumerate(maps.layers)}

    def _by_kind(self) -> list[tuple[UpdateKind, Tensor]]:
        """The kinds that there are, and the places of their updates."""
        places = [(kind, (self.kinds == kind).nonzero()[:, 0]) for kind in UpdateKind]
        return [(kind, chosen) for kind, chosen in places if len(chosen)]


@dataclass(frozen=True, eq=False)
class ToolUpdates:
    """The updates of a registry's tools.

    Attributes:
        names: of the tools, in the registry's order.
        depth: number of layers of the edge LM.
        maps: of values.
        read: gives the mapped updates of each of some tools, by their names.
    """

    names: tuple[str, ...]
    depth: int
    maps: ValueMaps
    read: Callable[[Sequence[str]], list[MappedUpdates]]

    def of(self, tool: str) -> DownUpdates:
        """The updates of a tool as if it were alone in its registry: what is in place once it is chosen."""
        return DownUpdates.of(self._weights(self.read([tool])[0]))

    def combined(self) -> LoRAWeights:
        """The sum over all tools."""
        return self._weights(MappedUpdates.joined(self.read(self.names)))

    def _weights(self, updates: MappedUpdates) -> LoRAWeights:
        return LoRAWeights(self.depth, 1, 1, updates.entries(self.maps))


def _less_mean(kind: UpdateKind, x: Tensor) -> Tensor:
    """x (layers, updates, width) less its mean over the updates, where the kind asks for it and there are several."""
    return x - x.mean(dim=1, keepdim=True) if kind in _CENTRED and x.shape[1] > 1 else x
