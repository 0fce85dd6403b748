"""Low-rank updates of `down_proj` that run beside a model's weights and are never merged into them.

The same model serves requests with different updates at the same time: each request names its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from loragen_agents.adapter.lora_weights import LoRAWeights


@dataclass(frozen=True, eq=False)
class DownUpdates:
    """y = W·x + B·(A·x) in `down_proj` of some layers.

    Two values are the same updates only if they are the same object: what a model has read with one of them is never
    used with another.

    Attributes:
        tensors: layer -> (A with shape (r, intermediate size), B with shape (hidden size, r)).

    Raises:
        ValueError: an A and its B do not fit each other.
    """

    tensors: Mapping[int, tuple[Tensor, Tensor]] = field(repr=False)
    _kept: dict[tuple[torch.device, torch.dtype], Mapping[int, tuple[Tensor, Tensor]]] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        for layer, (a, b) in self.tensors.items():
            if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
                raise ValueError(
                    f"A {tuple(a.shape)} and B {tuple(b.shape)} of layer {layer} do not fit: expected "
                    "(r, intermediate size) and (hidden size, r)"
                )

    @classmethod
    def of(cls, weights: LoRAWeights) -> "DownUpdates":
        """LoRA weights that change `down_proj` alone, with their scaling in B.

        Raises:
            ValueError: the weights change other projections, too.
        """
        others = sorted({projection for _, projection in weights.tensors} - {"down_proj"})
        if others:
            raise ValueError(f"these LoRA weights change {', '.join(others)}; only down_proj can be updated unmerged")
        return cls({layer: (a, b * weights.scaling) for (layer, _), (a, b) in weights.tensors.items()})

    def on(self, device: torch.device, dtype: torch.dtype) -> Mapping[int, tuple[Tensor, Tensor]]:
        """The tensors on a device and in a dtype; converted once and then kept."""
        kept = self._kept.get((device, dtype))
        if kept is None:
            kept = {layer: (a.to(device, dtype), b.to(device, dtype)) for layer, (a, b) in self.tensors.items()}
            self._kept[device, dtype] = kept
        return kept
