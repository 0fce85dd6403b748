"""`bench compare A B`: two results side by side, sample by sample, with a paired bootstrap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loragen_agents.bench.report import Cells
from loragen_agents.bench.results import Record, read_records, read_results
from loragen_agents.bench.statistics import Difference, paired_differences
from loragen_agents.errors import DataError


@dataclass(frozen=True)
class Comparison:
    """One variant of A against one of B.

    Attributes:
        samples: how many samples both scored; only they count.
        a, b: means over these samples, in [0, 1].
        differences: B - A.
    """

    variant_a: str
    variant_b: str
    samples: int
    a: Mapping[str, float]
    b: Mapping[str, float]
    differences: Mapping[str, Difference]


def compare(a: Path, b: Path, *, variant_a: str | None = None, variant_b: str | None = None) -> list[Comparison]:
    """Compare two run folders, variant by variant of the same name, or one variant of each where both are named.

    Raises:
        DataError: a folder holds no run, the runs are of different tasks or data, or they share no variant or sample.
    """
    documents = [read_results(folder) for folder in (a, b)]
    tasks = [document["task"]["name"] for document in documents]
    if tasks[0] != tasks[1]:
        raise DataError(f"{a} is a run of {tasks[0]} and {b} one of {tasks[1]}; these can't be paired.")
    records = [_by_variant(folder) for folder in (a, b)]
    if (variant_a is None) != (variant_b is None):
        variant_a = variant_b = variant_a or variant_b
    pairs = (
        [(variant_a, variant_b)]
        if variant_a and variant_b
        else [(variant, variant) for variant in records[0] if variant in records[1]]
    )
    for folder, found, variant in ((a, records[0], variant_a), (b, records[1], variant_b)):
        if variant is not None and variant not in found:
            raise DataError(f"{folder} has no variant {variant!r}; it has {', '.join(found)}.")
    if not pairs:
        raise DataError(f"{a} and {b} share no variant; name one of each with --variant-a and --variant-b.")
    return [_compare(records[0][one], records[1][two], one, two) for one, two in pairs]


def comparison_table(comparisons: Sequence[Comparison], metrics: Mapping[str, str]) -> tuple[list[str], Cells]:
    """Headings and cells: A, B, difference in points with its interval, and p."""
    headings = ["Variant", "Rate", "A", "B", "B - A", "95% interval", "p", "n"]
    cells = []
    for comparison in comparisons:
        name = comparison.variant_a
        if comparison.variant_b != comparison.variant_a:
            name = f"{comparison.variant_a} / {comparison.variant_b}"
        for metric, heading in metrics.items():
            if metric not in comparison.differences:
                continue
            difference = comparison.differences[metric]
            cells.append(
                [
                    name,
                    heading,
                    f"{100 * comparison.a[metric]:.1f}",
                    f"{100 * comparison.b[metric]:.1f}",
                    f"{100 * difference.value:+.1f}",
                    f"{100 * difference.low:+.1f} to {100 * difference.high:+.1f}",
                    f"{difference.p:.3f}",
                    str(difference.n),
                ]
            )
    return headings, cells


def _by_variant(folder: Path) -> dict[str, dict[str, Record]]:
    variants: dict[str, dict[str, Record]] = {}
    for record in read_records(folder / "predictions.jsonl", cut_off=True):
        variants.setdefault(record["variant"], {})[record["id"]] = record
    return variants


def _compare(a: Mapping[str, Record], b: Mapping[str, Record], variant_a: str, variant_b: str) -> Comparison:
    shared = [sample_id for sample_id in a if sample_id in b]
    for sample_id in shared:
        if any(a[sample_id].get(key) != b[sample_id].get(key) for key in ("request", "gold")):
            raise DataError(f"Sample {sample_id!r} differs on the other side: these runs were drawn differently.")
    if not shared:
        raise DataError(f"Variants {variant_a!r} and {variant_b!r} share no sample; nothing can be paired.")
    metrics = sorted({metric for sample_id in shared for metric in a[sample_id]["scores"]})
    columns: list[dict[str, list[float]]] = [{}, {}]
    for metric in metrics:
        # A metric applies to a sample or not, by its gold text: the same samples on both sides.
        ids = [sample_id for sample_id in shared if metric in a[sample_id]["scores"]]
        for column, side in zip(columns, (a, b), strict=True):
            column[metric] = [side[sample_id]["scores"][metric] for sample_id in ids]
    one, two = ({metric: sum(values) / len(values) for metric, values in column.items()} for column in columns)
    return Comparison(variant_a, variant_b, len(shared), one, two, paired_differences(*columns))
