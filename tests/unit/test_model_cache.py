import errno
import logging
import os
import re
import stat
import threading
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError

from loragen_agents.errors import ModelLoadError
from loragen_agents.models import cache as model_cache
from loragen_agents.models import gguf as gguf_conversion
from loragen_agents.models.cache import MANIFEST, cache_folder, find_stored, obtain_model, stored_conversions
from loragen_agents.support.progress import Progress
from tests.tiny_models import save_tiny_model


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "Some Model.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that were converted; in place of reading a GGUF file, a tiny model is written."""
    names: list[str] = []

    def convert(gguf: Path, folder: Path, name: str, progress: Progress) -> None:
        assert gguf.read_bytes().startswith(b"GGUF")
        assert [path.name for path in gguf.parent.iterdir()] == [gguf.name]
        progress("converting", None)
        names.append(name)
        save_tiny_model(folder)

    monkeypatch.setattr(gguf_conversion, "convert_gguf", convert)
    return names


def leftovers(cache: Path) -> list[str]:
    return [path.name for path in (cache / "models").iterdir() if not path.name.endswith(".lock")]


def test_the_cache_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORAGEN_AGENTS_CACHE", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"
    monkeypatch.delenv("LORAGEN_AGENTS_CACHE")
    assert cache_folder().name == "loragen-agents" and cache_folder().is_absolute()


def test_a_conversion_is_made_once(gguf: Path, cache: Path, conversions: list[str]) -> None:
    assert find_stored(gguf, cache_dir=cache) is None
    first = obtain_model(gguf, cache_dir=cache)
    second = obtain_model(str(gguf), cache_dir=cache)
    assert first == second and conversions == ["some-model"]
    assert find_stored(gguf, cache_dir=cache) == first.folder
    assert [(folder, manifest.name) for folder, manifest in stored_conversions(cache)] == [(first.folder, "some-model")]
    assert leftovers(cache) == [first.folder.name]


def test_the_files_of_a_conversion_have_one_mode(gguf: Path, cache: Path) -> None:
    before = os.umask(0o027)
    try:
        folder = obtain_model(gguf, cache_dir=cache).folder
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o640}


def test_another_file_under_the_same_name_is_another_model(gguf: Path, cache: Path, conversions: list[str]) -> None:
    first = obtain_model(gguf, cache_dir=cache)
    gguf.write_bytes(b"GGUF" + bytes(99) + b"!")
    os.utime(gguf, ns=(1, 1))
    assert obtain_model(gguf, cache_dir=cache).folder != first.folder
    assert len(conversions) == 2


@pytest.mark.parametrize(
    "damage", ["cut", "flip", "tokenizer", "missing", "manifest", "manifest types", "other version"]
)
def test_a_damaged_conversion_is_made_anew(
    damage: str, gguf: Path, cache: Path, conversions: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    model = obtain_model(gguf, cache_dir=cache)
    weights, tokenizer, manifest = (model.folder / name for name in ("model.safetensors", "tokenizer.json", MANIFEST))
    good = weights.read_bytes()
    if damage == "cut":
        weights.write_bytes(good[:-1])
    elif damage == "flip":
        weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    elif damage == "tokenizer":
        tokenizer.write_bytes(tokenizer.read_bytes() + b" ")
    elif damage == "missing":
        tokenizer.unlink()
    elif damage == "manifest":
        manifest.write_text("{")
    elif damage == "manifest types":
        manifest.write_text(manifest.read_text().replace(f'"fingerprint": "{model.fingerprint}"', '"fingerprint": 3'))
    else:
        manifest.write_text(manifest.read_text().replace('"conversion": 1', '"conversion": 0'))
    with caplog.at_level(logging.INFO):
        assert obtain_model(gguf, cache_dir=cache) == model
    assert len(conversions) == 2
    assert weights.read_bytes() == good
    assert str(model.folder) in caplog.text
    assert leftovers(cache) == [model.folder.name]


def test_a_copied_cache_is_checked_once_and_used(gguf: Path, cache: Path, conversions: list[str]) -> None:
    model = obtain_model(gguf, cache_dir=cache)
    os.utime(model.folder / "model.safetensors", ns=(5, 5))
    assert obtain_model(gguf, cache_dir=cache) == model
    assert stored_conversions(cache)[0][1].weights["model.safetensors"][1] == 5
    assert len(conversions) == 1


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_conversion_leaves_nothing(error: type[BaseException], gguf: Path, cache: Path) -> None:
    def interrupt(text: str, fraction: float | None) -> None:
        if text == "converting":
            raise error

    with pytest.raises(error):
        obtain_model(gguf, cache_dir=cache, progress=interrupt)
    assert leftovers(cache) == []


def test_what_a_killed_process_left_is_removed(gguf: Path, cache: Path) -> None:
    folder = obtain_model(gguf, cache_dir=cache).folder
    (folder / "tokenizer.json").unlink()
    dead = folder.parent / f".{folder.name}.999999"
    (dead / "gguf").mkdir(parents=True)
    obtain_model(gguf, cache_dir=cache)
    assert leftovers(cache) == [folder.name]


def test_two_at_the_same_time_convert_once(
    gguf: Path, cache: Path, conversions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick, entered = gguf_conversion.convert_gguf, threading.Event()

    def slow(gguf: Path, folder: Path, name: str, progress: Progress) -> None:
        entered.set()
        time.sleep(0.3)
        quick(gguf, folder, name, progress)

    monkeypatch.setattr(gguf_conversion, "convert_gguf", slow)
    first = threading.Thread(target=obtain_model, args=(gguf,), kwargs={"cache_dir": cache})
    first.start()
    assert entered.wait(10)
    steps: list[str] = []
    obtain_model(gguf, cache_dir=cache, progress=lambda text, _: steps.append(text))
    first.join()
    assert conversions == ["some-model"]
    assert any("Waiting for another process" in step for step in steps)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        # As safetensors and tokenizers raise them.
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        Exception("No space left on device (os error 28)"),
    ],
)
def test_a_full_disk(error: Exception, gguf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf.write_bytes(b"GGUF" + bytes(1_000_000))

    def half(gguf: Path, folder: Path, name: str, progress: Progress) -> None:
        save_tiny_model(folder)
        (folder / "tokenizer.json").unlink()
        raise error

    monkeypatch.setattr(gguf_conversion, "convert_gguf", half)
    with pytest.raises(ModelLoadError) as raised:
        obtain_model(gguf, cache_dir=cache)
    assert re.fullmatch(
        rf"no space left on the disk of {cache}: \d+ MB are free, and fetching and converting some-model takes about "
        "5 MB; free some space there, or set LORAGEN_AGENTS_CACHE to a folder on another disk",
        str(raised.value),
    )
    assert leftovers(cache) == []


def test_a_disk_too_full_for_the_cache_folder(gguf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(ModelLoadError, match=rf"no space left on the disk of {cache}: .*LORAGEN_AGENTS_CACHE"):
        obtain_model(gguf, cache_dir=cache)


def test_a_cache_folder_that_can_not_be_made(gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelLoadError, match=r"cache folder .*file/cache can't be used.*LORAGEN_AGENTS_CACHE"):
        obtain_model(gguf, cache_dir=tmp_path / "file" / "cache")


def test_terms_are_told_when_a_model_is_fetched(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fetch(model: object, work: Path, progress: Progress) -> Path:
        path = work / "gemma.gguf"
        path.write_bytes(b"GGUF")
        return path

    monkeypatch.setattr(model_cache, "fetch_known", fetch)
    obtain_model("gemma-3-270m", cache_dir=cache)
    assert "Gemma Terms of Use" in caplog.text
    caplog.clear()
    obtain_model("gemma-3-270m", cache_dir=cache)
    assert caplog.text == ""


def test_a_folder_that_only_holds_a_gguf_file(tmp_path: Path, gguf: Path, cache: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"no config\.json; to use Some Model\.gguf in it, pass the path"):
        obtain_model(tmp_path, cache_dir=cache)
