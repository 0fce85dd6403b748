"""Associative tool memory: a registry written into `down_proj` as rank-one updates `v kᵀ`, some for each tool.

Routed experts carry format and task; the updates carry the registry itself, as fast weights and linear associative
memories do. A tool is read once: its description stands in the place of a user's request, and the edge LM runs over the
step that calls it. At some places of the step the registry decides which token is next. The FFN activation at such a
place gives the key of an update; its value is the direction that raises the logit of that token. A request that means
what the description says has similar activations at the same places, so the update raises the same token there.

Updates of different tools depend on each other only by a common mean that is subtracted, so that a registry grows or
shrinks by a tool without reading the others again. This module holds what is learnt; how keys and values become weights
is in `adapter.tool_updates`. It knows nothing of tokenizers, prompts or registries (see `tool_reading`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loragen_agents.adapter.lora_weights import Entry
from loragen_agents.adapter.tool_match import ToolMatch
from loragen_agents.adapter.tool_updates import MappedUpdates, UpdateKind, ValueMaps


@dataclass(frozen=True)
class ToolReading:
    """What was read of one tool.

    Attributes:
        activations: inputs of `down_proj` in the memory's layers at the place of each update, with shape (memory
            layers, updates, intermediate size).
        directions: what raises the logit of the token that is next there, with shape (updates, hidden size).
        kinds: an `UpdateKind` for each update, with shape (updates,); each tool has one DECISION, NAME_START, INPUT and
            OWN_INPUT.
    """

    activations: Tensor
    directions: Tensor
    kinds: Tensor


class ToolMemory(nn.Module):
    """Turns readings of tools into rank-one updates of `down_proj`, with a few learnt maps.

    In layer l, an update of kind κ with activation x has the key k = norm(c + U_κl D_κl c). Here c is x less a learnt
    background and less its part in the directions that FFN activations commonly have; for names, arguments and
    OWN_INPUT, the mean of the registry's updates of the same kind is subtracted before norm. The value is
    v = e + V_l W_l e, where e is the update's direction, centred in the same way and normalised. `down_proj` gets
    s_κl v kᵀ; the INPUT updates of all tools answer to the same activations, so they share one s.

    Args:
        layers: the edge layers that hold updates, in order.
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
        kinds, count = len(UpdateKind), len(layers)
        self.layers = tuple(layers)
        self.scale = nn.Parameter(torch.full((kinds, count), initial_scale))
        self.background = nn.Parameter(torch.zeros(kinds, count, intermediate_size))
        # An update that answered to what all activations share would change every token, not only its own place.
        self.register_buffer("common", torch.zeros(count, intermediate_size, common_rank))
        self.key_down = nn.Parameter(torch.randn(kinds, count, intermediate_size, key_rank) * 0.02)
        self.key_up = nn.Parameter(torch.zeros(kinds, count, key_rank, intermediate_size))
        self.value_down = nn.Parameter(torch.randn(count, hidden_size, value_rank) / hidden_size**0.5)
        self.value_up = nn.Parameter(torch.zeros(count, value_rank, hidden_size))
        self.match_weight = nn.Parameter(torch.full((count,), 20.0 / count))
        self.decision_weight = nn.Parameter(torch.full((count,), 20.0 / count))
        self.decision_threshold = nn.Parameter(torch.tensor(5.0))

    @property
    def value_maps(self) -> ValueMaps:
        """The maps of values, with gradients."""
        return ValueMaps(self.layers, self.scale, self.value_down, self.value_up)

    def mapped(self, readings: Sequence[ToolReading]) -> MappedUpdates:
        """What is made of each reading alone: c + U_κl D_κl c for each activation."""
        x = torch.cat([reading.activations for reading in readings], dim=1).to(self.scale)
        kinds = _kinds(readings).to(x.device)
        keys = torch.zeros_like(x)
        for kind in UpdateKind:
            chosen = (kinds == kind).nonzero()[:, 0]
            if len(chosen):
                keys = keys.index_copy(1, chosen, self._mapped(kind, x[:, chosen]))
        return MappedUpdates(keys, torch.cat([reading.directions for reading in readings]).to(self.scale), kinds)

    def _mapped(self, kind: UpdateKind, x: Tensor) -> Tensor:
        centred = x - self.background[kind][:, None]
        centred = centred - torch.bmm(torch.bmm(centred, self.common), self.common.transpose(1, 2))
        return centred + torch.bmm(torch.bmm(centred, self.key_down[kind]), self.key_up[kind])

    @torch.no_grad()
    def set_background(self, readings: Sequence[ToolReading], activations: Tensor) -> None:
        """Set background and common directions from data, which is how training starts.

        Args:
            readings: of some dozens of tools.
            activations: inputs of `down_proj` at the tokens of ordinary steps, with shape (memory layers, tokens,
                intermediate size).
        """
        kinds = _kinds(readings)
        x = torch.cat([reading.activations for reading in readings], dim=1).to(self.scale)
        for kind in UpdateKind:
            if (kinds == kind).any():
                self.background[kind] = x[:, kinds == kind].mean(dim=1)
        for layer, rows in enumerate(activations.to(self.scale)):
            _, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
            self.common[layer] = vectors[:, -self.common.shape[-1] :]

    def forward(self, readings: Sequence[ToolReading]) -> dict[Entry, tuple[Tensor, Tensor]]:
        """The updates of a registry as LoRA entries of `down_proj`: A (updates, intermediate), B (hidden, updates)."""
        return self.mapped(readings).entries(self.value_maps)

    def match(self, readings: Sequence[ToolReading]) -> ToolMatch:
        """The match of requests that training adds as a loss, with gradients."""
        mapped = self.mapped(readings)
        keys, kinds = mapped.unit_keys(), mapped.kinds
        backgrounds = [self.background[UpdateKind.DECISION], self.background[UpdateKind.NAME_START]]
        return ToolMatch(
            self.layers,
            decision_keys=keys[:, kinds == UpdateKind.DECISION],
            name_keys=keys[:, kinds == UpdateKind.NAME_START],
            backgrounds=torch.stack(backgrounds),
            weights=torch.stack([self.decision_weight, self.match_weight]),
            threshold=self.decision_threshold,
        )


def _kinds(readings: Sequence[ToolReading]) -> Tensor:
    return torch.cat([reading.kinds for reading in readings])
