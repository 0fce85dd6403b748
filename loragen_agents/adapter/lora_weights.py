"""LoRA weights for the gated FFNs of a causal LM: a plain value that holds matrices and nothing else.

How a model takes them on is in `merging` and `unmerged`, how they are written and read in `peft_files`. Where the
matrices come from, and what they are good for, is not this module's business.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loragen_agents.models.language_models import PROJECTIONS

if TYPE_CHECKING:
    from loragen_agents.adapter.merging import Merged

Entry = tuple[int, str]


@dataclass(frozen=True, eq=False)
class LoRAWeights:
    """Low-rank updates of FFN matrices: W + (alpha / rank) · B·A (paper Eq. 1, in PEFT's names and shapes).

    Attributes:
        layers: number of layers of the model that these weights are for.
        rank, alpha: give the scaling alpha / rank, which is the same for all entries.
        tensors: (layer, projection) -> (A with shape (r, in), B with shape (out, r)). A matrix without an entry is not
            changed. An entry's own r may differ from `rank`; its scaling stays alpha / rank.

    Raises:
        ValueError: an entry names no layer or projection of a gated FFN, or its A and B do not fit each other.
    """

    layers: int
    rank: int
    alpha: float
    tensors: Mapping[Entry, tuple[Tensor, Tensor]] = field(repr=False)

    def __post_init__(self) -> None:
        if self.layers < 1 or self.rank < 1:
            raise ValueError(f"LoRA weights need at least one layer and rank 1, got {self.layers} and {self.rank}")
        for (layer, projection), (a, b) in self.tensors.items():
            if not 0 <= layer < self.layers or projection not in PROJECTIONS:
                raise ValueError(
                    f"no entry ({layer}, {projection!r}) is possible: expected a layer below {self.layers} and one of "
                    f"{', '.join(PROJECTIONS)}"
                )
            if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
                raise ValueError(
                    f"A {tuple(a.shape)} and B {tuple(b.shape)} of ({layer}, {projection!r}) do not fit: expected "
                    "(r, in) and (out, r)"
                )

    @property
    def scaling(self) -> float:
        """The factor alpha / rank before every product B·A."""
        return self.alpha / self.rank

    @property
    def entries(self) -> list[Entry]:
        """The (layer, projection) pairs with an entry, by layer and then in the order of `PROJECTIONS`."""
        return sorted(self.tensors, key=lambda entry: (entry[0], PROJECTIONS.index(entry[1])))

    def update(self, layer: int, projection: str) -> Tensor:
        """The update (alpha / rank) · B·A of one matrix, with shape (out, in), in float32.

        Raises:
            KeyError: there is no entry for this matrix.
        """
        a, b = self.tensors[layer, projection]
        return self.scaling * (b.float() @ a.float())

    def concatenate(self, other: "LoRAWeights") -> "LoRAWeights":
        """The weights whose updates are the sums of both, at the cost of adding up the ranks.

        `rank` and `alpha` stay those of `self`; where the other's scaling differs, its B carries the ratio.

        Raises:
            ValueError: the two are for models of different depth or width.
        """
        if other.layers != self.layers:
            raise ValueError(f"weights for {self.layers} layers can't be joined with weights for {other.layers}")
        ratio = other.scaling / self.scaling
        tensors = dict(self.tensors)
        for entry, (a, b) in other.tensors.items():
            scaled = b if ratio == 1 else b * ratio
            if entry not in tensors:
                tensors[entry] = (a, scaled)
                continue
            own_a, own_b = tensors[entry]
            if own_a.shape[1] != a.shape[1] or own_b.shape[0] != b.shape[0]:
                raise ValueError(
                    f"entry {entry} updates a matrix of {own_b.shape[0]} x {own_a.shape[1]} in one and of "
                    f"{b.shape[0]} x {a.shape[1]} in the other"
                )
            tensors[entry] = (
                torch.cat([own_a, a.to(own_a)]),
                torch.cat([own_b, scaled.to(own_b)], dim=1),
            )
        return replace(self, tensors=tensors)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "LoRAWeights":
        """The same weights on another device or in another dtype."""
        return self._map(lambda tensor: tensor.to(device=device, dtype=dtype))

    def detach(self) -> "LoRAWeights":
        """The same weights without their history of gradients."""
        return self._map(Tensor.detach)

    def _map(self, function: Any) -> "LoRAWeights":
        return replace(self, tensors={entry: (function(a), function(b)) for entry, (a, b) in self.tensors.items()})

    # The three ways in and out are written down beside this value; each module imports it, so they are imported late.

    def merge_into(self, model: PreTrainedModel) -> "Merged":
        """Put W + (alpha / rank) · B·A in the place of every W that changes, see `merging.merge`."""
        from loragen_agents.adapter.merging import merge

        return merge(self, model)

    def save_peft(self, folder: str | Path, base_model_name: str, module_paths: Sequence[str]) -> Path:
        """Write a folder that `peft.PeftModel.from_pretrained` takes, see `peft_files.save_peft`."""
        from loragen_agents.adapter.peft_files import save_peft

        return save_peft(self, folder, base_model_name, module_paths)

    @staticmethod
    def load_peft(folder: str | Path, layers: int | None = None) -> "LoRAWeights":
        """Read a PEFT folder of plain LoRA on FFN matrices, see `peft_files.load_peft`."""
        from loragen_agents.adapter.peft_files import load_peft

        return load_peft(folder, layers)
