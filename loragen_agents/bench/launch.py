"""A benchmark run from end to end: the rows that can run, the live table, the files, and what an interrupt leaves.

Brings the other parts together and decides nothing of its own: samples come from a `Task`, models from an engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from loragen_agents.bench import report
from loragen_agents.bench.display import LiveTable
from loragen_agents.bench.results import RunFolder, results_document, summarize
from loragen_agents.bench.rows import Row, check_rows
from loragen_agents.bench.runner import Engine, run_rows
from loragen_agents.bench.tasks import Task
from loragen_agents.errors import DataError


class BenchEngine(Engine, Protocol):
    """An engine that also says what it would run."""

    def missing(self, rows: Sequence[Row]) -> dict[str, str]:
        """Row -> what to do, for rows whose weights are not there."""

    def describe(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Models, weights and decoding settings: everything of the engine's that decides scores."""

    def shape(self, row: Row) -> tuple[int, int]:
        """Bytes of the row's weights, and of its KV cache a token."""

    def output_tokens(self, texts: Sequence[str]) -> list[int]:
        """Lengths of continuations in tokens."""


def runnable_rows(engine: BenchEngine, rows: Sequence[Row]) -> tuple[list[Row], dict[str, str]]:
    """The rows that have their weights, and what to do for the others, by name.

    Raises:
        DataError: none has.
    """
    missing = engine.missing(rows)
    runnable = [row for row in rows if row.name not in missing]
    if not runnable:
        raise DataError(f"No row can run: {'; '.join(f'{name}: {how}' for name, how in missing.items())}.")
    return runnable, missing


def launch(
    task: Task, rows: Sequence[Row], engine: BenchEngine, *, out: Path | None, resume: bool, command: str
) -> dict[str, Any]:
    """Run what can be run and give the results document; after Ctrl-C it holds what was scored until then.

    Raises:
        DataError: a row can't do what the task asks for, none has weights, or `out` can't take the run (`RunFolder`).
    """
    check_rows(rows, choice_only=task.choice_only)
    runnable, missing = runnable_rows(engine, rows)
    lengths = sorted(engine.output_tokens([sample.gold for sample in task.samples]))
    header = {
        "task": {
            "name": task.name,
            "title": task.title,
            "metrics": dict(task.metrics),
            "fingerprint": task.fingerprint,
            "samples": len(task.samples),
            "settings": dict(task.settings),
        },
        **engine.describe(runnable),
        # Rows are compared at the median length of what they should have written.
        "equal_tokens": lengths[len(lengths) // 2],
    }
    folder = RunFolder(out, header, resume=resume)
    complete = False
    try:
        table = LiveTable(
            task.title,
            task.metrics,
            [row.name for row in rows],
            missing,
            folder.records,
            total=len(runnable) * len(task.samples),
        )
        with table, suppress(KeyboardInterrupt):
            run_rows(task, runnable, engine, folder, table)
            complete = True
    finally:
        folder.close()
    summary = summarize(
        [(row.name, row.title) for row in runnable],
        folder.records,
        list(task.metrics),
        {row.name: engine.shape(row) for row in runnable},
        header["equal_tokens"],
    )
    results = results_document(folder.header, summary, missing=missing, complete=complete, command=command)
    folder.write_results(results)
    if out is not None:
        report.write_report(out, results)
    return results
