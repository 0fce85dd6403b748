"""SHA-256 of files and of a model's tensors, remembered so that a large file is read once.

Reads safetensors headers itself (eight bytes of length, JSON, then the tensors' bytes), so nothing here needs torch.
Knows nothing of where the files come from.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from loragen_agents.errors import ModelLoadError
from loragen_agents.support.files import replacing
from loragen_agents.support.progress import Progress, silent

_CHUNK = 1 << 22
# The format itself allows 100 MB of header.
_LONGEST_HEADER = 100_000_000


def file_sha256(path: Path, progress: Progress = silent) -> str:
    """SHA-256 of a file's bytes as 64 hex digits."""
    digest, done, size = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            progress(f"Checking {path.name}", done / size)
    return digest.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model in `folder`, as transformers chooses them.

    Raises:
        ModelLoadError: there are none, or the index is damaged or names a file that is missing.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ModelLoadError(
            f"{folder} holds no weights: expected model.safetensors or model.safetensors.index.json "
            "(weights in pickled files are never read; convert them to safetensors)"
        )
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(f"{index} is damaged ({error!r}); fetch the model again") from error
    paths = [folder / str(name) for name in names]
    for path in paths:
        # A name such as "../other" would lead out of the folder.
        if path.parent != folder or not path.is_file():
            raise ModelLoadError(f"{index} names {path.name}, which is not in the folder; fetch the model again")
    return paths


def tensor_fingerprint(folder: Path, progress: Progress = silent) -> str:
    """SHA-256 over the tensors of a model folder, sorted by name: for each its name, dtype, shape and bytes.

    It depends on the tensors alone, not on how they are spread over files or on metadata.

    Raises:
        ModelLoadError: no weights, or a damaged file, which is named.
    """
    tensors: dict[str, tuple[Path, int, dict[str, Any]]] = {}
    for path in weight_files(folder):
        start, header = _read_header(path)
        tensors.update({name: (path, start, entry) for name, entry in header.items()})
    total = sum(entry["data_offsets"][1] - entry["data_offsets"][0] for _, _, entry in tensors.values())
    digest, done = hashlib.sha256(), 0
    for name, (path, start, entry) in sorted(tensors.items()):
        digest.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode() + b"\n")
        begin, end = entry["data_offsets"]
        with path.open("rb") as file:
            file.seek(start + begin)
            left = end - begin
            while left:
                chunk = file.read(min(left, _CHUNK))
                digest.update(chunk)
                left -= len(chunk)
                done += len(chunk)
        progress(f"Checking the weights in {folder.name}", done / max(total, 1))
    return digest.hexdigest()


def _read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the tensor data of a safetensors file begins, and the entry of each tensor."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(_LONGEST_HEADER, size - 8):
                raise ValueError(f"the header says it has {length} bytes")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            if not 0 <= begin <= end <= size - 8 - length:
                raise ValueError(f"tensor {name} lies outside the file")
            entry["dtype"], entry["shape"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(f"{path} is damaged ({error}); fetch or convert the model again") from error
    return 8 + length, header


def remembered(memory: Path, paths: Sequence[Path], kind: str, compute: Callable[[], str]) -> str:
    """Give `compute()`, or what it gave before for the same files, which have not changed since.

    A note holds the files' sizes and times of change, and a checksum of its own: a garbled one is not believed.

    Args:
        memory: folder of the notes, one small JSON file each. A folder that can't be written to costs time, nothing
            else.
        kind: what is computed; part of the note's name.
    """
    state = [_file_state(path) for path in paths]
    key = hashlib.sha256(json.dumps([kind, [entry[0] for entry in state]]).encode()).hexdigest()
    note = memory / f"{key[:32]}.json"
    try:
        known = json.loads(note.read_text("utf-8"))
        if known["files"] == state and known["checksum"] == _note_checksum(kind, state, known["value"]):
            return str(known["value"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass  # nothing noted yet, or half a note: it is computed and written anew
    value = compute()
    try:
        with replacing(note) as temporary:
            content = {"kind": kind, "files": state, "value": value, "checksum": _note_checksum(kind, state, value)}
            temporary.write_text(json.dumps(content, indent=1), "utf-8")
    except OSError:
        pass
    return value


def _file_state(path: Path) -> list[str | int]:
    """What tells that a file was changed: the time of its inode's change too, which `cp -p` and `touch` can't set."""
    found = path.stat()
    return [str(path.resolve()), found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _note_checksum(kind: str, state: list[list[str | int]], value: str) -> str:
    return hashlib.sha256(json.dumps([kind, state, value]).encode()).hexdigest()
