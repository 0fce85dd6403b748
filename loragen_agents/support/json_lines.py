"""JSON lines files: one JSON value a line. Knows nothing of what the values mean."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loragen_agents.errors import DataError


def json_lines(path: Path, advice: str = "") -> Iterator[tuple[int, Any]]:
    """Yield the number (from 1) and the value of each line that is not empty.

    Only line feeds end a line: other separators, such as U+2028, may stand inside JSON strings.

    Args:
        path: the file, in UTF-8.
        advice: how to mend a file that can't be read, which ends the message.

    Raises:
        DataError: the file can't be read, or a line is no JSON; the message names file and row.
    """
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    yield number, json.loads(line)
                except ValueError as error:
                    raise DataError(f"{path}, row {number}: not a JSON object on one line ({error})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror}){advice}") from error
