"""Associative tool memory: a registry written into `down_proj` as rank-one pieces `v kᵀ`, some for each tool.

Where routed experts carry format and task, the pieces carry the registry itself, as fast weights and linear
associative memories do. A tool is read once: its description stands in the place of a user's request, and the edge LM
runs over the step that would call it. The FFN activations at the places where the registry has a say in the next token
become keys; the value of a piece is the direction that raises the right token's logit. A request that means what the
description says has similar activations at the same places, so the pieces answer with what the registry says there.

Pieces of different tools do not depend on each other but for a common mean that is taken off, so that a registry grows
or shrinks by a tool without reading the others again. This module knows how keys and values become weights; it knows
nothing of tokenizers, prompts or registries (see `tool_reading`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loragen_agents.adapter.tool_match import ToolMatch


class PieceKind(IntEnum):
    """What a piece answers with.

    NAME_START: the first token of a tool's name. NAME: a later one, or the line's end behind it.
    ARGUMENT: a token of an argument's name, in a json input.
    INPUT: how an input begins, which is how json inputs differ from csv.
    DECISION: that a tool is called, and not none.
    OWN_INPUT: how the input of this tool begins where those of others differ, as without arguments.
    """

    NAME_START = 0
    NAME = 1
    ARGUMENT = 2
    INPUT = 3
    DECISION = 4
    OWN_INPUT = 5


# In these, what all tools of a registry have in common says nothing. That some tool serves a request, and how inputs
# are written, is on the contrary the same for all of them.
_CENTRED = (PieceKind.NAME_START, PieceKind.NAME, PieceKind.ARGUMENT, PieceKind.OWN_INPUT)
# A direction that keeps less of its length than this when the mean is taken off is the same for all tools.
_SMALLEST_PART = 1e-3


@dataclass(frozen=True)
class ToolReading:
    """What was read of one tool.

    activations: inputs of `down_proj` in the memory's layers where a piece has a say, with shape
        (memory layers, pieces, intermediate size).
    directions: what raises the logit of the token that is to come there, with shape (pieces, hidden size).
    kinds: a `PieceKind` for each piece, with shape (pieces,); each tool has one DECISION, NAME_START, INPUT
        and OWN_INPUT.
    """

    activations: Tensor
    directions: Tensor
    kinds: Tensor


class ToolMemory(nn.Module):
    """Turns readings of tools into rank-one updates of `down_proj`, with a few learnt maps.

    Of a layer l and a piece of kind κ with activation x, the key is k = norm(c + U_κl D_κl c). Here c is x less a
    learnt background and less its part in the directions that FFN activations commonly have; for names, arguments and
    OWN_INPUT, the mean of the registry's pieces of the same kind is taken off before norm. The value is
    v = e + V_l W_l e, where e is the piece's direction, centred in the same way and normalised. The update of
    `down_proj` is s_κl v kᵀ; as the INPUT pieces of all tools fire together, they share one s.

    layers: the edge layers that hold pieces, in order.
    """

    scale: Tensor
    background: Tensor
    common: Tensor

    def __init__(
        self,
        layers: Sequence[int],
        hidden_size: int,
        intermediate_size: int,
        common_rank: int = 64,
        key_rank: int = 32,
        value_rank: int = 32,
        initial_scale: float = 1.0,
    ) -> None:
        super().__init__()
        kinds, count = len(PieceKind), len(layers)
        self.layers = tuple(layers)
        self.scale = nn.Parameter(torch.full((kinds, count), initial_scale))
        self.background = nn.Parameter(torch.zeros(kinds, count, intermediate_size))
        # Pieces that answered to what all activations share would fire at every token, not where they belong alone.
        self.register_buffer("common", torch.zeros(count, intermediate_size, common_rank))
        self.key_down = nn.Parameter(torch.randn(kinds, count, intermediate_size, key_rank) * 0.02)
        self.key_up = nn.Parameter(torch.zeros(kinds, count, key_rank, intermediate_size))
        self.value_down = nn.Parameter(torch.randn(count, hidden_size, value_rank) / hidden_size**0.5)
        self.value_up = nn.Parameter(torch.zeros(count, value_rank, hidden_size))
        self.match_weight = nn.Parameter(torch.full((count,), 20.0 / count))
        self.decision_weight = nn.Parameter(torch.full((count,), 20.0 / count))
        self.decision_threshold = nn.Parameter(torch.tensor(5.0))

    def keys(self, readings: Sequence[ToolReading]) -> tuple[Tensor, Tensor]:
        """Keys of all pieces (memory layers, pieces, intermediate size), and the kind of each (pieces,)."""
        x = torch.cat([reading.activations for reading in readings], dim=1).to(self.scale)
        kinds = _kinds(readings).to(x.device)
        keys = torch.zeros_like(x)
        for kind in PieceKind:
            chosen = (kinds == kind).nonzero()[:, 0]
            if len(chosen):
                keys = keys.index_copy(1, chosen, self._keys_of(kind, x[:, chosen]))
        return keys, kinds

    def _keys_of(self, kind: PieceKind, x: Tensor) -> Tensor:
        centred = x - self.background[kind][:, None]
        centred = centred - torch.bmm(torch.bmm(centred, self.common), self.common.transpose(1, 2))
        mapped = centred + torch.bmm(torch.bmm(centred, self.key_down[kind]), self.key_up[kind])
        return F.normalize(_less_mean(kind, mapped), dim=-1)

    @torch.no_grad()
    def set_background(self, readings: Sequence[ToolReading], activations: Tensor) -> None:
        """Set background and common directions from data, which is how training starts.

        readings: of some dozens of tools.
        activations: inputs of `down_proj` at the tokens of ordinary steps, with shape
            (memory layers, tokens, intermediate size).
        """
        kinds = _kinds(readings)
        x = torch.cat([reading.activations for reading in readings], dim=1).to(self.scale)
        for kind in PieceKind:
            if (kinds == kind).any():
                self.background[kind] = x[:, kinds == kind].mean(dim=1)
        for layer, rows in enumerate(activations.to(self.scale)):
            _, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
            self.common[layer] = vectors[:, -self.common.shape[-1] :]

    def forward(self, readings: Sequence[ToolReading]) -> dict[tuple[int, str], tuple[Tensor, Tensor]]:
        """The pieces of a registry as LoRA entries of `down_proj`: A (pieces, intermediate), B (hidden, pieces)."""
        keys, kinds = self.keys(readings)
        directions = torch.cat([reading.directions for reading in readings]).to(self.scale)
        e = torch.zeros_like(directions)
        for kind in PieceKind:
            e[kinds == kind] = _less_mean(kind, directions[None, kinds == kind])[0]
        # Where all tools go on with the same token, rounding errors are left, which must not become directions.
        length = torch.maximum(e.norm(dim=-1), _SMALLEST_PART * directions.norm(dim=-1)).clamp(min=1e-12)
        e = (e / length[:, None]).expand(len(self.layers), -1, -1)
        values = e + torch.bmm(torch.bmm(e, self.value_down), self.value_up)
        inputs = kinds == PieceKind.INPUT
        shares = torch.where(inputs, 1 / inputs.sum().clamp(min=1), 1.0)
        values = values * (self.scale[kinds] * shares[:, None]).T[..., None]
        return {(layer, "down_proj"): (keys[n], values[n].T) for n, layer in enumerate(self.layers)}

    def match(self, readings: Sequence[ToolReading]) -> ToolMatch:
        """What requests are matched with by state, with gradients."""
        keys, kinds = self.keys(readings)
        backgrounds = [self.background[PieceKind.DECISION], self.background[PieceKind.NAME_START]]
        return ToolMatch(
            self.layers,
            decision_keys=keys[:, kinds == PieceKind.DECISION],
            name_keys=keys[:, kinds == PieceKind.NAME_START],
            backgrounds=torch.stack(backgrounds),
            weights=torch.stack([self.decision_weight, self.match_weight]),
            threshold=self.decision_threshold,
        )


def _kinds(readings: Sequence[ToolReading]) -> Tensor:
    return torch.cat([reading.kinds for reading in readings])


def _less_mean(kind: PieceKind, x: Tensor) -> Tensor:
    """x (layers, pieces, width) less the mean over the pieces, where the kind asks for it; a single one stays as is."""
    return x - x.mean(dim=1, keepdim=True) if kind in _CENTRED and x.shape[1] > 1 else x
