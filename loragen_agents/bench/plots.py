"""Plots of results as PNG. matplotlib is an optional extra: without it nothing is drawn; `hint` says how to get it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loragen_agents.support.files import replacing

_COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860")


def hint() -> str | None:
    """How to get plots, where matplotlib is not installed."""
    return None if find_spec("matplotlib") else "No plots were drawn: pip install 'loragen-agents[plots]' adds them."


def quality_bars(results: Mapping[str, Any], path: Path) -> Path | None:
    """Bars of every metric per variant, with their intervals; None without matplotlib or without variants."""
    variants = results["variants"]
    if hint() or not variants:
        return None
    metrics: Mapping[str, str] = results["task"]["metrics"]
    figure, axes = _figure(max(7.0, 1.1 + 1.3 * len(variants)), 4.2)
    width = 0.8 / len(metrics)
    for number, (metric, heading) in enumerate(metrics.items()):
        found = [
            (place, variant["metrics"][metric])
            for place, variant in enumerate(variants.values())
            if metric in variant["metrics"]
        ]
        if not found:
            continue
        values = [100 * mean["value"] for _, mean in found]
        spread = [
            [max(0.0, 100 * (mean["value"] - mean["low"])) for _, mean in found],
            [max(0.0, 100 * (mean["high"] - mean["value"])) for _, mean in found],
        ]
        places = [place - 0.4 + width * (number + 0.5) for place, _ in found]
        colour = _COLOURS[number % len(_COLOURS)]
        axes.bar(places, values, width, label=heading, color=colour, yerr=spread, error_kw={"lw": 0.7})
    axes.set_xticks(range(len(variants)), [name.replace("+", "\n+ ") for name in variants], fontsize=8)
    axes.set_ylim(0, 105)
    axes.set_ylabel("%")
    axes.set_title(results["task"]["title"], fontsize=10)
    axes.legend(ncols=len(metrics), fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)
    return _save(figure, path)


def latency_lines(
    series: Mapping[str, Sequence[tuple[int, float]]], ylabel: str, title: str, path: Path
) -> Path | None:
    """One line a series over the number of tools, both axes logarithmic; None without matplotlib."""
    if hint():
        return None
    figure, axes = _figure(6.4, 4.0)
    for number, (name, points) in enumerate(series.items()):
        places, values = zip(*points, strict=True)
        axes.plot(places, values, marker="o", ms=4, label=name, color=_COLOURS[number % len(_COLOURS)])
    counts = sorted({count for points in series.values() for count, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xlabel("tools in the registry")
    axes.set_ylabel(ylabel)
    axes.set_title(title, fontsize=10)
    axes.grid(True, which="both", lw=0.3)
    axes.legend(fontsize=8)
    return _save(figure, path)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    # Figure without pyplot: no global state, no window system.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _save(figure: Any, path: Path) -> Path:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
    return path
