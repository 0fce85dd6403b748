"""Where the weights of each variant are by default, and the command that makes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from loragen_agents.bench.variants import BASES, Weights
from loragen_agents.errors import DataError

# Task -> base -> (folder that the recipe writes, recipe under training/).
_RECIPES: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "gpt4tools": {
        "lora-definitions": ("runs/gpt4tools_lora_definitions/weights", "gpt4tools_lora_definitions"),
        "lora": ("runs/gpt4tools_lora/weights", "gpt4tools_lora"),
        "lora-gen-trained": ("runs/gpt4tools_lora_gen/weights", "gpt4tools_lora_gen"),
    },
    "calls": {
        "lora-definitions": ("runs/lora_definitions/weights", "lora_definitions"),
        "lora": ("runs/lora/weights", "lora"),
    },
}
_DEFAULT_CHECKPOINT = Weights("default")


def weights_of_task(task: str, given: Sequence[str] = ()) -> dict[str, Weights]:
    """Base -> its weights, for every base that has any.

    Args:
        given: `BASE=FOLDER` of the command line, in place of the defaults.

    Raises:
        DataError: a given one is not of this form, or names a base that takes no weights.
    """
    found = {base: Weights(folder, f"loragen-agents train {name}") for base, (folder, name) in _recipes(task).items()}
    found["lora-gen"] = _DEFAULT_CHECKPOINT
    for text in given:
        base, equals, folder = text.partition("=")
        takers = [name for name, base in BASES.items() if base.source in ("peft", "generator")]
        if not equals or base not in takers or not folder:
            raise DataError(f"--weights {text!r}: expected VARIANT=FOLDER with a variant of {', '.join(takers)}.")
        if folder != "default" and not Path(folder).is_dir():
            raise DataError(f"--weights {text!r}: there is no folder {folder}.")
        found[base] = Weights(folder)
    return found


def _recipes(task: str) -> Mapping[str, tuple[str, str]]:
    return _RECIPES.get(task, {})
