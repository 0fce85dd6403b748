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
from loragen_agents.registry import Tool, ToolRegistry
from loragen_agents.training.gpt4tools import GPT4ToolsSample, read_gpt4tools, taken_steps, write_gpt4tools

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


def mini_rows(part: Part) -> list[GPT4ToolsSample]:
    """A part of GPT4Tools-mini as rows of a GPT4Tools file."""
    registry = mini_registry(part)
    return [
        GPT4ToolsSample(sample.id, registry, mini_turns(sample), sample.output, taken_steps(sample.output))
        for sample in mini_samples(part)
    ]


def write_mini(part: Part, folder: Path) -> tuple[Path, int]:
    """Write a part of GPT4Tools-mini as a file in GPT4Tools' format; gives its path and the number of samples."""
    path = folder / f"gpt4tools_mini_{part}.json"
    rows = mini_rows(part)
    write_gpt4tools(rows, path)
    return path, len(rows)


def score_sample(sample: BenchSample, generated: str, step: Step) -> dict[str, float]:
    """GPT4Tools' five rates and their average for what was written after the thought question."""
    result = gpt4tools.score(sample.gold, THOUGHT_QUESTION + generated)
    return {**asdict(result), "average": result.average}


def _first(part: Part, limit: int | None) -> Sequence[MiniSample]:
    _check_limit(limit)
    return mini_samples(part)[:limit]


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise DataError(f"A limit of {limit} samples leaves nothing to score; give 1 or more.")


def _mini_sample(sample: MiniSample, part: Part, registry: ToolRegistry) -> BenchSample:
    return BenchSample(sample.id, part, sample.kind, registry, mini_turns(sample), sample.output)


def file_task(paths: Sequence[Path], *, tools: Tools = "own", limit: int | None = None) -> Task:
    """GPT4Tools' own files as a task; each file is a source of its own.

    Args:
        tools: "own" (the tools that each row's prompt lists) or "all" (every tool of the files, for every row).
        limit: so many samples of each file, spread evenly over it.

    Raises:
        DataError: a file is missing, damaged or cut off; the message names the row.
    """
    files = {path.stem: read_gpt4tools(path) for path in paths}
    if len(files) < len(paths):
        raise DataError("Two of the data files have the same name; results are kept by it, so rename one.")
    everything: dict[str, Tool] = {}
    for rows in files.values():
        for row in rows:
            for tool in row.registry:
                everything.setdefault(tool.name, tool)
    shared = ToolRegistry(everything.values(), input_format="csv")
    samples: list[BenchSample] = []
    for source, rows in files.items():
        drawn = [
            BenchSample(
                f"{source}/{row.id}",
                source,
                _file_kind(row),
                row.registry if tools == "own" else shared,
                row.turns,
                row.output,
                due=row.due,
            )
            for row in _spread(rows, limit)
        ]
        # Rows with the same tools one behind the other: a registry is specialised on once.
        places = {sample.registry.fingerprint: place for place, sample in reversed(list(enumerate(drawn)))}
        samples += sorted(drawn, key=lambda sample: places[sample.registry.fingerprint])
    settings = {"data": [str(path) for path in paths], "tools": tools, "limit": limit}
    title = f"GPT4Tools, {' and '.join(files)}"
    return Task("gpt4tools", title, METRICS, "average", samples, score_sample, settings)


def _spread(rows: Sequence[GPT4ToolsSample], limit: int | None) -> Sequence[GPT4ToolsSample]:
    _check_limit(limit)
    if limit is None or limit >= len(rows):
        return rows
    return [rows[place * len(rows) // limit] for place in range(limit)]


def _file_kind(row: GPT4ToolsSample) -> str:
    if row.turns[-1].steps:
        return "context" if row.due else "finished"
    return "positive" if row.due else "negative"
