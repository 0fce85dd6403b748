"""`bench gpt4tools`: GPT4Tools-mini, or a user's own GPT4Tools file, as a task.

Turns samples into the benchmark's form. Scoring is `gpt4tools_score`, the shipped samples are `data.gpt4tools_mini`,
the file format is `data.gpt4tools_files`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from loragen_agents.bench import gpt4tools_score as gpt4tools
from loragen_agents.bench.tasks import BenchSample, Task, Written
from loragen_agents.conversation.prompts import THOUGHT_QUESTION
from loragen_agents.conversation.react import Step
from loragen_agents.data.gpt4tools_files import GPT4ToolsSample, read_gpt4tools
from loragen_agents.data.gpt4tools_mini import MiniPart, MiniSample, mini_samples
from loragen_agents.data.gpt4tools_mini_rows import Tools, mini_registry, mini_turns
from loragen_agents.errors import DataError
from loragen_agents.registry import Tool, ToolRegistry

METRICS: dict[str, str] = {**gpt4tools.RATES, "average": "Average"}


def mini_task(parts: Sequence[MiniPart] = ("unseen",), *, tools: Tools = "own", limit: int | None = None) -> Task:
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
    return Task("gpt4tools", title, METRICS, samples, score_sample, settings)


def score_sample(sample: BenchSample, written: Written, steps: Sequence[Step]) -> dict[str, float]:
    """GPT4Tools' five rates and their average for what was written after the thought question."""
    result = gpt4tools.score(sample.gold, THOUGHT_QUESTION + written.text)
    return {**asdict(result), "average": result.average}


def _first(part: MiniPart, limit: int | None) -> Sequence[MiniSample]:
    _check_limit(limit)
    return mini_samples(part)[:limit]


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise DataError(f"A limit of {limit} samples leaves nothing to score; give 1 or more.")


def _mini_sample(sample: MiniSample, part: MiniPart, registry: ToolRegistry) -> BenchSample:
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
    return Task("gpt4tools", title, METRICS, samples, score_sample, settings)


def _spread(rows: Sequence[GPT4ToolsSample], limit: int | None) -> Sequence[GPT4ToolsSample]:
    _check_limit(limit)
    if limit is None or limit >= len(rows):
        return rows
    return [rows[place * len(rows) // limit] for place in range(limit)]


def _file_kind(row: GPT4ToolsSample) -> str:
    if row.turns[-1].steps:
        return "context" if row.due else "finished"
    return "positive" if row.due else "negative"
