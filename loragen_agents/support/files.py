"""Writing files so that a reader sees the old file or the whole new one, and reading JSON so that damage is named."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loragen_agents.errors import CheckpointError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it takes the place of `path`, on an exception it is removed.

    The folder of `path` is made when it is missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        open_to_others(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def open_to_others(path: Path) -> None:
    """Give a file the mode that `open` would have given it.

    mkstemp and safetensors make files for their owner alone; a shared cache or a package has to be readable by others.
    """
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def read_json_object(path: Path, advice: str) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        advice: how to mend it, which ends the message.

    Raises:
        CheckpointError: the file is missing, can't be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; {advice}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); {advice}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged (no JSON object); {advice}")
    return content
