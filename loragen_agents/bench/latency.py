"""`bench latency`: time to the first token and for a turn against the number of tools in the registry.

Times what the variants cost as registries grow; what is written does not matter here. Knows nothing of models: an
`Engine` runs the variants.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from loragen_agents.bench import plots
from loragen_agents.bench.costs import TurnCost, variant_cost
from loragen_agents.bench.report import Cells, markdown_table, missing_lines
from loragen_agents.bench.results import RunFolder, library_versions, machine
from loragen_agents.bench.runner import Engine
from loragen_agents.bench.task_run import BenchEngine, runnable_variants
from loragen_agents.bench.variants import CACHED_REFERENCE, REFERENCE, Variant
from loragen_agents.conversation.prompts import Turn
from loragen_agents.errors import DataError
from loragen_agents.registry import Tool, ToolRegistry
from loragen_agents.support.files import replacing

TOOL_COUNTS = (1, 2, 4, 8, 16, 32, 64)
# With the tool chosen, which is the default of the chat model, and without, which is all that an exported adapter does.
LATENCY_VARIANTS = ("lora-gen+match", "lora-gen", REFERENCE, CACHED_REFERENCE)
# Ordinary requests of different lengths; which tool serves them is of no interest here.
REQUESTS = (
    "What time is it in Lisbon?",
    "Read the file notes/meeting.txt and tell me who has to call the supplier.",
    "How much is 18.5 percent of 2,430?",
    "Make the photo image/harbour.png brighter, it was taken late in the evening.",
    "Remind me to water the plants on Friday.",
    "Which words stand on the sign in image/street.png?",
)


@dataclass(frozen=True)
class Point:
    """One variant at one registry size; medians over the requests, in milliseconds and tokens (see `VariantCost`)."""

    variant: str
    tools: int
    prompt_tokens: float
    first_token_ms: float
    turn_ms: float
    setup_ms: float | None


def tool_pool(registries: Sequence[ToolRegistry], size: int) -> list[Tool]:
    """`size` tools out of several registries; where they have fewer, tools come again under a numbered name.

    Raises:
        DataError: the registries hold no tool.
    """
    tools = [tool for registry in registries for tool in registry]
    if not tools:
        raise DataError("The registries for the latency run hold no tools; name one with tools.")
    pool: dict[str, Tool] = {}
    turn = 1
    while len(pool) < size:
        for tool in tools:
            name = tool.name if turn == 1 else f"{tool.name} {turn}"
            pool.setdefault(name, tool.model_copy(update={"name": name}))
        turn += 1
    return list(pool.values())[:size]


def measure(
    engine: Engine,
    variants: Sequence[Variant],
    pool: Sequence[Tool],
    *,
    counts: Sequence[int] = TOOL_COUNTS,
    repeats: int = 5,
    turn_tokens: int = 32,
    done: Collection[tuple[str, int]] = (),
    progress: Callable[[str, float], None] | None = None,
) -> Iterator[Point]:
    """Time every variant at every registry size.

    Args:
        repeats: turns timed for a point, after one that warms up.
        turn_tokens: output length for which a turn's time is given.
        done: (variant, tools) of points that are there already.

    Raises:
        DataError: the pool has fewer tools than the largest count.
    """
    if max(counts) > len(pool):
        raise DataError(f"{max(counts)} tools were asked for, but there are {len(pool)}; give a larger registry.")
    places = [(count, variant) for count in counts for variant in variants if (variant.name, count) not in done]
    # A point takes about as long as its registry is large, and then what every point takes.
    total = sum(_weight(count) for count, _ in places)
    finished = 0
    for count, variant in places:
        if progress:
            progress(f"{variant.name}, {count} tools", finished / total)
        session = engine.open(variant, ToolRegistry(pool[:count]), "")
        turns: list[TurnCost] = []
        for repeat in range(repeats + 1):
            request = REQUESTS[repeat % len(REQUESTS)]
            turns.append(session.write([Turn(request)]).cost)
        setup = [session.setup_seconds] if session.setup_seconds is not None else []
        cost = variant_cost(
            turns, setup, model_bytes=0, kv_bytes=0, equal_tokens=turn_tokens, reference_prompt_tokens=None
        )
        finished += _weight(count)
        if cost is None or cost.first_token_ms is None or cost.equal_turn_ms is None:
            raise DataError(f"Variant {variant.name}: the model wrote one token at most, so a turn can't be timed.")
        yield Point(
            variant.name,
            count,
            cost.prompt_tokens,
            cost.first_token_ms.median,
            cost.equal_turn_ms,
            cost.setup_ms.median if cost.setup_ms else None,
        )


def _weight(count: int) -> int:
    return 8 + count


def run_latency(
    engine: BenchEngine,
    variants: Sequence[Variant],
    pool: Sequence[Tool],
    *,
    counts: Sequence[int],
    repeats: int,
    turn_tokens: int,
    out: Path | None,
    resume: bool,
    command: str,
    progress: Callable[[str, float], None] | None = None,
) -> dict[str, Any]:
    """Time what is not in `out` yet and give the results document; after Ctrl-C it holds what was timed until then.

    `out` gets a line for every point as it is done (`points.jsonl`), and `results.json`, `report.md` and plots at the
    end.

    Raises:
        DataError: no variant has weights, the pool is too small, or `out` can't take the run (see `RunFolder`).
    """
    runnable, missing = runnable_variants(engine, variants)
    header = {
        "task": {"name": "latency", "tools": ToolRegistry(pool).fingerprint},
        "counts": list(counts),
        "repeats": repeats,
        "turn_tokens": turn_tokens,
        **engine.describe(runnable),
        "versions": library_versions(),
        "machine": machine(),
    }
    names = frozenset(field.name for field in fields(Point))
    folder = RunFolder(out, header, resume=resume, file="points.jsonl", fields=names)
    done = {(record["variant"], record["tools"]) for record in folder.records}
    with folder.recording() as outcome:
        for point in measure(
            engine,
            runnable,
            pool,
            counts=counts,
            repeats=repeats,
            turn_tokens=turn_tokens,
            done=done,
            progress=progress,
        ):
            folder.add(asdict(point))
    results = {
        "command": command,
        "complete": outcome.complete,
        **folder.header,
        "missing_variants": missing,
        "points": folder.records,
    }
    folder.write_results(results)
    if out is not None:
        _write_report(out, results)
    return results


def points_of(results: Mapping[str, Any]) -> list[Point]:
    """The points of a results document."""
    return [Point(**record) for record in results["points"]]


def _write_report(folder: Path, results: Mapping[str, Any]) -> None:
    points, turn_tokens = points_of(results), results["turn_tokens"]
    drawn = draw(points, turn_tokens, folder)
    lines = [
        "# Latency against the number of tools",
        "",
        f"Command: `{results['command']}`",
        "",
        *missing_lines(results),
        *markdown_table(*latency_table(points, turn_tokens)),
        "",
        *(f"![{path.name}]({path.name})" for path in drawn),
    ]
    with replacing(folder / "report.md") as temporary:
        temporary.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def latency_table(points: Sequence[Point], turn_tokens: int) -> tuple[list[str], Cells]:
    """Headings and cells, ordered by variant and number of tools."""
    headings = [
        "Variant",
        "Tools",
        "Prompt tokens",
        "First token, ms",
        f"Turn of {turn_tokens} tokens, ms",
        "Set-up, ms",
    ]
    cells = [
        [
            point.variant,
            str(point.tools),
            f"{point.prompt_tokens:.0f}",
            f"{point.first_token_ms:.0f}",
            f"{point.turn_ms:.0f}",
            f"{point.setup_ms:.0f}" if point.setup_ms is not None else "-",
        ]
        for point in sorted(points, key=lambda point: (point.variant, point.tools))
    ]
    return headings, cells


def draw(points: Sequence[Point], turn_tokens: int, folder: Path) -> list[Path]:
    """Plots of both times over the number of tools; empty without matplotlib."""
    drawn = []
    for key, label in (("first_token_ms", "ms to the first token"), ("turn_ms", f"ms for {turn_tokens} tokens")):
        series: dict[str, list[tuple[int, float]]] = {}
        for point in points:
            series.setdefault(point.variant, []).append((point.tools, getattr(point, key)))
        path = plots.latency_lines(series, label, "Latency against the number of tools", folder / f"latency_{key}.png")
        drawn += [path] if path else []
    return drawn
