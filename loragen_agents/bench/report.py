"""A run's results for people: the tables of the terminal and of `report.md`.

Everything is read from the results document (`results.json`), so that a report can be made again from the file. Knows
nothing of how the figures came about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from loragen_agents.support.console import visible
from loragen_agents.support.files import replacing

Cells = list[list[str]]

_NOTHING = "-"
# Columns of the cost table that stand in the report alone.
_KV, _PEAK, _TURN = "KV cache, MB", "Peak memory, MB", "Turn, ms (p95)"
_FULL_ONLY = (_KV, _PEAK, _TURN)


def quality_table(results: Mapping[str, Any]) -> tuple[list[str], Cells]:
    """Headings and cells of the scores, in percent, each with its 95% interval."""
    metrics: Mapping[str, str] = results["task"]["metrics"]
    headings = [results["task"].get("variants", "Variant"), *metrics.values(), "n"]
    cells = []
    for name, variant in results["variants"].items():
        values = [_percent(variant["metrics"].get(metric)) for metric in metrics]
        cells.append([f"{variant['title']} ({name})", *values, str(variant["scored"])])
    return headings, cells


def group_table(results: Mapping[str, Any], key: str) -> tuple[list[str], Cells] | None:
    """The same by `source` or `kind`, without intervals, and the mean over the groups; None where there is one only."""
    metrics: Mapping[str, str] = results["task"]["metrics"]
    groups = sorted({group for variant in results["variants"].values() for group in variant[f"by_{key}"]})
    if len(groups) < 2:
        return None
    cells = []
    for name, variant in results["variants"].items():
        found = variant[f"by_{key}"]
        for group in groups:
            if group in found:
                values = [found[group].get(metric) for metric in metrics]
                cells.append([name, group, *(f"{100 * v['value']:.1f}" if v else _NOTHING for v in values)])
        averages = []
        for metric in metrics:
            values = [found[group][metric]["value"] for group in found if metric in found[group]]
            averages.append(f"{100 * sum(values) / len(values):.1f}" if values else _NOTHING)
        cells.append([name, "mean of these", *averages])
    return ["Variant", key.capitalize(), *metrics.values()], cells


def cost_table(results: Mapping[str, Any]) -> tuple[list[str], Cells]:
    """Headings and cells of the costs."""
    equal = results["equal_tokens"]
    headings = [
        "Variant",
        "Prompt tokens",
        "Ratio",
        "First token, ms (p95)",
        _TURN,
        "Tokens/s",
        f"Turn of {equal} tokens, ms",
        _KV,
        _PEAK,
        "Set-up, ms",
        "Break-even, turns",
        "… against cached",
    ]
    cells = []
    for name, variant in results["variants"].items():
        cost = variant["cost"]
        if cost is None:
            continue
        cells.append(
            [
                name,
                _number(cost["prompt_tokens"], 0),
                f"{cost['compression']:.1f}x" if cost["compression"] else _NOTHING,
                _timing(cost["first_token_ms"]),
                _timing(cost["turn_ms"]),
                _number(cost["tokens_per_second"], 1),
                _number(cost["equal_turn_ms"], 0),
                _number(cost["kv_bytes"] / 1e6, 1),
                _number(cost["peak_bytes"] / 1e6 if cost["peak_bytes"] is not None else None, 0),
                _number(cost["setup_ms"]["median"] if cost["setup_ms"] else None, 0),
                _number(cost["break_even_turns"], 1),
                _number(cost["break_even_cached_turns"], 1),
            ]
        )
    return headings, cells


def render(results: Mapping[str, Any]) -> RenderableType:
    """A run's tables for the terminal: scores, and of the costs what fits beside them."""
    title = visible(results["task"]["title"])
    headings, cells = quality_table(results)
    names = list(results["variants"])
    parts: list[RenderableType] = [
        text_table(
            f"{title}, % with 95% intervals", headings, [[n, *row[1:]] for n, row in zip(names, cells, strict=True)]
        )
    ]
    if by_source := group_table(results, "source"):
        parts.append(text_table("By source, %", *by_source))
    headings, cells = cost_table(results)
    brief = [place for place, heading in enumerate(headings) if heading not in _FULL_ONLY]
    if cells:
        table = text_table(
            "Cost", [headings[place] for place in brief], [[row[place] for place in brief] for row in cells]
        )
        parts.append(table)
    parts += [
        Text(visible(f"{name}: {variant['title']}"), style="dim") for name, variant in results["variants"].items()
    ]
    parts += [Text(visible(line)) for line in missing_lines(results)]
    return Group(*parts)


def missing_lines(results: Mapping[str, Any]) -> list[str]:
    """A line for each variant that was asked for and has no weights yet."""
    return [f"{name}: no weights yet; {how}" for name, how in results["missing_variants"].items()]


def markdown(results: Mapping[str, Any], plots: Sequence[str] = ()) -> str:
    """`report.md`: settings, tables, plots."""
    task, models, machine = results["task"], results["models"], results["machine"]
    lines = [f"# {task['title']}", ""]
    if not results["complete"]:
        lines += ["**This run was stopped early; the figures are over what was scored until then.**", ""]
    lines += [
        f"Command: `{results['command']}`",
        "",
        f"Edge model {models['edge']['name']} ({models['edge']['fingerprint'][:12]}), "
        f"{machine['threads']} threads on {machine['processor']}"
        + (f", {machine['accelerator']}" if machine.get("accelerator") else "")
        + ".",
        "",
        "Scores in percent with 95% bootstrap intervals.",
        "",
        *markdown_table(*quality_table(results)),
    ]
    for line in missing_lines(results):
        lines.append(f"- {line}")
    if results["missing_variants"]:
        lines.append("")
    for key in ("source", "kind"):
        if table := group_table(results, key):
            lines += [f"## By {key}", "", *markdown_table(*table)]
    lines += _cost_lines(results)
    lines += [f"![{name}]({name})" for name in plots]
    return "\n".join(lines).rstrip() + "\n"


def _cost_lines(results: Mapping[str, Any]) -> list[str]:
    headings, cells = cost_table(results)
    if not cells:
        return []
    return [
        "## Cost",
        "",
        *markdown_table(headings, cells),
        f"A turn of {results['equal_tokens']} tokens: median time to the first token and {results['equal_tokens'] - 1} "
        "times the median time of a further one; variants write texts of different lengths, this compares them at one. "
        "Set-up is specialising, or reading the prefix into the cache. Break-even: turns after which specialising has "
        "paid for itself against the definitions in the prompt, plain and with a cached prefix. Peak memory is the "
        "weights and the most that a turn added.",
        "",
    ]


def write_report(folder: Path, results: Mapping[str, Any]) -> list[Path]:
    """Write `report.md` and, where matplotlib is installed, the plots; gives the paths written."""
    from loragen_agents.bench import plots

    drawn = plots.quality_bars(results, folder / "rates.png")
    names = [drawn.name] if drawn else []
    report = folder / "report.md"
    with replacing(report) as temporary:
        temporary.write_text(markdown(results, names), encoding="utf-8")
    return [report, *([drawn] if drawn else [])]


def text_table(title: str, headings: Sequence[str], cells: Cells) -> Table:
    """A table for the terminal; what stands in the cells is shown as it is, control characters as escapes."""
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    for number, heading in enumerate(headings):
        first = number == 0
        table.add_column(heading, justify="left" if first else "right", overflow="fold", no_wrap=first)
    for row in cells:
        # An interval stands under its mean, so that the table fits a terminal.
        table.add_row(*(Text(visible(cell).replace(" [", "\n[")) for cell in row))
    return table


def markdown_table(headings: Sequence[str], cells: Cells) -> list[str]:
    """The lines of a Markdown table, and an empty one."""

    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |"

    align = ["---", *["---:"] * (len(headings) - 1)]
    return [line(headings), line(align), *map(line, cells), ""]


def _percent(mean: Mapping[str, Any] | None) -> str:
    if mean is None or mean["value"] is None:
        return _NOTHING
    return f"{100 * mean['value']:.1f} [{100 * mean['low']:.1f}, {100 * mean['high']:.1f}]"


def _timing(timing: Mapping[str, float] | None) -> str:
    return f"{timing['median']:.0f} ({timing['p95']:.0f})" if timing else _NOTHING


def _number(value: float | str | None, digits: int) -> str:
    if value is None:
        return _NOTHING
    return value if isinstance(value, str) else f"{value:,.{digits}f}"
