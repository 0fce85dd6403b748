"""Tools for the files of one folder. The border of the folder is held by `context.Folder`.

LangChain's community package has file tools too. They are not used: the package is no longer kept up, takes a second to
import, and reports errors as ordinary results.
"""

import fnmatch
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from loragen_agents.assistant.results import Document, Result, table_result
from loragen_agents.assistant.tools.context import Context, Folder, ToolError
from loragen_agents.support.files import replacing

MAX_BYTES = 1_000_000
MAX_MATCHES = 50


def tools(context: Context) -> dict[str, Callable[..., Result]]:
    folder = context.folder

    def list_files(folder: str = "") -> Result:
        return _listing(context.folder, folder)

    def find_files(name: str) -> Result:
        pattern = name.strip().strip("\"'").removeprefix("./").casefold()
        if not any(mark in pattern for mark in "*?["):
            pattern = f"*{pattern}*"
        found = [
            path
            for path in folder.walk(folder.root)
            if fnmatch.fnmatchcase(path.name.casefold(), pattern)
            or fnmatch.fnmatchcase(folder.name(path).casefold(), pattern)
        ]
        if not found:
            return Result(f"No file is called {name}.")
        return table_result(
            f"{_count(len(found), 'file')}:",
            ("Name", "Size", "Changed"),
            [_row(folder, path) for path in found],
            outside=True,
        )

    def search_files(text: str, folder: str = "") -> Result:
        return _search(context.folder, text, folder)

    def read_file(path: str) -> Result:
        file = folder.file(path)
        text = read_text(folder, file)
        return Result(text or "(the file is empty)", Document(text, file.suffix.lower() in (".md", ".markdown")), True)

    def write_file(path: str, text: str) -> Result:
        file = folder.new(path)
        replaced = file.exists()
        with replacing(file) as temporary:
            temporary.write_text(_ended(text), encoding="utf-8")
        return Result(f"{'Replaced' if replaced else 'Wrote'} {folder.name(file)} ({_count(len(text), 'character')}).")

    def append_to_file(path: str, text: str) -> Result:
        file = folder.new(path)
        before = read_text(folder, file) if file.exists() else ""
        with replacing(file) as temporary:
            temporary.write_text(_ended(before) + _ended(text), encoding="utf-8")
        return Result(f"Added a line to {folder.name(file)}.")

    def copy_file(source: str, destination: str) -> Result:
        start = folder.file(source)
        target = _target(folder, start, destination)
        shutil.copyfile(start, target)
        return Result(f"Copied {folder.name(start)} to {folder.name(target)}.")

    def move_file(source: str, destination: str) -> Result:
        start = folder.file(source)
        target = _target(folder, start, destination)
        shutil.move(start, target)
        return Result(f"Moved {folder.name(start)} to {folder.name(target)}.")

    def delete_file(path: str) -> Result:
        file = folder.file(path)
        file.unlink()
        return Result(f"Deleted {folder.name(file)}.")

    functions = (
        list_files, find_files, search_files, read_file, write_file, append_to_file, copy_file, move_file, delete_file,
    )  # fmt: skip
    return {tool.__name__: tool for tool in functions}


def read_text(folder: Folder, file: Path) -> str:
    """The text of a file.

    Raises:
        ToolError: it is too large, no text, or may not be read.
    """
    try:
        with file.open("rb") as opened:
            content = opened.read(MAX_BYTES + 1)
    except OSError as error:
        raise ToolError(f"{folder.name(file)} can't be read: {error.strerror}") from error
    if len(content) > MAX_BYTES:
        raise ToolError(f"{folder.name(file)} is larger than {MAX_BYTES // 1_000_000} MB")
    if b"\0" in content[:4096]:
        raise ToolError(f"{folder.name(file)} is no text file")
    return content.decode("utf-8-sig", errors="replace").rstrip("\n")


def size_text(size: float) -> str:
    """Bytes as people write them."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 10 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _listing(folder: Folder, given: str) -> Result:
    start = folder.directory(given)
    try:
        entries = sorted(start.iterdir(), key=lambda entry: (not entry.is_dir(), entry.name.casefold()))
    except OSError as error:
        raise ToolError(f"{folder.name(start)} can't be listed: {error.strerror}") from error
    rows = [_row(folder, entry, start) for entry in entries if not entry.name.startswith(".")]
    where = "this folder" if start == folder.root else folder.name(start)
    if not rows:
        return Result(f"There are no files in {where}.")
    return table_result(f"{_count(len(rows), 'file')} in {where}:", ("Name", "Size", "Changed"), rows, outside=True)


def _row(folder: Folder, path: Path, start: Path | None = None) -> tuple[str, str, str]:
    name = path.name if start else folder.name(path)
    try:
        status = path.lstat()
    except OSError:
        return name, "?", "?"
    size = "folder" if path.is_dir() else size_text(status.st_size)
    return (f"{name}/" if path.is_dir() else name), size, f"{datetime.fromtimestamp(status.st_mtime):%Y-%m-%d %H:%M}"


def _search(folder: Folder, text: str, given: str) -> Result:
    wanted = text.strip().strip("\"'").casefold()
    if not wanted:
        raise ToolError("there is nothing to look for; give a word or phrase")
    start = folder.path(given) if given.strip() else folder.root
    files = [start] if start.is_file() else folder.walk(folder.directory(given))
    rows: list[tuple[str, int, str]] = []
    for file in files:
        try:
            lines = read_text(folder, file).splitlines()
        except ToolError:
            continue  # pictures and the like
        for number, line in enumerate(lines, 1):
            if wanted in line.casefold():
                rows.append((folder.name(file), number, line.strip()[:200]))
                if len(rows) == MAX_MATCHES:
                    break
        if len(rows) == MAX_MATCHES:
            break
    if not rows:
        return Result(f"No file says {text.strip()!r}.")
    more = " (more were left out)" if len(rows) == MAX_MATCHES else ""
    return table_result(f"{_count(len(rows), 'line')}{more}:", ("File", "Line", "Text"), list(rows), outside=True)


def _target(folder: Folder, source: Path, destination: str) -> Path:
    """Where a copy or a moved file goes; an existing folder takes it under its own name."""
    place = folder.path(destination)
    if destination.strip().endswith(("/", "\\")) and not place.exists():
        place.mkdir(parents=True)
    target = folder.path(str(place / source.name)) if place.is_dir() else folder.new(destination)
    if target == source:
        raise ToolError(f"{folder.name(source)} can't be put onto itself")
    if target.exists():
        raise ToolError(f"{folder.name(target)} is there already; choose another name or delete it first")
    return target


def _ended(text: str) -> str:
    return text if not text or text.endswith("\n") else f"{text}\n"


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
