"""Associative tool memory: a registry written into `down_proj` as rank-one pieces `v kᵀ`, some for each tool.

Where routed experts carry format and task, the pieces carry the registry itself, as fast weights and linear
associative memories do. A tool is read once: its description stands in the place of a user's request, the edge LM runs
up to `Action:` and on through the tool's name, and the FFN activations at the places where a token of the name has to
come out become keys; the value of a piece is the direction that raises that token's logit. A request that means what
the description says has similar activations at `Action:`, so the pieces answer with the name.

Pieces of different tools do not depend on each other but for a common mean that is taken off, so that a registry grows
or shrinks by a tool without reading the others again. This module knows how keys and values become weights; it knows
nothing of tokenizers, prompts or registries (see `tool_reading`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FIRST, LATER = 0, 1


@dataclass(frozen=True)
class ToolReading:
    """What was read of one tool.

    activations: inputs of `down_proj` in the memory's layers where a token of the name comes next, with shape
        (memory layers, pieces, intermediate size); piece 0 stands at `Action:`.
    token_ids: the tokens that come next, with shape (pieces,): the name's, and the one that ends it.
    """

    activations: Tensor
    token_ids: Tensor


class ToolMemory(nn.Module):
    """Turns readings of tools into rank-one updates of `down_proj`, with a few learnt maps.

    Of a layer l and a piece p with activation x and token w, the key is k = norm(c + U_l D_l c). Here c is x less a
    learnt background and less its part in the directions that FFN activations commonly have; before norm, the mean of
    the registry's pieces of the same kind is taken off. The value is v = e + V_l W_l e, where e is the token's row of
    the unembedding times the final norm's gain, centred and normalised in the same way. The update of `down_proj` is
    s_l v kᵀ. First tokens of names and later ones are two kinds, with their own background and scale s.

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
        count = len(layers)
        self.layers = tuple(layers)
        self.scale = nn.Parameter(torch.full((2, count), initial_scale))
        self.background = nn.Parameter(torch.zeros(2, count, intermediate_size))
        # Pieces that answered to what all activations share would fire at every token, not at names alone.
        self.register_buffer("common", torch.zeros(count, intermediate_size, common_rank))
        self.key_down = nn.Parameter(torch.randn(count, intermediate_size, key_rank) * 0.02)
        self.key_up = nn.Parameter(torch.zeros(count, key_rank, intermediate_size))
        self.value_down = nn.Parameter(torch.randn(count, hidden_size, value_rank) / hidden_size**0.5)
        self.value_up = nn.Parameter(torch.zeros(count, value_rank, hidden_size))
        self.match_weight = nn.Parameter(torch.full((count,), 20.0 / count))

    def keys(self, readings: Sequence[ToolReading]) -> tuple[Tensor, Tensor]:
        """Keys of all pieces (memory layers, pieces, intermediate size), and the kind of each (pieces,)."""
        x = torch.cat([reading.activations for reading in readings], dim=1).to(self.scale)
        kinds = torch.cat([_kinds(reading) for reading in readings]).to(x.device)
        centred = x - self.background[kinds].transpose(0, 1)
        centred = centred - torch.bmm(torch.bmm(centred, self.common), self.common.transpose(1, 2))
        mapped = centred + torch.bmm(torch.bmm(centred, self.key_down), self.key_up)
        return F.normalize(_less_mean(mapped, kinds), dim=-1), kinds

    @torch.no_grad()
    def set_background(self, readings: Sequence[ToolReading], activations: Tensor) -> None:
        """Set background and common directions from data, which is how training starts.

        readings: of some dozens of tools.
        activations: inputs of `down_proj` at the tokens of ordinary steps, with shape
            (memory layers, tokens, intermediate size).
        """
        kinds = torch.cat([_kinds(reading) for reading in readings])
        x = torch.cat([reading.activations for reading in readings], dim=1).to(self.scale)
        for kind in (FIRST, LATER):
            self.background[kind] = x[:, kinds == kind].mean(dim=1)
        for layer, rows in enumerate(activations.to(self.scale)):
            _, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
            self.common[layer] = vectors[:, -self.common.shape[-1] :]

    def forward(
        self, readings: Sequence[ToolReading], directions: Tensor
    ) -> dict[tuple[int, str], tuple[Tensor, Tensor]]:
        """The pieces of a registry as LoRA entries of `down_proj`: A (pieces, intermediate), B (hidden, pieces).

        directions: the unembedding row times the final norm's gain of every piece's token, with shape
            (pieces, hidden size), in the order of `readings`.
        """
        keys, kinds = self.keys(readings)
        e = directions.to(self.scale)
        e = F.normalize(_less_mean(e[None], kinds), dim=-1).expand(len(self.layers), -1, -1)
        values = e + torch.bmm(torch.bmm(e, self.value_down), self.value_up)
        values = values * self.scale[kinds].T[..., None]
        return {(layer, "down_proj"): (keys[n], values[n].T) for n, layer in enumerate(self.layers)}

    def match(self, readings: Sequence[ToolReading], activations: Tensor) -> Tensor:
        """How well requests fit each tool, as logits over the registry with shape (requests, tools).

        activations: inputs of `down_proj` at the requests' own `Action:`, with shape
            (memory layers, requests, intermediate size).
        """
        keys, kinds = self.keys(readings)
        x = activations.to(self.scale) - self.background[FIRST][:, None]
        cosine = torch.einsum("lri,lti->lrt", F.normalize(x, dim=-1), keys[:, kinds == FIRST])
        return torch.einsum("l,lrt->rt", self.match_weight, cosine)


def _kinds(reading: ToolReading) -> Tensor:
    kinds = torch.full((len(reading.token_ids),), LATER)
    kinds[0] = FIRST
    return kinds


def _less_mean(x: Tensor, kinds: Tensor) -> Tensor:
    """x (layers, pieces, width) less the mean over the pieces of the same kind; a single piece stays as it is."""
    out = x
    for kind in (FIRST, LATER):
        chosen = kinds == kind
        if int(chosen.sum()) > 1:
            mean = x[:, chosen].mean(dim=1, keepdim=True)
            out = torch.where(chosen[None, :, None], out - mean, out)
    return out
