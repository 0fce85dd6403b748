"""Specialising once: what is kept in memory and on disk, under which key, and what damage does."""

import gc
import os
import shutil
import stat
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from loragen_agents import Tool, ToolRegistry
from loragen_agents.adapter.lora_weights import LoRAWeights
from loragen_agents.conversation.prompts import Turn
from loragen_agents.generator import GeneratorConfig, LoRAGenerator
from loragen_agents.specialization import disk_cache
from loragen_agents.specialization import specialize as specialization
from loragen_agents.specialization.shared_models import shared_generator, shared_language_model
from loragen_agents.specialization.specialize import Specialization, forget_specializations, specialize
from tests.decoded_steps import decoded
from tests.tiny_chat import tiny_generator, tiny_language_model

ONE = Tool(name="one", description="The first tool.")
TWO = Tool(name="two", description="The second tool.")
REGISTRY = ToolRegistry([ONE, TWO])


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def parts(tmp_path_factory, request) -> dict[str, Any]:
    edge = tiny_language_model(tmp_path_factory.mktemp("tiny") / "edge", dtype=request.param)
    return {"edge": edge, "cloud": edge, "generator": tiny_generator(edge)}


@pytest.fixture(autouse=True)
def nothing_in_memory() -> Any:
    forget_specializations()
    yield
    forget_specializations()


@pytest.fixture
def folder(nothing_is_fetched) -> Path:
    return nothing_is_fetched / "specializations"


def assert_same(one: LoRAWeights, other: LoRAWeights) -> None:
    assert (one.layers, one.rank, one.alpha) == (other.layers, other.rank, other.alpha)
    assert one.tensors.keys() == other.tensors.keys()
    for entry in one.tensors:
        for left, right in zip(one.tensors[entry], other.tensors[entry], strict=True):
            assert torch.equal(left, right)


def assert_usable(made: Specialization) -> None:
    assert decoded(made.model, [Turn("Hello")]).token_ids


def test_memory_then_disk(parts, folder):
    first = specialize(REGISTRY, **parts)
    assert first.source == "generated"
    assert first.seconds > 0
    assert not first.weights_are_zero
    again = specialize(REGISTRY, **parts)
    assert (again.source, again.seconds, again.key) == ("memory", 0, first.key)
    assert again.model is first.model
    assert [path.name for path in folder.iterdir()] == [first.key]
    forget_specializations()
    loaded = specialize(REGISTRY, **parts)
    assert (loaded.source, loaded.seconds) == ("disk", 0)
    assert_same(loaded.weights, first.weights)
    assert loaded.definition_tokens == first.definition_tokens
    turns = [Turn("Hello")]
    assert decoded(loaded.model, turns).token_ids == decoded(first.model, turns).token_ids


def with_head(parts: dict[str, Any], **settings: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"n_experts": 1, "expert_scope": "per_layer", "rank": 2, "head_layers": 2, "head_width": 4}
    config = GeneratorConfig(**(given | {"memory_layers": 2, "memory_common_rank": 4} | settings))
    return {**parts, "generator": LoRAGenerator(config, parts["edge"], parts["edge"])}


@pytest.mark.parametrize("experts", [1, 2])
def test_of_a_registry_with_keys_its_vectors_are_kept(parts, folder, experts):
    """And the weights only where they depend on the registry."""
    parts = with_head(parts, n_experts=experts)
    first = specialize(REGISTRY, **parts)
    kept = {path.name for path in (folder / first.key).iterdir()} - {"specialization.json"}
    routed = {"adapter_config.json", "adapter_model.safetensors"}
    assert kept == {"tool_vectors.safetensors"} | (routed if experts > 1 else set())
    forget_specializations()
    loaded = specialize(REGISTRY, **parts)
    assert loaded.source == "disk" and first.parts.keys is not None and loaded.parts.keys is not None
    assert torch.equal(loaded.parts.keys.vectors, first.parts.keys.vectors)
    assert_same(loaded.parts.shared, first.parts.shared)
    assert_same(loaded.weights, first.weights)
    vectors = folder / first.key / "tool_vectors.safetensors"
    vectors.write_bytes(vectors.read_bytes()[:-1])
    forget_specializations()
    assert specialize(REGISTRY, **parts).source == "generated"


def test_registries_share_a_merged_model_where_the_weights_are_the_same(parts):
    one, other = with_head(parts), with_head(parts, n_experts=2)
    first, second = (specialize(registry, **one) for registry in (REGISTRY, REGISTRY.without("two")))
    assert first.model.decoder is second.model.decoder and first.model.scorer is not second.model.scorer
    routed, third = (specialize(registry, **other) for registry in (REGISTRY, REGISTRY.without("two")))
    assert routed.model.decoder is not third.model.decoder
    alone = specialize(REGISTRY, **one, cache=False)
    assert alone.model.decoder is not first.model.decoder
    forget_specializations()
    assert specialize(REGISTRY, **one).model.decoder is not first.model.decoder


def test_the_key_holds_all_that_the_weights_depend_on(parts, tmp_path):
    other_edge = tiny_language_model(tmp_path / "other", seed=1)
    other_dtype = "bfloat16" if parts["edge"].dtype == torch.float32 else "float32"
    same_edge = tiny_language_model(tmp_path / "same", dtype=other_dtype)
    key = specialize(REGISTRY, **parts).key
    variants = [
        specialize(ToolRegistry([TWO, ONE]), **parts),
        specialize(REGISTRY.without("two"), **parts),
        specialize(ToolRegistry([ONE, TWO], input_format="csv"), **parts),
        specialize(REGISTRY, "Be brief.", **parts),
        specialize(REGISTRY, **{**parts, "generator": tiny_generator(parts["edge"], seed=1)}),
        specialize(REGISTRY, edge=other_edge, cloud=other_edge, generator=tiny_generator(other_edge)),
        specialize(REGISTRY, edge=same_edge, cloud=same_edge, generator=tiny_generator(same_edge)),
    ]
    assert all(variant.source == "generated" for variant in variants)
    assert len({key, *(variant.key for variant in variants)}) == 1 + len(variants)
    assert specialize(ToolRegistry([ONE, TWO]), **parts).key == key


def test_a_registry_larger_than_what_was_measured_is_warned_of(parts, monkeypatch, caplog):
    monkeypatch.setattr(specialization, "_MEASURED_TOOLS", 1)
    monkeypatch.setattr(specialization, "_MEASURED_TOOLS_ALONE", 2)
    specialize(REGISTRY, **parts, cache=False)
    assert not any("measured" in record.message for record in caplog.records)
    specialize(REGISTRY, **with_head(parts), cache=False)
    assert any("has 2 tools" in record.message and "up to 1" in record.message for record in caplog.records)


def test_without_the_cache_nothing_is_kept(parts, folder):
    assert [specialize(REGISTRY, **parts, cache=False).source for _ in range(2)] == ["generated"] * 2
    assert not folder.exists()
    assert specialize(REGISTRY, **parts).source == "generated"


def damage_tensors(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        damage_tensors,
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"short"),
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        lambda folder: (folder / "adapter_config.json").write_text("{"),
        lambda folder: (folder / "specialization.json").write_text("[]"),
        lambda folder: (folder / "specialization.json").unlink(),
    ],
    ids=["a flipped bit", "cut off", "no tensors", "no config", "another manifest", "no manifest"],
)
def test_a_damaged_folder_is_made_again(parts, folder, damage, caplog):
    first = specialize(REGISTRY, **parts)
    damage(folder / first.key)
    forget_specializations()
    again = specialize(REGISTRY, **parts)
    assert again.source == "generated"
    assert "damaged" in caplog.text
    assert_same(again.weights, first.weights)
    forget_specializations()
    assert specialize(REGISTRY, **parts).source == "disk"
    assert [path.name for path in folder.iterdir()] == [first.key]


def test_a_folder_that_another_process_wrote_meanwhile_is_left_alone(parts, folder, monkeypatch):
    first = specialize(REGISTRY, **parts)
    forget_specializations()
    kept = folder / first.key
    monkeypatch.setattr(disk_cache, "read", lambda path: None)
    made = specialize(REGISTRY, **parts)
    assert made.source == "generated"
    assert [path.name for path in folder.iterdir()] == [kept.name]


def test_what_a_crash_left_behind_does_no_harm(parts, folder):
    first = specialize(REGISTRY, **parts)
    shutil.copytree(folder / first.key, folder / f".{first.key}.abc")
    (folder / f".{first.key}.abc" / "adapter_model.safetensors").write_bytes(b"half")
    forget_specializations()
    assert specialize(REGISTRY, **parts).source == "disk"
    os.utime(folder / f".{first.key}.abc", (0, 0))
    other = specialize(REGISTRY, "another", **parts)
    assert {path.name for path in folder.iterdir()} == {first.key, other.key}


def test_memory_and_disk_are_bounded(parts, folder, monkeypatch):
    monkeypatch.setattr(specialization._specializations, "limit", 2)
    made = {"a": specialize(REGISTRY, "a", **parts)}
    one = sum(file.stat().st_size for file in (folder / made["a"].key).iterdir())
    monkeypatch.setenv("LORAGEN_AGENTS_CACHE_BYTES", str(3 * one + one // 2))
    made |= {text: specialize(REGISTRY, text, **parts) for text in "bcd"}
    assert {path.name for path in folder.iterdir()} == {made[text].key for text in "bcd"}
    assert specialize(REGISTRY, "d", **parts).source == "memory"
    assert specialize(REGISTRY, "c", **parts).source == "memory"
    assert specialize(REGISTRY, "b", **parts).source == "disk"
    assert specialize(REGISTRY, "a", **parts).source == "generated"
    assert_usable(made["a"])  # whoever still holds one can use it


def test_a_limit_that_is_no_number_is_a_warning(monkeypatch, caplog):
    monkeypatch.setenv("LORAGEN_AGENTS_CACHE_BYTES", "2 GB")
    assert disk_cache.most_bytes() == 2 * 10**9
    assert "LORAGEN_AGENTS_CACHE_BYTES is '2 GB'; expected a whole number" in caplog.text


def test_the_files_of_the_cache_have_one_mode(parts, folder):
    before = os.umask(0o027)
    try:
        made = specialize(REGISTRY, **with_head(parts, n_experts=2))
    finally:
        os.umask(before)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in (folder / made.key).iterdir()}
    assert len(modes) == 4 and set(modes.values()) == {0o640}


@pytest.mark.parametrize("error", [SafetensorError("Error: No space left (os error 28)"), OSError(30, "Read-only")])
def test_a_full_or_read_only_cache_is_a_warning(parts, error, monkeypatch, caplog):
    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr(LoRAWeights, "save_peft", fail)
    assert_usable(specialize(REGISTRY, **parts))
    assert "can't be kept in" in caplog.text and "LORAGEN_AGENTS_CACHE" in caplog.text
    assert specialize(REGISTRY, **parts).source == "memory"


def test_first_use_in_inference_mode_leaves_ordinary_tensors(parts, tmp_path):
    parts["generator"].save(tmp_path / "generator")
    with torch.inference_mode():
        edge = shared_language_model(str(parts["edge"].folder), device="cpu")
        generator = shared_generator(str(tmp_path / "generator"), cloud=edge, edge=edge)
        made = specialize(REGISTRY, edge=edge, cloud=edge, generator=generator)
    tensors: list[torch.Tensor] = [
        *edge.model.parameters(),
        *generator.parameters(),
        *made.model.decoder.model.parameters(),
    ]
    tensors += [side for pair in made.weights.tensors.values() for side in pair]
    assert not any(tensor.is_inference() for tensor in tensors)


def test_what_nobody_uses_is_freed(parts, tmp_path):
    parts["generator"].save(tmp_path / "generator")

    def use() -> list[weakref.ref[Any]]:
        edge = shared_language_model(str(parts["edge"].folder), device="cpu", dtype="float32")
        generator = shared_generator(str(tmp_path / "generator"), cloud=edge, edge=edge)
        made = specialize(REGISTRY, edge=edge, cloud=edge, generator=generator)
        assert_usable(made)
        assert shared_language_model(str(parts["edge"].folder), device="cpu", dtype="float32") is edge
        assert shared_generator(str(tmp_path / "generator"), cloud=edge, edge=edge) is generator
        return [weakref.ref(one) for one in (edge, edge.model, generator, made.model.decoder.model)]

    used = use()
    gc.collect()
    assert all(one() is not None for one in used)  # a later call finds them loaded
    forget_specializations()
    gc.collect()
    assert [one() for one in used] == [None] * len(used)


def test_threads_make_one_specialisation_once(parts, monkeypatch):
    calls: list[str] = []
    original = type(parts["generator"]).generate_parts

    def generate(self, *args, **kwargs):
        calls.append("generate")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(parts["generator"]), "generate_parts", generate)
    made: list[Specialization] = []
    threads = [threading.Thread(target=lambda: made.append(specialize(REGISTRY, **parts))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == ["generate"]
    assert sorted(one.source for one in made) == ["generated"] + ["memory"] * 5
    assert len({id(one.model) for one in made}) == 1


def test_specialising_leaves_the_edge_model_alone(parts):
    before = {name: tensor.clone() for name, tensor in parts["edge"].model.state_dict().items()}
    specialize(REGISTRY, **parts)
    for name, tensor in parts["edge"].model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_weights_of_a_generator_without_training_are_zero(parts, caplog):
    from loragen_agents.generator import GeneratorConfig, LoRAGenerator

    edge = parts["edge"]
    untrained = LoRAGenerator(GeneratorConfig(n_experts=2, top_k=1, rank=2, router_width=4, cloud_rank=2), edge, edge)
    made = specialize(REGISTRY, edge=edge, cloud=edge, generator=untrained)
    assert made.weights_are_zero
    assert "untrained" in caplog.text
    bare = specialization.SpecializedLM(edge, None, REGISTRY)
    turns = [Turn("Hello")]
    assert decoded(made.model, turns).token_ids == decoded(bare, turns).token_ids


def test_memory_is_bounded_in_number_and_bytes(parts):
    registries = [ToolRegistry([Tool(name=f"tool{n}", description="A tool.")]) for n in range(4)]
    try:
        specialization.bound_specializations(3)
        for registry in registries:
            specialize(registry, **parts)
        kept, size = specialization.specializations_in_memory()
        assert kept == 3
        # Three models of three layers, each with merged matrices of its own.
        assert size >= 3 * 3 * 3 * 32 * 64 * parts["edge"].dtype.itemsize
        specialization.bound_specializations(3, max_bytes=size // 2)
        assert specialization.specializations_in_memory()[0] == 1
        assert specialization.specializations_in_memory()[1] <= size // 2
        specialization.bound_specializations(3, max_bytes=1)
        assert specialize(registries[3], **parts).source == "memory"
        assert specialize(registries[0], **parts).source == "disk"
        assert specialization.specializations_in_memory()[0] == 1
    finally:
        specialization.bound_specializations()
