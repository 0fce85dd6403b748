"""GPT4Tools-mini as conversations with their registry, and as rows of a GPT4Tools file.

Knows the samples and the file format; nothing of models and of scoring.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Literal

from loragen_agents.conversation.prompts import TakenStep, Turn
from loragen_agents.data.gpt4tools_files import GPT4ToolsSample, taken_steps, write_gpt4tools
from loragen_agents.data.gpt4tools_mini import MiniPart, MiniSample, mini_samples
from loragen_agents.registry import ToolRegistry
from loragen_agents.support.content import content_folder

Tools = Literal["own", "all"]

_RECEIVED = "Received."


@lru_cache
def mini_registry(part: MiniPart, tools: Tools = "own") -> ToolRegistry:
    """The registry that goes with a part of GPT4Tools-mini."""
    own, other = ("unseen", "seen") if part == "unseen" else ("seen", "unseen")
    registry = ToolRegistry.from_yaml(content_folder("tools") / f"gpt4tools_{own}.yaml")
    if tools == "own":
        return registry
    rest = ToolRegistry.from_yaml(content_folder("tools") / f"gpt4tools_{other}.yaml")
    # One order for both parts, so that they share one registry.
    both = (registry, rest) if own == "seen" else (rest, registry)
    return ToolRegistry([tool for one in both for tool in one], input_format="csv")


def mini_turns(sample: MiniSample) -> tuple[Turn, ...]:
    """The sample's conversation: the picture's description, if any, then the open request with its steps."""
    opening = (Turn(sample.opening, (), _RECEIVED),) if sample.opening else ()
    steps = tuple(TakenStep(step.action, step.action_input, step.observation) for step in sample.steps)
    return (*opening, Turn(sample.request, steps))


def mini_rows(part: MiniPart) -> list[GPT4ToolsSample]:
    """A part of GPT4Tools-mini as rows of a GPT4Tools file."""
    registry = mini_registry(part)
    return [
        GPT4ToolsSample(sample.id, registry, mini_turns(sample), sample.output, taken_steps(sample.output))
        for sample in mini_samples(part)
    ]


def write_mini(part: MiniPart, folder: Path) -> tuple[Path, int]:
    """Write a part of GPT4Tools-mini as a file in GPT4Tools' format; gives its path and the number of samples."""
    path = folder / f"gpt4tools_mini_{part}.json"
    rows = mini_rows(part)
    write_gpt4tools(rows, path)
    return path, len(rows)
