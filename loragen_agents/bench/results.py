"""What a run leaves behind: one line a prediction as it goes, and a summary of all of them.

`RunFolder` keeps the records and `results.json`; a run that was cut off goes on from the lines that are there.
`summarize` turns records into the summary. Knows nothing of models; a record is a plain dict.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from loragen_agents.bench.costs import TurnCost, VariantCost, break_even_turns, variant_cost
from loragen_agents.bench.statistics import Mean, means
from loragen_agents.bench.variants import CACHED_REFERENCE, REFERENCE
from loragen_agents.errors import DataError
from loragen_agents.support.files import replacing

Record = dict[str, Any]
_FORMAT = 2
_FIELDS = frozenset({"variant", "id", "scores", "cost"})
_PACKAGES = ("loragen-agents", "torch", "transformers", "peft", "llguidance", "tokenizers", "safetensors", "numpy")


@dataclass
class Outcome:
    """Whether a run came to its end; False after Ctrl-C."""

    complete: bool = False


class RunFolder:
    """The folder of one run.

    Args:
        path: where the records and `results.json` go; None keeps records in memory only.
        header: all settings that decide the records. A folder whose run had other settings is refused.
        resume: go on from the records that are there; else the folder must hold none.
        file: the records' file, one JSON object a line.
        fields: what every record has.

    Raises:
        DataError: the folder holds a run and `resume` is not set, it holds none and `resume` is set, its header is
            another, or a record is damaged.
    """

    def __init__(
        self,
        path: Path | None,
        header: Mapping[str, Any],
        *,
        resume: bool = False,
        file: str = "predictions.jsonl",
        fields: frozenset[str] = _FIELDS,
    ) -> None:
        self.path = path
        self.header = json.loads(json.dumps(header))
        self.records: list[Record] = []
        self._file: TextIO | None = None
        if path is None:
            if resume:
                raise DataError("--resume needs --out: it goes on from what that folder holds.")
            return
        path.mkdir(parents=True, exist_ok=True)
        self._open(path / file, path / "run.json", resume, fields)

    def _open(self, records: Path, header_file: Path, resume: bool, fields: frozenset[str]) -> None:
        path = records.parent
        if resume:
            if not header_file.exists():
                raise DataError(f"{path} holds no run to resume: leave --resume out, or name the folder of the run.")
            self._check_header(header_file)
            self.records = read_records(records, cut_off=True, fields=fields)
            # What was cut off in the middle of a line goes, or the next record would be glued to it.
            with replacing(records) as temporary:
                temporary.write_text("".join(map(_line, self.records)), encoding="utf-8")
        elif header_file.exists():
            raise DataError(f"{path} holds a run already: add --resume to go on with it, or name another folder.")
        else:
            with replacing(header_file) as temporary:
                temporary.write_text(_dumps(self.header), encoding="utf-8")
        self._file = records.open("a", encoding="utf-8")

    def _check_header(self, header_file: Path) -> None:
        try:
            found = json.loads(header_file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{header_file} is damaged ({error}); start again in another folder.") from error
        different = sorted(key for key in found.keys() | self.header.keys() if found.get(key) != self.header.get(key))
        if different:
            raise DataError(
                f"{header_file.parent} holds a run with other settings ({', '.join(different)}): "
                "give the same options, or name another folder."
            )

    @property
    def done(self) -> set[tuple[str, str]]:
        """(variant, sample id) of all records."""
        return {(record["variant"], record["id"]) for record in self.records}

    def add(self, record: Record) -> None:
        """Keep a record; on disk at once, so that a kill loses nothing that was scored."""
        self.records.append(record)
        if self._file is not None:
            self._file.write(_line(record))
            self._file.flush()

    @contextmanager
    def recording(self) -> Iterator[Outcome]:
        """Run the measurements within. Ctrl-C ends them early and leaves every record that was added."""
        outcome = Outcome()
        try:
            with suppress(KeyboardInterrupt):
                yield outcome
                outcome.complete = True
        finally:
            self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def write_results(self, results: Mapping[str, Any]) -> None:
        if self.path is not None:
            with replacing(self.path / "results.json") as temporary:
                temporary.write_text(_dumps(results), encoding="utf-8")


def read_records(path: Path, *, cut_off: bool = False, fields: frozenset[str] = _FIELDS) -> list[Record]:
    """The records of a run.

    Args:
        cut_off: skip a last line that has no end, as a killed run leaves it.
        fields: what every record must have.

    Raises:
        DataError: the file is missing or a line is damaged; the message names it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} can't be read: {error}.") from error
    lines = text.split("\n")
    if lines[-1] and cut_off:
        lines[-1] = ""
    records = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not fields <= record.keys():
                raise ValueError(f"expected an object with {', '.join(sorted(fields))}")
        except ValueError as error:
            raise DataError(f"{path}, line {number}, is damaged: {error}.") from error
        records.append(record)
    return records


def read_results(folder: Path) -> dict[str, Any]:
    """The `results.json` of a run.

    Raises:
        DataError: it is missing or damaged.
    """
    path = folder / "results.json"
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
        if loaded["format"] != _FORMAT:
            raise ValueError(f"format {loaded['format']}, expected {_FORMAT}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no result of this version's benchmark: {error}.") from error
    return dict(loaded)


def summarize(
    variants: Sequence[tuple[str, str]],
    records: Iterable[Record],
    metrics: Sequence[str],
    shapes: Mapping[str, tuple[int, int]],
    equal_tokens: int,
) -> dict[str, dict[str, Any]]:
    """Means with intervals and costs of every variant that has records, in the order of `variants`.

    Args:
        variants: (name, title).
        shapes: variant -> (bytes of its weights, bytes of its KV cache a token).
        equal_tokens: output length at which turns are compared; see `VariantCost`.
    """
    by_variant: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_variant[record["variant"]].append(record)
    costs = _costs(by_variant, shapes, equal_tokens)
    summary: dict[str, dict[str, Any]] = {}
    for name, title in variants:
        found = by_variant.get(name)
        if not found:
            continue
        groups = {
            key: {
                value: _means([r for r in found if r[key] == value], metrics)
                for value in sorted({r[key] for r in found})
            }
            for key in ("source", "kind")
        }
        overall = _means(found, metrics)
        summary[name] = {
            "title": title,
            "scored": len(found),
            "metrics": overall,
            "by_source": groups["source"],
            "by_kind": groups["kind"],
            "cost": costs[name],
        }
    return summary


def _means(records: Sequence[Record], metrics: Sequence[str]) -> dict[str, Mean]:
    columns = {
        metric: [record["scores"][metric] for record in records if metric in record["scores"]] for metric in metrics
    }
    return means({metric: column for metric, column in columns.items() if column})


def _costs(
    by_variant: Mapping[str, Sequence[Record]], shapes: Mapping[str, tuple[int, int]], equal_tokens: int
) -> dict[str, VariantCost | None]:
    turns = {name: [TurnCost(**record["cost"]) for record in found] for name, found in by_variant.items()}
    reference = None
    if REFERENCE in turns:
        lengths = sorted(turn.prompt_tokens for turn in turns[REFERENCE])
        reference = float(lengths[len(lengths) // 2])
    costs = {
        name: variant_cost(
            turns[name],
            [record["setup_seconds"] for record in found if record.get("setup_seconds") is not None],
            model_bytes=shapes[name][0],
            kv_bytes=shapes[name][1] * max(turn.prompt_tokens + turn.output_tokens for turn in turns[name]),
            equal_tokens=equal_tokens,
            reference_prompt_tokens=reference,
        )
        for name, found in by_variant.items()
    }
    plain, cached = costs.get(REFERENCE), costs.get(CACHED_REFERENCE)
    for name, cost in costs.items():
        if cost is None or not name.startswith("lora-gen"):
            continue
        costs[name] = replace(
            cost,
            break_even_turns=break_even_turns(cost, plain) if plain else None,
            break_even_cached_turns=break_even_turns(cost, cached) if cached else None,
        )
    return costs


def results_document(
    header: Mapping[str, Any], summary: Mapping[str, Any], *, missing: Mapping[str, str], complete: bool, command: str
) -> dict[str, Any]:
    """Everything that `results.json` says: settings, models, machine, versions, and the summary."""
    return {
        "format": _FORMAT,
        "command": command,
        "complete": complete,
        **header,
        "versions": library_versions(),
        "machine": machine(),
        "missing_variants": dict(missing),
        "variants": _plain(summary),
    }


def library_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed as a package"
    return versions


def machine() -> dict[str, Any]:
    """Processor, cores, memory, system and, where there is one, the accelerator."""
    import torch

    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory_gb"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    if torch.cuda.is_available():
        found["accelerator"] = torch.cuda.get_device_name()
    return found


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _plain(value: Any) -> Any:
    """Dataclasses as dicts and what JSON has no number for as text or null."""
    if hasattr(value, "__dataclass_fields__"):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "never" if value == math.inf else None
    return value


def _line(record: Record) -> str:
    return json.dumps(_plain(record), ensure_ascii=False, allow_nan=False) + "\n"


def _dumps(value: Any) -> str:
    return json.dumps(_plain(value), ensure_ascii=False, indent=2, allow_nan=False) + "\n"
