"""From meta-token states to the gates of the experts: paper section 3.2, Eq. 3 to 7, and the load loss of Eq. 9.

Knows vectors only: neither which model the states come from nor what the experts do.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Router(nn.Module):
    """R = BN(f2(SiLU(f1(T)))) (Eq. 3), with f1 and f2 affine and BN over the batch of registries x layers.

    In training BN uses the statistics of the batch, in evaluation its running ones, so that the gates of a registry do
    not depend on what else is in the batch.

    Args:
        hidden: width of a meta-token state.
        width: width between f1 and f2.
        experts: number n of gates.
        layers: with a pool of experts for each layer, the number of layers, each of which gets its own f1 and f2; with
            one pool for all layers, None: one f1 and one f2.
    """

    def __init__(self, hidden: int, width: int, experts: int, layers: int | None = None) -> None:
        super().__init__()
        self.f1 = _LayerLinear(hidden, width, layers)
        self.f2 = _LayerLinear(width, experts, layers)
        self.norm = nn.BatchNorm1d(experts)

    def forward(self, states: Tensor) -> Tensor:
        """The router's output R with shape (registries, layers, n).

        Args:
            states: shape (registries, layers, hidden).

        Raises:
            ValueError: in training, the whole batch is a single state, whose variance is undefined.
        """
        routed = self.f2(F.silu(self.f1(states)))
        return self.norm(routed.flatten(0, 1)).view_as(routed)


class _LayerLinear(nn.Module):
    """An affine map of the last dimension of (registries, layers, in), the same or another one for each layer."""

    def __init__(self, size_in: int, size_out: int, layers: int | None) -> None:
        super().__init__()
        bound = 1 / math.sqrt(size_in)
        shape = (size_out, size_in) if layers is None else (layers, size_out, size_in)
        self.weight = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(shape[:-1]).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dim() == 2:
            return F.linear(x, self.weight, self.bias)
        return torch.einsum("rli,loi->rlo", x, self.weight) + self.bias


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Gates of Eq. 6 and 7: softmax over the experts, the k largest kept and divided by their sum, all others 0.

    Of equal values at the border exactly k are kept.

    Args:
        logits: router output R with shape (..., n).
        k: at least 1, at most n.

    Returns:
        Gates of the same shape that sum to 1.
    """
    probabilities = logits.softmax(-1)
    kept, index = probabilities.topk(k, dim=-1)
    return torch.zeros_like(probabilities).scatter(-1, index, kept / kept.sum(-1, keepdim=True))


def gumbel_top_k(logits: Tensor, k: int, *, noise: bool) -> Tensor:
    """As `keep_top_k`, after Gumbel(0, 1) noise on the logits (Eq. 4 and 5; "GumbelTop-K" of Table 8).

    Args:
        logits, k: as `keep_top_k`.
        noise: True in training; without it, as in evaluation, the result is that of `keep_top_k`.
    """
    if noise:
        # -log of an exponential variable is Gumbel(0, 1).
        logits = logits - torch.empty_like(logits).exponential_().log()
    return keep_top_k(logits, k)


def load_loss(gates: Tensor, coefficient: float, *, pools_per_layer: bool = False) -> Tensor:
    """Eq. 9: coefficient · (std(G) / mean(G))², with G the sum of each expert's gates within the batch.

    std is that of a whole population (no Bessel correction).

    Args:
        gates: shape (registries, layers, n).
        coefficient: alpha of Eq. 9.
        pools_per_layer: the experts of each layer are experts of their own, so there are layers x n loads and not n.
    """
    loads = gates.sum(0) if pools_per_layer else gates.sum((0, 1))
    return coefficient * (loads.std(correction=0) / loads.mean()) ** 2
