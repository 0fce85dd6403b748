"""What all runs that train a head have in common: how they begin, what they read with, and what they leave behind."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import PreTrainedModel

from loragen_agents.adapter.lora_weights import LoRAWeights
from loragen_agents.data.records import DataSet, load_data
from loragen_agents.errors import DataError
from loragen_agents.generator import GeneratorConfig, LoRAGenerator
from loragen_agents.models.clone import clone_sharing_tensors
from loragen_agents.models.language_models import LanguageModel, load_cloud_model, load_language_model
from loragen_agents.support.files import replacing
from loragen_agents.training.head_recipe import HeadRunRecipe

logger = logging.getLogger(__name__)


def data_of(recipe: HeadRunRecipe, data: DataSet | None) -> DataSet:
    """The data that is given, else that of the recipe's folders.

    Raises:
        DataError: neither is there, or a folder is damaged.
    """
    if data is None and not recipe.data:
        raise DataError("the recipe names no data: give folders with --data (see `loragen-agents data build`)")
    return data or load_data(*recipe.data)


def load_generator(recipe: HeadRunRecipe) -> LoRAGenerator:
    """The generator that gets the head, with its models.

    Raises:
        ModelLoadError: a model can't be had.
        CheckpointError: the generator is damaged or for another model.
    """
    edge = load_language_model(recipe.edge, dtype=recipe.dtype)
    cloud = load_cloud_model(recipe.cloud, edge, dtype=recipe.dtype)
    return LoRAGenerator.load(recipe.start_from, cloud, edge)


def with_new_head(source: LoRAGenerator, head: str, settings: Mapping[str, int]) -> LoRAGenerator:
    """The same generator with a new head in the place of the one it may have.

    Args:
        source: the generator.
        head: its attribute that holds the head.
        settings: of the head, as `GeneratorConfig` has them.

    Raises:
        DataError: the head wants more layers than the edge LM has.
    """
    config = GeneratorConfig.from_dict({**asdict(source.config), **settings})
    try:
        made = LoRAGenerator(config, source.cloud, source.edge)
    except ValueError as error:
        raise DataError(f"the recipe's head can't be made: {error}") from error
    own = made.own_tensors()
    with torch.no_grad():
        for name, tensor in source.own_tensors().items():
            if not name.startswith(f"{head}."):
                own[name].copy_(tensor)
    made.notes = dict(source.notes)
    return made


def merged_copy(edge: LanguageModel, beside: LoRAWeights) -> PreTrainedModel:
    """The edge LM with weights merged, which cost nothing then; the edge LM itself stays as it is."""
    model = clone_sharing_tensors(edge.model)
    beside.merge_into(model)
    return model


def reading_digest(rows: Sequence[object], layers: Sequence[int], edge: LanguageModel, beside: LoRAWeights) -> str:
    """SHA-256 of all that a reading of token rows depends on."""
    digest = hashlib.sha256(json.dumps([rows, list(layers), edge.fingerprint]).encode())
    for a, b in beside.tensors.values():
        digest.update(a.float().cpu().numpy().tobytes() + b.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def save_run(generator: LoRAGenerator, folder: Path, note: str, requests: int, scores: Mapping[str, float]) -> Path:
    """Write `folder/weights`, with the scores among the generator's notes, and `folder/scores.json`."""
    logger.info("scores: %s", json.dumps(scores))
    generator.notes = {**generator.notes, note: {"requests": requests, **scores}}
    generator.save(folder / "weights", dtype=torch.bfloat16)
    with replacing(folder / "scores.json") as temporary:
        temporary.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    return folder / "weights"
