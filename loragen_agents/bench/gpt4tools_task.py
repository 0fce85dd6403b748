"""`bench gpt4tools`: GPT4Tools-mini, or a user's own GPT4Tools file, as a task.

Brings samples into the benchmark's form and hands them GPT4Tools' score. Scoring itself is `gpt4tools`, the shipped
samples are `gpt4tools_mini`, the file format is `training.gpt4tools`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Literal

from loragen_agents.bench import gpt4tools
from loragen_agents.bench.gpt4tools_mini import MiniSample, Part, mini_samples
from loragen_agents.bench.tasks import BenchSample, Task
from loragen_agents.content import content_folder
from loragen_agents.errors import DataError
from loragen_agents.prompting import THOUGHT_QUESTION, TakenStep, Turn
from loragen_agents.react import Step
from loragen_agents.registry import ToolRegistry

Tools = Literal["own", "all"]

METRICS: dict[str, str] = {**gpt4tools.RATES, "average": "Average"}
_RECEIVED = "Received."


def mini_task(parts: Sequence[Part] = ("unseen",), *, tools: Tools = "own", limit: int | None = None) -> Task:
    """GPT4Tools-mini as a task.

    Args:
        parts: "unseen", "seen" or both.
        tools: "own" (the part's own 8 or 21 tools in the registry) or "all" (29, as long as the paper's prompt).
        limit: the first so many samples of each part; they are dealt out evenly over tools and kinds.
    """
    samples = [
        _mini_sample(sample, part, mini_registry(part, tools)) for part in parts for sample in _first(part, limit)
    ]
    settings = {"data": "GPT4Tools-mini", "parts": list(parts), "tools": tools, "limit": limit}
    title = f"GPT4Tools-mini, {' and '.join(parts)} tools"
    return Task("gpt4tools", title, METRICS, "average", samples, score_sample, settings)


@lru_cache
def mini_registry(part: Part, tools: Tools = "own") -> ToolRegistry:
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


def score_sample(sample: BenchSample, generated: str, step: Step) -> dict[str, float]:
    """GPT4Tools' five rates and their average for what was written after the thought question."""
    result = gpt4tools.score(sample.gold, THOUGHT_QUESTION + generated)
    return {**asdict(result), "average": result.average}


def _first(part: Part, limit: int | None) -> Sequence[MiniSample]:
    samples = mini_samples(part)
    if limit is not None and limit < 1:
        raise DataError(f"A limit of {limit} samples leaves nothing to score; give 1 or more.")
    return samples[:limit]


def _mini_sample(sample: MiniSample, part: Part, registry: ToolRegistry) -> BenchSample:
    return BenchSample(sample.id, part, sample.kind, registry, mini_turns(sample), sample.output)


def file_task(paths: Sequence[Path], *, limit: int | None = None) -> Task:
    """GPT4Tools' own files as a task; each file is a source of its own.

    Raises:
        DataError: a file is missing, damaged or cut off; the message names the row.
    """
    raise NotImplementedError
