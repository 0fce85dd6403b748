import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loragen_agents.adapter.lora_weights import LoRAWeights
from loragen_agents.adapter.unmerged import apply_lora
from loragen_agents.errors import CheckpointError
from loragen_agents.generator import GeneratorConfig, LoRAGenerator, memory_writer
from loragen_agents.generator.checkpoint import ModelIdentity, resolve
from loragen_agents.models.language_models import PROJECTIONS, LanguageModel
from loragen_agents.registry import Tool, ToolRegistry
from tests.tiny_models import SIZES, tiny_model, tiny_tokenizer

LAYERS = SIZES["num_hidden_layers"]
SMALL = GeneratorConfig(n_experts=4, rank=2, alpha=4.0, router_width=6, direct_width=5, cloud_rank=2, cloud_alpha=4.0)
CONFIGS = {
    "shared": SMALL,
    "per layer": replace(SMALL, expert_scope="per_layer"),
    "gumbel": replace(SMALL, routing="gumbel_top_k"),
    "direct": replace(SMALL, generation="direct"),
    "one expert": replace(SMALL, n_experts=1, top_k=1),
}
PROMPTS = ["calculator: works out a sum", "reader: opens a file and shows what it says", "date"]
IDS = torch.arange(3, 33).reshape(3, 10)


def language_model(family: str = "llama", seed: int = 0) -> LanguageModel:
    model = tiny_model(family, seed).requires_grad_(False)
    return LanguageModel(f"tiny-{family}", Path("tiny"), model, tiny_tokenizer(), f"fingerprint-{family}-{seed}")


def generator(case: str = "shared", seed: int = 0, *, trained: bool = True) -> LoRAGenerator:
    """A generator whose tensors have all moved away from their start, as after training."""
    cloud, edge = language_model("qwen", 1), language_model()
    torch.manual_seed(seed)
    made = LoRAGenerator(CONFIGS[case], cloud, edge)
    if trained:
        with torch.no_grad():
            for name, tensor in made.own_tensors().items():
                if tensor.is_floating_point():
                    tensor.add_(torch.randn_like(tensor) / 5)
                if name.endswith("running_var"):
                    tensor.abs_()
    return made


def same(one: LoRAWeights, other: LoRAWeights) -> bool:
    return one.entries == other.entries and all(
        torch.equal(x, y)
        for entry in one.entries
        for x, y in zip(one.tensors[entry], other.tensors[entry], strict=True)
    )


@pytest.mark.parametrize("case", CONFIGS)
def test_an_initialised_generator_changes_nothing(case):
    weights = generator(case, trained=False).generate(PROMPTS[0])
    assert len(weights.entries) == LAYERS * len(PROJECTIONS)
    edge = language_model().model
    assert weights.merge_into(edge).matrices == 0


@pytest.mark.parametrize("case", CONFIGS)
def test_generating_is_deterministic_and_its_own_for_each_prompt(case):
    made = generator(case)
    weights = made.generate(PROMPTS[0])
    assert (weights.layers, weights.rank, weights.alpha) == (LAYERS, 2, 4.0)
    assert same(weights, made.generate(PROMPTS[0]))
    assert same(weights, generator(case).generate(PROMPTS[0]))
    assert same(weights, made.generate(PROMPTS[1])) == (case == "one expert")
    assert not any(tensor.requires_grad for pair in weights.tensors.values() for tensor in pair)


@pytest.mark.parametrize("case", CONFIGS)
def test_a_batch_gives_what_each_prompt_gives_alone(case):
    made = generator(case)
    with torch.no_grad():
        batch = made(PROMPTS).weights
    for prompt, weights in zip(PROMPTS, batch, strict=True):
        alone = made.generate(prompt)
        for entry in alone.entries:
            torch.testing.assert_close(weights.update(*entry), alone.update(*entry), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", CONFIGS)
def test_gradients_reach_every_trainable_parameter(case):
    made = generator(case).train()
    edge = made.edge.model
    generated = made(PROMPTS)
    with apply_lora(edge, generated.weights, rows=[2, 0, 1]):
        loss = edge(IDS, labels=IDS).loss + generated.load_loss
        loss.backward()
    trained = {name: parameter for name, parameter in made.named_parameters() if parameter.requires_grad}
    assert trained.keys() == {name for name, tensor in made.own_tensors().items() if tensor.requires_grad}
    for name, parameter in trained.items():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None for parameter in edge.parameters())


def test_gates_and_load_loss_are_those_of_the_equations():
    made = generator().train()
    generated = made(PROMPTS)
    gates = generated.gates
    assert gates.shape == (3, LAYERS, 4)
    assert ((gates > 0).sum(-1) == 2).all()
    torch.testing.assert_close(gates.sum(-1), torch.ones(3, LAYERS))
    loads = gates.sum((0, 1))
    torch.testing.assert_close(generated.load_loss, 0.01 * loads.var(correction=0) / loads.mean() ** 2)
    a, b = generated.weights[1].tensors[2, "down_proj"]
    experts_a, experts_b = (made.get_parameter(f"producer.{side}.down_proj") for side in "ab")
    torch.testing.assert_close(a, torch.einsum("n,nri->ri", gates[1, 2], experts_a))
    torch.testing.assert_close(b, torch.einsum("n,nor->or", gates[1, 2], experts_b))


def test_one_expert_needs_no_cloud_model():
    made = LoRAGenerator(CONFIGS["one expert"], None, language_model())
    assert made.meta_tokens is None and made(PROMPTS).load_loss == 0
    a, _ = made.generate("").tensors[2, "up_proj"]
    assert torch.equal(a, made.get_parameter("producer.a.up_proj")[0])


def test_gumbel_noise_stops_with_training():
    made = generator("gumbel")
    assert torch.equal(made(PROMPTS).gates, made(PROMPTS).gates)
    made.train()
    assert not torch.equal(made(PROMPTS).gates, made(PROMPTS).gates)


def test_generating_in_training_mode_is_refused():
    with pytest.raises(RuntimeError, match="eval"):
        generator().train().generate(PROMPTS[0])


def test_one_model_on_both_sides_keeps_its_logits():
    both = language_model()
    before = both.model(IDS).logits
    torch.manual_seed(0)
    made = LoRAGenerator(SMALL, both, both)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 5)
    made.train()(PROMPTS)
    made.eval().generate(PROMPTS[0])
    assert torch.equal(both.model(IDS).logits, before)


def test_control_tokens_in_a_prompt_are_plain_text():
    made = generator()
    control = set(tiny_tokenizer().all_special_ids)
    assert control.isdisjoint(made.encode("a tool <|im_end|>\n<|im_start|>system\n"))


def tool(name, description):
    return Tool(name=name, description=description, parameters={"type": "object", "properties": {}})


TOOLS = [tool("date", "Tells the date."), tool("weather", "Tells the weather."), tool("mail", "Sends a letter.")]
REGISTRY = ToolRegistry(TOOLS)


def with_memory(experts=4):
    torch.manual_seed(0)
    config = replace(SMALL, n_experts=experts, memory_layers=2, memory_common_rank=4)
    return LoRAGenerator(config, language_model("qwen", 1), language_model())


def test_the_tool_memory_stands_beside_the_experts():
    made = with_memory()
    plain = made.generate(PROMPTS[0])
    both = made.generate(PROMPTS[0], REGISTRY)
    updates, _ = made.tool_memory(REGISTRY, plain)
    assert {entry for entry in updates.tensors} == {(1, "down_proj"), (2, "down_proj")}
    for layer in range(LAYERS):
        extra = updates.update(layer, "down_proj") if layer else torch.zeros(32, 64)
        torch.testing.assert_close(both.update(layer, "down_proj"), plain.update(layer, "down_proj") + extra)


def test_a_registry_grows_by_a_tool_without_reading_the_others_again(monkeypatch):
    read = []
    whole = memory_writer.read_tools

    def counted(model, renderer, tools, layers, input_format, **settings):
        read.append(len(tools))
        return whole(model, renderer, tools, layers, input_format, **settings)

    monkeypatch.setattr(memory_writer, "read_tools", counted)
    made = with_memory(experts=1)
    made.generate(PROMPTS[0], ToolRegistry(TOOLS[:2]))
    grown = made.generate(PROMPTS[0], REGISTRY)
    assert read == [2, 1]
    assert same(grown, with_memory(experts=1).generate(PROMPTS[0], REGISTRY))
    made.train()
    made.eval().generate(PROMPTS[0], REGISTRY)
    assert read[-1] == 3, "after training nothing that was read is valid any more"


def test_a_checkpoint_carries_the_tool_memory(tmp_path):
    made = with_memory(experts=1)
    with torch.no_grad():
        made.tool_memory.memory.scale.add_(1)
        made.tool_memory.memory.common.normal_()
    loaded = LoRAGenerator.load(made.save(tmp_path), None, made.edge)
    with pytest.raises(ValueError, match="memory_layers is 4"):
        LoRAGenerator(replace(SMALL, memory_layers=4), made.cloud, made.edge)
    assert same(loaded.generate("", REGISTRY), made.generate("", REGISTRY))


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"generation": "magic"}, "generation"),
        ({"expert_scope": "all"}, "expert_scope"),
        ({"routing": "top_p"}, "routing"),
        ({"n_experts": 0}, "n_experts"),
        ({"top_k": 9}, "top_k"),
        ({"rank": 1.5}, "rank"),
        ({"alpha": 0}, "alpha"),
        ({"cloud_dropout": 1.0}, "cloud_dropout"),
        ({"memory_layers": -1}, "memory_layers"),
    ],
)
def test_settings_out_of_range_are_named(setting, named):
    with pytest.raises(ValueError, match=named):
        GeneratorConfig(**setting)


def test_the_papers_settings_are_the_default():
    config = GeneratorConfig()
    assert (config.n_experts, config.top_k, config.load_coefficient) == (8, 2, 0.01)
    assert (config.rank, config.alpha, config.cloud_rank, config.cloud_alpha) == (16, 16, 16, 16)
    assert config.cloud_dropout == 0.05


# Checkpoints


def load(folder: Path, cloud=("qwen", 1), edge=("llama", 0), **options) -> LoRAGenerator:
    return LoRAGenerator.load(folder, language_model(*cloud), language_model(*edge), **options)


@pytest.mark.parametrize("case", CONFIGS)
def test_a_saved_generator_comes_back_as_it_was(case, tmp_path: Path):
    made = generator(case)
    made.notes["trained"] = True
    back = load(made.save(tmp_path))
    assert same(back.generate(PROMPTS[0]), made.generate(PROMPTS[0]))
    assert back.fingerprint == made.fingerprint and back.config == made.config and back.notes == {"trained": True}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["generator.json", "generator.safetensors"]
    stored = load_file(tmp_path / "generator.safetensors")
    assert not any("base_layer" in name or "embed_tokens" in name for name in stored)


def test_bf16_checkpoints_are_half_the_size_and_nearly_the_same(tmp_path: Path):
    made = generator()
    made.save(tmp_path / "full")
    back = load(made.save(tmp_path / "half", dtype=torch.bfloat16))
    half, full = (load_file(tmp_path / name / "generator.safetensors") for name in ("half", "full"))
    assert half["producer.a.up_proj"].dtype == torch.bfloat16
    assert half["router.norm.running_mean"].dtype == torch.float32
    torch.testing.assert_close(half["producer.a.up_proj"].float(), full["producer.a.up_proj"], rtol=2**-8, atol=0)
    assert back.fingerprint == load(tmp_path / "half").fingerprint != made.fingerprint


def test_the_fingerprint_follows_tensors_settings_and_models():
    made = generator()
    first = made.fingerprint
    assert generator().fingerprint == first
    assert generator(seed=1).fingerprint != first
    with torch.no_grad():
        made.get_buffer("router.norm.running_mean")[0] += 1
    assert made.fingerprint != first
    another = replace(made.edge, fingerprint="another")
    for name, value in {"cloud": another, "edge": another, "config": replace(made.config, alpha=2.0)}.items():
        other = generator()
        setattr(other, name, value)
        assert other.fingerprint != first


def test_other_weights_are_refused_unless_allowed(tmp_path: Path):
    generator().save(tmp_path)
    with pytest.raises(CheckpointError, match=r"edge LM.*other weights"):
        load(tmp_path, edge=("llama", 5))
    with pytest.raises(CheckpointError, match=r"cloud LM.*other weights"):
        load(tmp_path, cloud=("qwen", 5))
    load(tmp_path, cloud=("qwen", 5), edge=("llama", 5), allow_other_weights=True)


def test_other_shapes_are_refused_in_any_case(tmp_path: Path):
    generator().save(tmp_path)
    with pytest.raises(CheckpointError, match="does not fit tiny-gemma: model_type llama there, gemma3_text here"):
        load(tmp_path, edge=("gemma", 0), allow_other_weights=True)
    with pytest.raises(CheckpointError, match="needs a cloud LM"):
        LoRAGenerator.load(tmp_path, None, language_model())


def test_a_cloud_model_that_is_not_used_is_not_asked_for(tmp_path: Path):
    made = generator("one expert")
    made.save(tmp_path)
    back = LoRAGenerator.load(tmp_path, None, language_model())
    assert same(back.generate("anything"), made.generate("anything"))
    load(tmp_path, cloud=("gemma", 3))


@pytest.mark.parametrize("name", ["generator.json", "generator.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "garbage"])
def test_damaged_files_are_named(name, damage, tmp_path: Path):
    file = generator().save(tmp_path) / name
    content = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "garbage": b"\xff" * 200}[damage])
    with pytest.raises(CheckpointError, match=name):
        load(tmp_path)


def test_a_flipped_bit_is_found(tmp_path: Path):
    file = generator().save(tmp_path) / "generator.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"generator\.safetensors is damaged"):
        load(tmp_path)


def test_missing_unknown_and_misshapen_tensors_are_named(tmp_path: Path):
    file = generator().save(tmp_path) / "generator.safetensors"
    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if name != "router.f1.bias"}, file)
    with pytest.raises(CheckpointError, match=r"missing: router\.f1\.bias"):
        load(tmp_path)
    save_file(tensors | {"router.f3.bias": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match=r"unknown: router\.f3\.bias"):
        load(tmp_path)
    save_file(tensors | {"router.f1.bias": torch.zeros(99)}, file)
    with pytest.raises(CheckpointError, match=r"router\.f1\.bias has the shape \(99,\)"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"format": "something else"}, "does not describe"),
        ({"version": 99}, "version 99"),
        ({"edge": {"name": "x"}}, "damaged"),
        ({"config": {"n_experts": 4, "n_wizards": 1}}, "n_wizards"),
        ({"config": {"n_experts": "four"}}, "n_experts"),
    ],
)
def test_descriptions_that_make_no_sense_are_refused(change, named, tmp_path: Path):
    file = generator().save(tmp_path) / "generator.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=named):
        load(tmp_path)


def test_identities_carry_name_shapes_and_fingerprint():
    identity = ModelIdentity.of(language_model())
    expected = {"layers": LAYERS, "hidden": SIZES["hidden_size"], "intermediate": SIZES["intermediate_size"]}
    assert {name: getattr(identity, name) for name in expected} == expected
    assert (identity.name, identity.model_type, identity.fingerprint) == ("tiny-llama", "llama", "fingerprint-llama-0")


def test_default_names_the_checkpoint_of_the_package():
    assert resolve("default").parts[-3:] == ("loragen_agents", "checkpoints", "default")
    assert resolve("else/where") == Path("else/where")
