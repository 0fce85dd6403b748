"""Single files that are kept in the cache folder, the least recently used of which go first.

A folder of them has a bound on its bytes, the same as that of `disk_cache`. A disk that is full or can't be written to
costs making the content again, nothing else. Knows nothing of what is in the files.
"""

import logging
from contextlib import suppress
from pathlib import Path

from loragen_agents.specialization.disk_cache import most_bytes
from loragen_agents.support.files import replacing

logger = logging.getLogger(__name__)


def read_kept(path: Path) -> bytes | None:
    """What is kept in a file; None where there is none, or where it can't be read (a warning says so)."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("%s can't be read (%s); it is made again.", path, error)
        return None
    with suppress(OSError):
        path.touch()  # the least recently used go first
    return content


def keep(path: Path, content: bytes) -> None:
    """Write a file, then remove the least recently used of its folder beyond `most_bytes`; warn where that fails."""
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(content)
        _prune(path)
    except OSError as error:
        logger.warning(
            "%s can't be kept (%s) and will be made again. Free some space there, or set LORAGEN_AGENTS_CACHE to "
            "another folder.",
            path,
            error,
        )


def _prune(newest: Path) -> None:
    """Remove files of the folder of `newest`, which itself stays."""
    found: list[tuple[float, int, Path]] = []
    for path in newest.parent.glob(f"*{newest.suffix}"):
        with suppress(OSError):  # another process may remove it at the same time
            state = path.stat()
            found.append((state.st_mtime, state.st_size, path))
    left = most_bytes()
    for _, size, path in sorted(found, key=lambda one: (one[2] == newest, one[0]), reverse=True):
        left -= size
        if left < 0 and path != newest:
            path.unlink(missing_ok=True)
