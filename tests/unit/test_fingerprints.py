import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loragen_agents.errors import ModelLoadError
from loragen_agents.models.fingerprints import file_sha256, remembered, tensor_fingerprint, weight_files

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "c.weight": torch.zeros(0, 4),
}
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def independent(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, DTYPES[tensor.dtype], list(tensor.shape)]).encode() + b"\n")
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def shard(folder: Path, names: list[list[str]]) -> None:
    weight_map = {}
    for number, part in enumerate(names):
        file = f"model-{number}.safetensors"
        save_file({name: TENSORS[name] for name in part}, folder / file, metadata={"part": str(number)})
        weight_map.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_it_is_the_sha256_of_the_sorted_tensors(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert tensor_fingerprint(tmp_path) == independent(TENSORS)


def test_it_does_not_depend_on_shards_but_on_names_and_values(tmp_path: Path) -> None:
    shard(tmp_path, [["b", "c.weight"], ["a"]])
    assert tensor_fingerprint(tmp_path) == independent(TENSORS)
    assert independent({**TENSORS, "b": TENSORS["b"] + 1}) != independent(TENSORS)
    assert independent({**TENSORS, "b": TENSORS["b"].reshape(3, 2)}) != independent(TENSORS)


@pytest.mark.parametrize("damage", ["empty", "cut", "header", "no json"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    content = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "cut": content[:-1],
            "header": b"\xff" * 8 + content[8:],
            "no json": content[:8] + b"!" + content[9:],
        }[damage]
    )
    with pytest.raises(ModelLoadError, match=r"model\.safetensors is damaged"):
        tensor_fingerprint(tmp_path)


@pytest.mark.parametrize("name", ["absent.safetensors", "../model.safetensors"])
def test_an_index_that_names_a_file_outside_or_missing(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(TENSORS, tmp_path / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelLoadError, match="which is not in the folder"):
        weight_files(folder)


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ModelLoadError, match=r"index\.json is damaged"):
        weight_files(tmp_path)


def test_values_are_remembered_until_a_file_changes(tmp_path: Path) -> None:
    path, calls = tmp_path / "file", []
    path.write_bytes(b"one")

    def compute() -> str:
        calls.append(path.read_bytes())
        return file_sha256(path)

    values = [remembered(tmp_path / "memory", [path], "sha256", compute) for _ in range(2)]
    assert values == [hashlib.sha256(b"one").hexdigest()] * 2 and len(calls) == 1
    path.write_bytes(b"two")
    os.utime(path, ns=(7, 7))
    assert remembered(tmp_path / "memory", [path], "sha256", compute) == hashlib.sha256(b"two").hexdigest()
    for note in (tmp_path / "memory").iterdir():
        note.write_text("not json")
    remembered(tmp_path / "memory", [path], "sha256", compute)
    assert len(calls) == 3


def test_a_garbled_note_is_not_believed(tmp_path: Path) -> None:
    path, memory = tmp_path / "file", tmp_path / "memory"
    path.write_bytes(b"one")
    expected = remembered(memory, [path], "sha256", lambda: file_sha256(path))
    (note,) = memory.iterdir()
    content = note.read_bytes()
    for place in range(len(content)):
        note.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert remembered(memory, [path], "sha256", lambda: file_sha256(path)) == expected
    note.write_text(json.dumps(json.loads(content) | {"value": "0" * 64}))
    assert remembered(memory, [path], "sha256", lambda: file_sha256(path)) == expected


def test_a_file_with_the_size_and_time_of_another_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    remembered(tmp_path / "memory", [path], "sha256", lambda: file_sha256(path))
    times = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    found = remembered(tmp_path / "memory", [path], "sha256", lambda: file_sha256(path))
    assert found == hashlib.sha256(b"two").hexdigest()
