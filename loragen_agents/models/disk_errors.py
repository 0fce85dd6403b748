"""Errors of a full or unwritable disk, told from all others and turned into ones that say what to do.

Knows nothing of models.
"""

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from loragen_agents.errors import LoRAGenError, ModelLoadError

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def disk_errors(folder: Path, need: str, advice: str) -> Iterator[None]:
    """Turn what the disk of `folder` raises in the block into a ModelLoadError.

    Args:
        folder: what is written to; it need not exist.
        need: what the space is for and how much it takes, as a sentence's part ("fetching it takes 93 MB").
        advice: how to use another folder, behind "free some space there, or".

    Raises:
        ModelLoadError: the disk is full, or the folder can't be used; all other errors pass.
    """
    try:
        yield
    except LoRAGenError:
        raise
    except Exception as error:
        number = _system_error(error)
        if number in _FULL:
            free = _free_bytes(folder) // 1_000_000
            raise ModelLoadError(
                f"no space left on the disk of {folder}: {free} MB are free, and {need}; free some space there, or "
                f"{advice}"
            ) from error
        if number is not None or isinstance(error, SafetensorError):
            raise ModelLoadError(
                f"the cache folder {folder} can't be used ({error}): expected one that you may write to; mend that, "
                f"or {advice}"
            ) from error
        raise


def _system_error(error: Exception) -> int | None:
    """The number of the system's error, if it was one."""
    if isinstance(error, OSError):
        return error.errno
    # Libraries in Rust say it in their text alone: safetensors in an error of its own, tokenizers in a bare Exception.
    told = re.search(r"\(os error (\d+)\)", str(error))
    return int(told[1]) if told else None


def _free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder, which may be one that could not be made."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free
