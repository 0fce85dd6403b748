"""Tools that look into text, CSV and JSON files."""

import csv
import io
import json
from collections.abc import Callable
from typing import Any

from loragen_agents.assistant.results import Result, Table, table_result
from loragen_agents.assistant.tools.context import Context, Folder, ToolError
from loragen_agents.assistant.tools.files import read_text
from loragen_agents.assistant.tools.maths import number_text

MAX_ROWS = 100


def tools(context: Context) -> dict[str, Callable[..., Result]]:
    folder = context.folder

    def text_statistics(path: str) -> Result:
        file = folder.file(path)
        text = read_text(folder, file)
        words, lines = text.split(), text.splitlines()
        counts = [
            ("Words", len(words)),
            ("Lines", len(lines)),
            ("Characters", len(text)),
            ("Paragraphs", sum(bool(part.strip()) for part in text.split("\n\n"))),
        ]
        said = ", ".join(f"{number} {name.lower()}" for name, number in counts)
        return Result(f"{folder.name(file)} has {said}.", Table(("What", "Number"), tuple(counts)))

    def look_up_rows(path: str, column: str, value: str) -> Result:
        columns, rows = read_csv(folder, path)
        place = _column(columns, column)
        wanted = value.strip().casefold()
        found = [row for row in rows if row[place].strip().casefold() == wanted]
        found = found or [row for row in rows if wanted in row[place].casefold()]
        if not found:
            return Result(f"No row has {value} as its {columns[place]}.", outside=True)
        left_out = f"; the first {MAX_ROWS} are shown" if len(found) > MAX_ROWS else ""
        summary = f"{len(found)} of {len(rows)} rows ({', '.join(columns)}){left_out}:"
        return table_result(summary, columns, [tuple(row) for row in found[:MAX_ROWS]], outside=True)

    def summarize_column(path: str, column: str, operation: str) -> Result:
        columns, rows = read_csv(folder, path)
        place = _column(columns, column)
        if operation == "count":
            filled = sum(bool(row[place].strip()) for row in rows)
            return Result(f"{filled} of {len(rows)} rows have a {columns[place]}.", outside=True)
        values = [number for row in rows if (number := _number(row[place])) is not None]
        if not values:
            raise ToolError(f"the column {columns[place]} has no numbers", outside=True)
        worked_out = {
            "sum": sum(values),
            "average": sum(values) / len(values),
            "minimum": min(values),
            "maximum": max(values),
        }
        if operation not in worked_out:
            raise ToolError(f"{operation!r} is unknown; expected count, {', '.join(worked_out)}")
        skipped = len(rows) - len(values)
        note = f", {skipped} without one" if skipped else ""
        value = number_text(float(f"{worked_out[operation]:.12g}"))
        return Result(f"The {operation} of {columns[place]} is {value} ({len(values)} numbers{note}).", outside=True)

    def look_up_json(path: str, key: str) -> Result:
        file = folder.file(path)
        try:
            value = json.loads(read_text(folder, file))
        except (ValueError, RecursionError) as error:
            raise ToolError(f"{folder.name(file)} is not JSON: {error}") from error
        for part in _parts(key):
            value = _inner(value, part, key)
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        return Result(f"{key} is {text}", outside=True)

    return {tool.__name__: tool for tool in (text_statistics, look_up_rows, summarize_column, look_up_json)}


def read_csv(folder: Folder, path: str) -> tuple[tuple[str, ...], list[list[str]]]:
    """The columns of a CSV file and its rows, each as long as the header. The separator is found out.

    Raises:
        ToolError: there is no such file, or it is empty or no table.
    """
    file = folder.file(path)
    text = read_text(folder, file)
    first = text.split("\n", 1)[0]
    separator = max(",;\t|", key=first.count)
    try:
        lines = [row for row in csv.reader(io.StringIO(text), delimiter=separator) if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise ToolError(f"{folder.name(file)} is no table: {error}") from error
    if len(lines) < 2:
        raise ToolError(f"{folder.name(file)} has no rows under a heading")
    columns = tuple(cell.strip() for cell in lines[0])
    return columns, [(row + [""] * len(columns))[: len(columns)] for row in lines[1:]]


def _column(columns: tuple[str, ...], wanted: str) -> int:
    plain = [column.casefold().replace("_", " ") for column in columns]
    text = wanted.strip().casefold().replace("_", " ").removesuffix(" column")
    if text in plain:
        return plain.index(text)
    near = [place for place, column in enumerate(plain) if text and (text in column or column in text)]
    singular = [place for place, column in enumerate(plain) if column.rstrip("s") == text.rstrip("s")]
    if len(singular) == 1 or len(near) == 1:
        return (singular or near)[0]
    raise ToolError(f"there is no column {wanted!r}; there are {', '.join(columns)}", outside=True)


def _number(cell: str) -> float | None:
    text = cell.strip().strip("$€£").replace(" ", "").replace(",", "").rstrip("%€$£")
    try:
        value = float(text)
    except ValueError:
        return None
    return value if abs(value) < float("inf") else None


def _parts(key: str) -> list[str]:
    return [part for part in key.replace("[", ".").replace("]", "").split(".") if part]


def _inner(value: Any, part: str, key: str) -> Any:
    if isinstance(value, dict):
        if part in value:
            return value[part]
        same = [name for name in value if name.casefold() == part.casefold()]
        if len(same) == 1:
            return value[same[0]]
        raise ToolError(
            f"there is no key {part!r} in {key!r}; there are {', '.join(map(str, list(value)[:20])) or 'none'}",
            outside=True,
        )
    if isinstance(value, list) and part.lstrip("-").isdigit() and -len(value) <= int(part) < len(value):
        return value[int(part)]
    raise ToolError(f"there is nothing at {part!r} in {key!r}")
