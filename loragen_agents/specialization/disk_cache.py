"""Specialisations on disk: a folder each, with a manifest that says it is whole. Damaged ones are removed.

A folder holds the vectors of a registry's tools, weights as a PEFT folder, or both: the parts that take time to make.
Several processes may use the same cache folder. `specialize` decides what is kept, and makes it.
"""

import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from loragen_agents.adapter.lora_weights import LoRAWeights
from loragen_agents.errors import CheckpointError
from loragen_agents.models.language_models import LanguageModel, gated_ffn_layers
from loragen_agents.support.files import open_to_others

logger = logging.getLogger(__name__)

# Most bytes of all folders together; LORAGEN_AGENTS_CACHE_BYTES sets another number.
DEFAULT_BYTES = 2 * 10**9
BYTES_VARIABLE = "LORAGEN_AGENTS_CACHE_BYTES"
# Writing a folder takes a second; a temporary one this old has lost its writer.
_ABANDONED_SECONDS = 3600
_MANIFEST = "specialization.json"
_FILES = ("adapter_config.json", "adapter_model.safetensors")
_VECTORS = "tool_vectors.safetensors"


@dataclass(frozen=True)
class Kept:
    """What is kept of a specialisation.

    Attributes:
        weights: where they depend on the registry or its definitions, else None.
        vectors: of the registry's tools, with shape (tools, width); None for a generator without a tool head.
    """

    weights: LoRAWeights | None
    vectors: Tensor | None


def read(folder: Path) -> Kept | None:
    """What is kept in `folder`; None when there is nothing or what is there is damaged (it is removed then)."""
    try:
        if not folder.is_dir():
            return None
        hashes = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["sha256"]
        for name in hashes:
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != hashes[name]:
                raise CheckpointError(f"{folder / name} has changed since it was written")
        weights = LoRAWeights.load_peft(folder) if _FILES[0] in hashes else None
        vectors = load_file(folder / _VECTORS)["vectors"].float() if _VECTORS in hashes else None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("The kept specialisation %s is damaged (%s); it is made again.", folder, error)
        _remove(folder)
        return None
    with suppress(OSError):
        folder.touch()  # the least recently used folders go first
    return Kept(weights, vectors)


def write(folder: Path, kept: Kept, edge: LanguageModel) -> None:
    """Write the whole folder under a temporary name, then rename it: a reader sees all of it or nothing."""
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    files: list[str] = []
    try:
        temporary.mkdir(parents=True)
        if kept.weights is not None and kept.weights.tensors:  # PEFT has no way to write an adapter without entries
            kept.weights.save_peft(temporary, edge.name, [path for path, _ in gated_ffn_layers(edge.model)])
            files += _FILES
        if kept.vectors is not None:
            save_file({"vectors": kept.vectors.to(torch.float16).cpu().contiguous()}, temporary / _VECTORS)
            open_to_others(temporary / _VECTORS)
            files.append(_VECTORS)
        if not files:
            return
        hashes = {name: hashlib.sha256((temporary / name).read_bytes()).hexdigest() for name in files}
        (temporary / _MANIFEST).write_text(json.dumps({"sha256": hashes}, indent=2) + "\n", encoding="utf-8")
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
            # Another process wrote the same folder meanwhile; what it holds is the same.
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _prune(folder.parent)


def most_bytes() -> int:
    """How many bytes all folders together may have: $LORAGEN_AGENTS_CACHE_BYTES, or 2 GB."""
    text = os.environ.get(BYTES_VARIABLE, "").strip()
    if not text:
        return DEFAULT_BYTES
    try:
        return int(text)
    except ValueError:
        logger.warning("%s is %r; expected a whole number. %d is taken.", BYTES_VARIABLE, text, DEFAULT_BYTES)
        return DEFAULT_BYTES


def _prune(parent: Path) -> None:
    """Remove the least recently used folders beyond `most_bytes`, and what a killed process left half-written."""
    found: list[tuple[float, int, Path]] = []
    for path in parent.iterdir():
        with suppress(OSError):  # another process may remove it at the same time
            size = sum(file.stat().st_size for file in path.iterdir())
            found.append((path.stat().st_mtime, size, path))
    left = most_bytes()
    for age, size, path in sorted(found, reverse=True):
        if path.name.startswith("."):
            if age < time.time() - _ABANDONED_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
            continue
        left -= size
        if left < 0:
            _remove(path)


def _remove(folder: Path) -> None:
    """Remove a folder, in one rename as far as others can see."""
    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    with suppress(OSError):
        folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
