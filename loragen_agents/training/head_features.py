"""Activations of the frozen edge LM for the head's texts, read once into a memory-mapped file; and a smaller space.

Reading takes most of a head's training; it can be stopped and goes on where it was. Knows texts and the edge LM; what
is learnt from the activations is `head_trainer`'s business.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from loragen_agents.adapter.lora_weights import LoRAWeights
from loragen_agents.conversation.prompts import PromptRenderer, Turn
from loragen_agents.generator.tool_head import PLACES, request_row
from loragen_agents.generator.tool_reading import captured_at
from loragen_agents.models.language_models import LanguageModel
from loragen_agents.support.progress import Progress
from loragen_agents.training.head_runs import merged_copy, reading_digest
from loragen_agents.training.kept_arrays import KeptArray

_BLOCK = 256


def read_features(
    folder: Path,
    edge: LanguageModel,
    beside: LoRAWeights,
    renderer: PromptRenderer,
    texts: Sequence[Turn],
    layers: Sequence[int],
    progress: Progress,
) -> np.ndarray:
    """Activations of all texts, float16, with shape (texts, places · layers, intermediate size), mapped from a file.

    Args:
        folder: where the file is kept; what an interrupted run has read of the same texts is not read again.
        edge: the edge LM, which stays as it is.
        beside: the expert weights that are in place.
    """
    rows = [request_row(renderer, turn) for turn in texts]
    width = edge.model.config.get_text_config().intermediate_size
    shape = (len(rows), PLACES * len(layers), width)
    kept = KeptArray(folder, "features", shape, reading_digest(rows, layers, edge, beside))
    model = merged_copy(edge, beside)
    for begin in range(kept.done, len(rows), _BLOCK):
        progress(f"Reading {len(rows)} texts", begin / len(rows))
        block = captured_at(model, layers, rows[begin : begin + _BLOCK])
        for offset, activations in enumerate(block):
            kept.array[begin + offset] = activations.transpose(0, 1).flatten(0, 1).half().cpu().numpy()
        kept.keep(min(begin + _BLOCK, len(rows)))
    return kept.array


@dataclass(frozen=True)
class Space:
    """The leading directions of the activations in each slot, and all texts in their coordinates.

    Attributes:
        means: (groups, slots, intermediate size); a text's group is its own kind.
        basis: (slots, intermediate size, k).
        coordinates: (texts, slots, k), float16, of normalised activations.
    """

    means: Tensor
    basis: Tensor
    coordinates: Tensor


def leading_space(features: np.ndarray, groups: Tensor, fit: Tensor, directions: int, progress: Progress) -> Space:
    """Centre each text by its group's mean, normalise, and keep the leading directions of all, slot by slot.

    Args:
        features: as `read_features` gives them.
        groups: the group of each text, from 0 up.
        fit: indices of the texts that means and directions are taken of.
        directions: how many are kept, at most.
    """
    texts, slots, width = features.shape
    kept, count = min(directions, width), int(groups.max()) + 1
    means = torch.zeros(count, slots, width)
    basis = torch.zeros(slots, width, kept)
    coordinates = torch.zeros(texts, slots, kept, dtype=torch.float16)
    for slot in range(slots):
        progress("Finding the leading directions", slot / slots)
        x = torch.from_numpy(np.ascontiguousarray(features[:, slot])).float()
        for group in range(count):
            own = fit[groups[fit] == group]
            if len(own):
                means[group, slot] = x[own].mean(dim=0)
        x = F.normalize(x - means[groups, slot], dim=-1)
        _, vectors = torch.linalg.eigh(x[fit].T @ x[fit])
        basis[slot] = vectors[:, -kept:].flip(-1)
        coordinates[:, slot] = (x @ basis[slot]).half()
    return Space(means, basis, coordinates)
