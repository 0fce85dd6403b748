"""`bench latency`: time to the first token and for a turn against the number of tools in the registry.

Times what the rows of the table cost as registries grow; what is written does not matter here. Knows nothing of models:
an `Engine` runs the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loragen_agents.bench import plots
from loragen_agents.bench.costs import TurnCost, row_cost
from loragen_agents.bench.report import Cells
from loragen_agents.bench.rows import CACHED_REFERENCE, REFERENCE, Row
from loragen_agents.bench.runner import Engine
from loragen_agents.errors import DataError
from loragen_agents.prompting import Turn
from loragen_agents.registry import Tool, ToolRegistry

TOOL_COUNTS = (1, 2, 4, 8, 16, 32, 64)
# With the tool chosen, which is the default of the chat model, and without, which is all that an exported adapter does.
LATENCY_ROWS = ("lora-gen+match", "lora-gen", REFERENCE, CACHED_REFERENCE)
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
    """One row at one registry size; medians over the requests, in milliseconds and tokens (see `RowCost`)."""

    row: str
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
    rows: Sequence[Row],
    pool: Sequence[Tool],
    *,
    counts: Sequence[int] = TOOL_COUNTS,
    repeats: int = 5,
    turn_tokens: int = 32,
    progress: Callable[[str, float], None] | None = None,
) -> Iterator[Point]:
    """Time every row at every registry size.

    Args:
        repeats: turns timed for a point, after one that warms up.
        turn_tokens: output length for which a turn's time is given.

    Raises:
        DataError: the pool has fewer tools than the largest count.
    """
    if max(counts) > len(pool):
        raise DataError(f"{max(counts)} tools were asked for, but there are {len(pool)}; give a larger registry.")
    total, finished = len(counts) * len(rows), 0
    for count in counts:
        registry = ToolRegistry(pool[:count])
        for row in rows:
            if progress:
                progress(f"{row.name}, {count} tools", finished / total)
            session = engine.open(row, registry, "")
            turns: list[TurnCost] = []
            for repeat in range(repeats + 1):
                request = REQUESTS[repeat % len(REQUESTS)]
                turns.append(session.write([Turn(request)]).cost)
            setup = [session.setup_seconds] if session.setup_seconds is not None else []
            cost = row_cost(
                turns, setup, model_bytes=0, kv_bytes=0, equal_tokens=turn_tokens, reference_prompt_tokens=None
            )
            finished += 1
            if cost is None or cost.first_token_ms is None or cost.equal_turn_ms is None:
                raise DataError(f"Row {row.name}: the model wrote one token at most, so a turn can't be timed.")
            yield Point(
                row.name,
                count,
                cost.prompt_tokens,
                cost.first_token_ms.median,
                cost.equal_turn_ms,
                cost.setup_ms.median if cost.setup_ms else None,
            )


def latency_table(points: Sequence[Point], turn_tokens: int) -> tuple[list[str], Cells]:
    """Headings and cells, ordered by row and number of tools."""
    headings = ["Row", "Tools", "Prompt tokens", "First token, ms", f"Turn of {turn_tokens} tokens, ms", "Set-up, ms"]
    cells = [
        [
            point.row,
            str(point.tools),
            f"{point.prompt_tokens:.0f}",
            f"{point.first_token_ms:.0f}",
            f"{point.turn_ms:.0f}",
            f"{point.setup_ms:.0f}" if point.setup_ms is not None else "-",
        ]
        for point in sorted(points, key=lambda point: (point.row, point.tools))
    ]
    return headings, cells


def draw(points: Sequence[Point], turn_tokens: int, folder: Path) -> list[Path]:
    """Plots of both times over the number of tools; empty without matplotlib."""
    drawn = []
    for key, label in (("first_token_ms", "ms to the first token"), ("turn_ms", f"ms for {turn_tokens} tokens")):
        series: dict[str, list[tuple[int, float]]] = {}
        for point in points:
            series.setdefault(point.row, []).append((point.tools, getattr(point, key)))
        path = plots.latency_lines(series, label, "Latency against the number of tools", folder / f"latency_{key}.png")
        drawn += [path] if path else []
    return drawn


def plain_points(points: Sequence[Point]) -> list[Mapping[str, Any]]:
    """The points as JSON values."""
    return [asdict(point) for point in points]
