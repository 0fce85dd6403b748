"""What the terminal shows while a run goes on: the table so far, a progress bar and the time left."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from types import TracebackType

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from loragen_agents.bench.results import Record
from loragen_agents.support.console import messages, visible


class LiveTable:
    """A context in which calls with a record update the table. Draws on stderr, and only on a terminal.

    Args:
        title, metrics: of the table; metrics are metric -> heading.
        variants: names of the table's lines.
        missing: variant -> what makes its weights; shown as "no weights yet".
        records: what an earlier part of the run scored.
        total: records of the whole run.
    """

    def __init__(
        self,
        title: str,
        metrics: Mapping[str, str],
        variants: Sequence[str],
        missing: Mapping[str, str],
        records: Sequence[Record],
        total: int,
    ) -> None:
        self._title, self._metrics, self._variants, self._missing = title, metrics, variants, missing
        self._scores: dict[tuple[str, str], list[float]] = defaultdict(list)
        self._first: dict[str, list[float]] = defaultdict(list)
        self._scored: dict[str, int] = defaultdict(int)
        for record in records:
            self._take(record)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=messages,
        )
        self._bar = self._progress.add_task("starting", total=total, completed=len(records))
        self._live = Live(console=messages, get_renderable=self._render, refresh_per_second=2, transient=True)

    def __call__(self, record: Record) -> None:
        self._take(record)
        self._progress.update(self._bar, advance=1, description=visible(record["variant"]))

    def __enter__(self) -> LiveTable:
        if messages.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def _take(self, record: Record) -> None:
        variant = record["variant"]
        self._scored[variant] += 1
        self._first[variant].append(record["cost"]["first_token_seconds"])
        for metric, value in record["scores"].items():
            self._scores[variant, metric].append(value)

    def _render(self) -> Group:
        table = Table(title=visible(self._title), title_justify="left", show_edge=False, pad_edge=False)
        table.add_column("Variant")
        for heading in (*self._metrics.values(), "n", "first token, ms"):
            table.add_column(heading, justify="right")
        for variant in self._variants:
            if variant in self._missing:
                table.add_row(Text(variant, style="dim"), Text("no weights yet", style="dim"))
                continue
            cells = [self._scores[variant, metric] for metric in self._metrics]
            first = self._first[variant]
            table.add_row(
                variant,
                *(f"{100 * fmean(values):.1f}" if values else "" for values in cells),
                str(self._scored[variant]),
                f"{1000 * median(first):.0f}" if first else "",
            )
        return Group(table, self._progress)
