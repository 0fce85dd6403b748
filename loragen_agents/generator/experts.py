"""What turns gates or meta-token states into LoRA matrices: the pool of experts (paper Eq. 8) and the direct variant.

Both give a `LayerMatrices`. Neither knows a language model; they get its sizes as `FFNShape`.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from loragen_agents.errors import ModelLoadError
from loragen_agents.models.language_models import PROJECTIONS, gated_ffn_layers

# projection -> (A with shape (registries, layers, r, in), B with shape (registries, layers, out, r))
LayerMatrices = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class FFNShape:
    """Sizes of the edge LM's gated FFNs: number of layers, width of the residual stream, width inside the FFN."""

    layers: int
    hidden: int
    intermediate: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> "FFNShape":
        """Read the sizes off a model.

        Raises:
            ModelLoadError: the model has no gated FFN, or its layers differ in width.
        """
        layers = gated_ffn_layers(model)
        shapes = {tuple(getattr(mlp, projection).weight.shape) for _, mlp in layers for projection in PROJECTIONS[:2]}
        if len(shapes) != 1:
            raise ModelLoadError(
                f"the FFN layers of {type(model).__name__} differ in shape ({sorted(shapes)}); experts need one shape "
                "for all layers"
            )
        ((intermediate, hidden),) = shapes
        return cls(len(layers), hidden, intermediate)

    def of_projection(self, projection: str) -> tuple[int, int]:
        """(in, out) of gate_proj, up_proj or down_proj."""
        wide = (self.hidden, self.intermediate)
        return wide if projection != "down_proj" else wide[::-1]


class ExpertPool(nn.Module):
    """n experts, each a LoRA block for gate, up and down; θ = Σ_j G_j E_j over A and B (paper Eq. 8).

    A and B are combined each for itself, so the rank of the result is that of one expert. B starts at zero, and with
    it every update; A starts as PEFT starts it (uniform, variance 1 / (3 in)).

    Args:
        per_layer: every layer has n experts of its own; otherwise all layers draw from the same n.
    """

    def __init__(self, shape: FFNShape, experts: int, rank: int, *, per_layer: bool = False) -> None:
        super().__init__()
        pools = (shape.layers,) if per_layer else ()
        self.per_layer = per_layer
        self.a, self.b = nn.ParameterDict(), nn.ParameterDict()
        for projection in PROJECTIONS:
            size_in, size_out = shape.of_projection(projection)
            bound = 1 / math.sqrt(size_in)
            self.a[projection] = nn.Parameter(torch.empty(*pools, experts, rank, size_in).uniform_(-bound, bound))
            self.b[projection] = nn.Parameter(torch.zeros(*pools, experts, size_out, rank))

    def forward(self, gates: Tensor) -> LayerMatrices:
        """The matrices of each registry and layer.

        Args:
            gates: shape (registries, layers, n), as Eq. 6 gives them.
        """
        equation = "rln,lnxy->rlxy" if self.per_layer else "rln,nxy->rlxy"
        return {
            projection: (
                torch.einsum(equation, gates, self.a[projection]),
                torch.einsum(equation, gates, self.b[projection]),
            )
            for projection in PROJECTIONS
        }


class DirectProjection(nn.Module):
    """A feed-forward net from a meta-token state straight to the layer's LoRA matrices ("Direct" of paper Table 9).

    θ = V·SiLU(U·T + u) + v, the same net for all layers; θ holds A and B of gate, up and down, 3 x r x (in + out)
    numbers. The rows of V and v that give B start at zero, and with them every update.

    Args:
        hidden: width of a meta-token state.
        width: width between U and V.
    """

    def __init__(self, hidden: int, width: int, shape: FFNShape, rank: int) -> None:
        super().__init__()
        self.shape, self.rank = shape, rank
        self.inner = nn.Linear(hidden, width)
        self.a, self.b = nn.ModuleDict(), nn.ModuleDict()
        for projection in PROJECTIONS:
            size_in, size_out = shape.of_projection(projection)
            a, b = nn.Linear(width, rank * size_in), nn.Linear(width, size_out * rank)
            bound = 1 / math.sqrt(size_in)
            # A is that of plain LoRA at first; what the state adds to it starts an order of magnitude lower.
            nn.init.uniform_(a.bias, -bound, bound)
            nn.init.uniform_(a.weight, -0.1 * bound, 0.1 * bound)
            nn.init.zeros_(b.weight)
            nn.init.zeros_(b.bias)
            self.a[projection], self.b[projection] = a, b

    def forward(self, states: Tensor) -> LayerMatrices:
        """The matrices of each registry and layer.

        Args:
            states: shape (registries, layers, hidden).
        """
        inner = F.silu(self.inner(states))
        matrices: LayerMatrices = {}
        for projection in PROJECTIONS:
            size_in, size_out = self.shape.of_projection(projection)
            a = self.a[projection](inner).unflatten(-1, (self.rank, size_in))
            b = self.b[projection](inner).unflatten(-1, (size_out, self.rank))
            matrices[projection] = (a, b)
        return matrices
