"""BFCL's rows and its AST checker, out of the wheel of `bfcl-eval` (the Berkeley Function Calling Leaderboard).

The wheel is fetched at first use and unpacked into the cache folder, not installed: it pins numpy, filelock and 30 more
packages that the checker does without, to versions that this package can't run with. Knows nothing of models.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from loragen_agents.errors import DataError
from loragen_agents.models.cache import cache_folder
from loragen_agents.models.fingerprints import file_sha256
from loragen_agents.models.sources import download_wheels
from loragen_agents.support.json_lines import json_lines
from loragen_agents.support.progress import Progress, silent

PACKAGE = "bfcl-eval==2026.3.23"
SHA256 = "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a"
VERSION = "BFCL_v4"

# The single-turn categories whose functions are Python's, by the names of BFCL's own files.
CATEGORIES = (
    "simple_python",
    "multiple",
    "irrelevance",
    "parallel",
    "parallel_multiple",
    "live_simple",
    "live_multiple",
    "live_irrelevance",
    "live_relevance",
    "live_parallel",
    "live_parallel_multiple",
)
_MEMBERS = (
    "bfcl_eval/constants/",
    "bfcl_eval/eval_checker/ast_eval/",
    f"bfcl_eval/data/{VERSION}_",
    f"bfcl_eval/data/possible_answer/{VERSION}_",
)
_MODEL = "loragen/agents"

Checker = Callable[[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]], Sequence[Any], str], dict[str, Any]]


@dataclass(frozen=True)
class Entry:
    """One row of BFCL: the conversation, its functions, and for AST categories what counts as right.

    Attributes:
        messages: (role, content), in order.
        answer: one entry for each call due, {function: {argument: [allowed values]}}; None in (ir)relevance categories.
    """

    id: str
    category: str
    messages: tuple[tuple[str, str], ...]
    functions: tuple[dict[str, Any], ...]
    answer: tuple[dict[str, Any], ...] | None


def obtain(progress: Progress = silent) -> Path:
    """The folder with what is needed of the wheel; fetched, checked and unpacked at first use.

    Raises:
        ModelLoadError: pip can't fetch it.
        DataError: it is not the file that was published.
    """
    folder = cache_folder() / "bfcl" / SHA256[:16]
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".bfcl-") as made:
        temporary = Path(made)
        download_wheels([PACKAGE], temporary, progress)
        (wheel,) = temporary.glob("*.whl")
        unpack(wheel, temporary / "unpacked", SHA256)
        try:
            (temporary / "unpacked").rename(folder)
        except OSError:
            if not folder.is_dir():  # another process may have been faster
                raise
    return folder


def unpack(wheel: Path, folder: Path, sha256: str) -> None:
    """Take the rows, the checker and the licence out of the wheel.

    Raises:
        DataError: the wheel has another hash; nothing of it was read then.
    """
    found = file_sha256(wheel, silent)
    if found != sha256:
        raise DataError(f"{wheel.name} has SHA-256 {found}, expected {sha256}: not the file that was published.")
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(_MEMBERS) or "/licenses/" in name or name == "bfcl_eval/__init__.py":
                archive.extract(name, folder)
    for package in ("bfcl_eval/eval_checker", "bfcl_eval"):
        (folder / package / "__init__.py").touch()


def read_entries(folder: Path, category: str, limit: int | None = None) -> list[Entry]:
    """The rows of a category; `limit` of them, spread evenly.

    Raises:
        DataError: no such category, or a file that is damaged; the message names it.
    """
    if category not in CATEGORIES:
        raise DataError(f"There is no category {category!r}; expected one of {', '.join(CATEGORIES)}.")
    data = folder / "bfcl_eval" / "data"
    rows = _rows(data / f"{VERSION}_{category}.json")
    # BFCL's own rule: answers stand in the rows' order, under ids that are not always the same.
    answers = None if "relevance" in category else _rows(data / "possible_answer" / f"{VERSION}_{category}.json")
    if answers is not None and len(answers) != len(rows):
        raise DataError(
            f"{category} has {len(rows)} rows and {len(answers)} answers; remove {folder} to fetch it again."
        )
    entries = []
    for place, row in enumerate(rows):
        answer = tuple(answers[place]["ground_truth"]) if answers is not None else None
        messages = tuple((message["role"], message["content"]) for message in row["question"][0])
        entries.append(Entry(row["id"], category, messages, tuple(row["function"]), answer))
    if limit is None or limit >= len(entries):
        return entries
    return [entries[place * len(entries) // limit] for place in range(limit)]


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        return [row for _, row in json_lines(path)]
    except DataError as error:
        raise DataError(f"{error}; remove its folder to fetch it again.") from error


def load_checker(folder: Path) -> Checker:
    """BFCL's own AST checker: (functions, calls, answer, category) -> {"valid": ..., "error": ...}.

    Its module asks a table of models, which imports every vendor's client, for one fact: whether a model writes dots in
    names as underscores. A table of one model, which doesn't, takes its place.
    """
    with _importable(folder):
        table = ModuleType("bfcl_eval.constants.model_config")
        table.MODEL_CONFIG_MAPPING = {_MODEL: SimpleNamespace(underscore_to_dot=False)}  # type: ignore[attr-defined]
        sys.modules[table.__name__] = table
        checker = importlib.import_module("bfcl_eval.eval_checker.ast_eval.ast_checker").ast_checker
        python = importlib.import_module("bfcl_eval.constants.enums").Language.PYTHON

    def check(
        functions: Sequence[Mapping[str, Any]], calls: Sequence[Mapping[str, Any]], answer: Sequence[Any], category: str
    ) -> dict[str, Any]:
        return dict(checker(list(functions), list(calls), list(answer), python, category, _MODEL.replace("/", "_")))

    return check


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Import `bfcl_eval` from `folder` within; an installed one is neither used nor disturbed."""

    def taken() -> dict[str, ModuleType]:
        names = [name for name in sys.modules if name == "bfcl_eval" or name.startswith("bfcl_eval.")]
        return {name: sys.modules.pop(name) for name in names}

    installed = taken()
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        taken()
        sys.modules.update(installed)
