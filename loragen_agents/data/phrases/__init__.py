"""Phrase files of the training data: words, small talk, answers and tool results, read once each."""

import functools
from pathlib import Path
from typing import Any

import yaml


@functools.cache
def phrases(name: str) -> dict[str, Any]:
    """The decoded phrase file `name`.yaml of this folder; treat it as read-only."""
    with (Path(__file__).parent / f"{name}.yaml").open(encoding="utf-8") as file:
        return yaml.safe_load(file)
