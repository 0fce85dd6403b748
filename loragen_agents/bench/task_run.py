"""A benchmark run from end to end: the variants that can run, the live table, the files, and what an interrupt leaves.

Brings the other parts together and decides nothing of its own: samples come from a `Task`, models from an engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from loragen_agents.bench import report
from loragen_agents.bench.display import LiveTable
from loragen_agents.bench.results import RunFolder, results_document, summarize
from loragen_agents.bench.runner import Engine, run_variants
from loragen_agents.bench.tasks import Task
from loragen_agents.bench.variants import Variant, check_variants
from loragen_agents.errors import DataError


class BenchEngine(Engine, Protocol):
    """An engine that also says what it would run."""

    def missing(self, variants: Sequence[Variant]) -> dict[str, str]:
        """Variant -> what to do, for variants whose weights are not there."""

    def describe(self, variants: Sequence[Variant]) -> dict[str, Any]:
        """Models, weights and decoding settings: everything of the engine's that decides scores."""

    def shape(self, variant: Variant) -> tuple[int, int]:
        """Bytes of the variant's weights, and of its KV cache a token."""

    def output_tokens(self, texts: Sequence[str]) -> list[int]:
        """Lengths of continuations in tokens."""


def runnable_variants(engine: BenchEngine, variants: Sequence[Variant]) -> tuple[list[Variant], dict[str, str]]:
    """The variants that have their weights, and what to do for the others, by name.

    Raises:
        DataError: none has.
    """
    missing = engine.missing(variants)
    runnable = [variant for variant in variants if variant.name not in missing]
    if not runnable:
        raise DataError(f"No variant can run: {'; '.join(f'{name}: {how}' for name, how in missing.items())}.")
    return runnable, missing


def run_task(
    task: Task, variants: Sequence[Variant], engine: BenchEngine, *, out: Path | None, resume: bool, command: str
) -> dict[str, Any]:
    """Run what can be run and give the results document; after Ctrl-C it holds what was scored until then.

    Raises:
        DataError: a variant can't do what the task asks for, none has weights, or `out` can't take the run.
    """
    check_variants(variants, choice_only=task.choice_only)
    runnable, missing = runnable_variants(engine, variants)
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
        # Variants are compared at the median length of what they should have written.
        "equal_tokens": lengths[len(lengths) // 2],
    }
    folder = RunFolder(out, header, resume=resume)
    names, total = [variant.name for variant in variants], len(runnable) * len(task.samples)
    table = LiveTable(task.title, task.metrics, names, missing, folder.records, total=total)
    with folder.recording() as outcome, table:
        run_variants(task, runnable, engine, folder, table)
    summary = summarize(
        [(variant.name, variant.title) for variant in runnable],
        folder.records,
        list(task.metrics),
        {variant.name: engine.shape(variant) for variant in runnable},
        header["equal_tokens"],
    )
    results = results_document(folder.header, summary, missing=missing, complete=outcome.complete, command=command)
    folder.write_results(results)
    if out is not None:
        report.write_report(out, results)
    return results
