"""Specialisations on disk: one PEFT folder each, with a manifest that says it is whole. Damaged ones are removed.

Several processes may use the same cache folder. What the weights mean, and when they are made, is `specialize`'s
business.
"""

import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from contextlib import suppress
from pathlib import Path

from loragen_agents.adapter.lora_weights import LoRAWeights
from loragen_agents.adapter.tool_match import ToolMatch
from loragen_agents.errors import CheckpointError
from loragen_agents.models.language_models import LanguageModel, gated_ffn_layers

logger = logging.getLogger(__name__)

# Most bytes of all folders together; LORAGEN_AGENTS_CACHE_BYTES sets another number.
DEFAULT_BYTES = 2 * 10**9
BYTES_VARIABLE = "LORAGEN_AGENTS_CACHE_BYTES"
# Writing a folder takes a second; a temporary one this old has lost its writer.
_ABANDONED_SECONDS = 3600
_MANIFEST = "specialization.json"
_FILES = ("adapter_config.json", "adapter_model.safetensors")
_MATCH = "tool_match.safetensors"


def read(folder: Path) -> tuple[LoRAWeights, ToolMatch | None] | None:
    """What is kept in `folder`; None when there is nothing or what is there is damaged (it is removed then)."""
    try:
        if not folder.is_dir():
            return None
        hashes = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["sha256"]
        for name in (*_FILES, *([_MATCH] if _MATCH in hashes else [])):
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != hashes[name]:
                raise CheckpointError(f"{folder / name} has changed since it was written")
        weights = LoRAWeights.load_peft(folder)
        match = ToolMatch.load(folder / _MATCH) if _MATCH in hashes else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("The kept specialisation %s is damaged (%s); it is made again.", folder, error)
        _remove(folder)
        return None
    with suppress(OSError):
        folder.touch()  # the least recently used folders go first
    return weights, match


def write(folder: Path, weights: LoRAWeights, match: ToolMatch | None, edge: LanguageModel) -> None:
    """Write the whole folder under a temporary name, then rename it: a reader sees all of it or nothing."""
    if not weights.tensors:
        return  # nothing to keep, and PEFT has no way to write it
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        weights.save_peft(temporary, edge.name, [path for path, _ in gated_ffn_layers(edge.model)])
        files = list(_FILES)
        if match is not None:
            match.save(temporary / _MATCH)
            files.append(_MATCH)
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
