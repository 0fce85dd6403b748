import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from loragen_agents.adapter.lora_weights import LoRAWeights
from loragen_agents.adapter.unmerged import apply_lora
from loragen_agents.errors import CheckpointError
from loragen_agents.models.language_models import PROJECTIONS, gated_ffn_layers
from tests.tiny_models import SIZES, tiny_model

LAYERS, HIDDEN, WIDTH = SIZES["num_hidden_layers"], SIZES["hidden_size"], SIZES["intermediate_size"]
SHAPES = {"gate_proj": (HIDDEN, WIDTH), "up_proj": (HIDDEN, WIDTH), "down_proj": (WIDTH, HIDDEN)}
IDS = torch.arange(3, 27).reshape(2, 12)


def random_weights(rank: int = 4, alpha: float = 8.0, seed: int = 0, entries=None, own_ranks=None) -> LoRAWeights:
    generator = torch.Generator().manual_seed(seed)
    entries = entries or [(layer, projection) for layer in range(LAYERS) for projection in PROJECTIONS]
    tensors = {}
    for entry in entries:
        size_in, size_out = SHAPES[entry[1]]
        own = (own_ranks or {}).get(entry, rank)
        tensors[entry] = (
            torch.randn(own, size_in, generator=generator) / 3,
            torch.randn(size_out, own, generator=generator) / 3,
        )
    return LoRAWeights(LAYERS, rank, alpha, tensors)


def state(model) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def logits(model, ids: Tensor = IDS) -> Tensor:
    return model(ids).logits


def test_update_follows_the_formula_on_numbers_worked_out_by_hand():
    a = torch.tensor([[1.0, 2.0, 3.0]])
    b = torch.tensor([[10.0], [20.0]])
    weights = LoRAWeights(1, 2, 6.0, {(0, "up_proj"): (a, b)})
    assert weights.scaling == 3.0
    # alpha / rank stays 6 / 2, although this entry's own rank is 1.
    assert torch.equal(weights.update(0, "up_proj"), torch.tensor([[30.0, 60.0, 90.0], [60.0, 120.0, 180.0]]))


def test_entries_that_do_not_fit_are_refused():
    good = (torch.zeros(2, 5), torch.zeros(7, 2))
    with pytest.raises(ValueError, match="layer below 1"):
        LoRAWeights(1, 2, 2.0, {(1, "up_proj"): good})
    with pytest.raises(ValueError, match="q_proj"):
        LoRAWeights(1, 2, 2.0, {(0, "q_proj"): good})
    with pytest.raises(ValueError, match="do not fit"):
        LoRAWeights(1, 2, 2.0, {(0, "up_proj"): (torch.zeros(3, 5), torch.zeros(7, 2))})


def test_concatenate_adds_the_updates_up_whatever_the_scalings():
    first = random_weights(rank=4, alpha=8.0)
    second = random_weights(rank=3, alpha=1.5, seed=1, entries=[(0, "down_proj"), (2, "down_proj")])
    both = first.concatenate(second)
    assert (both.rank, both.alpha) == (4, 8.0)
    assert both.tensors[0, "down_proj"][0].shape[0] == 7
    for entry in first.tensors:
        expected = first.update(*entry)
        if entry in second.tensors:
            expected = expected + second.update(*entry)
        torch.testing.assert_close(both.update(*entry), expected)


def test_concatenate_takes_over_entries_that_only_the_other_has():
    first = random_weights(entries=[(0, "up_proj")], alpha=4.0)
    second = random_weights(entries=[(1, "down_proj")], alpha=8.0, seed=1)
    torch.testing.assert_close(first.concatenate(second).update(1, "down_proj"), second.update(1, "down_proj"))


def test_concatenate_refuses_weights_of_another_model():
    other = LoRAWeights(LAYERS, 1, 1.0, {(0, "up_proj"): (torch.zeros(1, HIDDEN + 1), torch.zeros(WIDTH, 1))})
    with pytest.raises(ValueError, match=r"\(0, 'up_proj'\)"):
        random_weights().concatenate(other)
    with pytest.raises(ValueError, match="layers"):
        random_weights().concatenate(LoRAWeights(LAYERS + 1, 1, 1.0, {}))


@pytest.mark.parametrize("family", ["llama", "qwen", "gemma"])
def test_merging_changes_each_matrix_by_its_update_and_restores_bit_for_bit(family):
    model = tiny_model(family)
    before, weights = state(model), random_weights(alpha=6.0)
    with weights.merge_into(model) as merged:
        assert merged.matrices == 3 * LAYERS
        for layer, (_, mlp) in enumerate(gated_ffn_layers(model)):
            for projection in PROJECTIONS:
                a, b = weights.tensors[layer, projection]
                name = next(n for n in before if n.endswith(f"layers.{layer}.mlp.{projection}.weight"))
                torch.testing.assert_close(getattr(mlp, projection).weight, before[name] + 1.5 * b @ a)
        assert not torch.equal(logits(model), logits(tiny_model(family)))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_merging_in_bf16_rounds_once():
    model, weights = tiny_model(dtype=torch.bfloat16), random_weights()
    original = model.model.layers[1].mlp.up_proj.weight.float()
    weights.merge_into(model)
    expected = (original + weights.update(1, "up_proj")).bfloat16()
    merged = model.model.layers[1].mlp.up_proj.weight
    assert merged.dtype == torch.bfloat16
    # The order of float32 additions may differ between the two, hence one unit of bf16 at a rounding border.
    assert (merged != expected).float().mean() < 0.01
    torch.testing.assert_close(merged.float(), expected.float(), rtol=2**-7, atol=0)


def test_merging_leaves_a_model_that_shares_the_tensors_alone():
    model, other = tiny_model(), tiny_model()
    other.model.layers[0].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    before = logits(other)
    random_weights().merge_into(model)
    assert torch.equal(logits(other), before)


def test_zero_updates_are_not_copied():
    model, weights = tiny_model(), random_weights()
    tensors = {entry: (a, torch.zeros_like(b)) for entry, (a, b) in weights.tensors.items()}
    tensors[1, "down_proj"] = weights.tensors[1, "down_proj"]
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    merged = LoRAWeights(LAYERS, 4, 8.0, tensors).merge_into(model)
    assert merged.matrices == 1
    moved = [name for name, parameter in model.named_parameters() if parameter.data_ptr() != before[name]]
    assert moved == ["model.layers.1.mlp.down_proj.weight"]


def test_merges_are_restored_in_reverse_order_only():
    model = tiny_model()
    before = state(model)
    first, second = random_weights().merge_into(model), random_weights(seed=1).merge_into(model)
    with pytest.raises(RuntimeError, match="restore them first"):
        first.restore()
    second.restore()
    first.restore()
    first.restore()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_merging_refuses_another_model_before_it_changes_anything():
    model = tiny_model()
    before = state(model)
    with pytest.raises(ValueError, match="2 layers"):
        LoRAWeights(2, 1, 1.0, {}).merge_into(model)
    wrong = dict(random_weights().tensors)
    wrong[2, "down_proj"] = (torch.ones(1, WIDTH + 1), torch.ones(HIDDEN, 1))
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.down_proj"):
        LoRAWeights(LAYERS, 4, 8.0, wrong).merge_into(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", ["llama", "qwen", "gemma"])
def test_applied_weights_give_what_merged_weights_give(family):
    model, weights = tiny_model(family), random_weights()
    bare = logits(model)
    with apply_lora(model, weights):
        applied = logits(model)
    assert torch.equal(logits(model), bare)
    with weights.merge_into(model):
        torch.testing.assert_close(applied, logits(model), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(applied, bare, atol=0.1)


def test_applied_weights_per_row_equal_one_registry_at_a_time():
    model = tiny_model()
    several = [
        random_weights(),
        random_weights(rank=2, alpha=6.0, seed=1),
        random_weights(seed=2, entries=[(0, "up_proj"), (2, "down_proj")], own_ranks={(2, "down_proj"): 9}),
    ]
    ids = torch.arange(3, 43).reshape(4, 10)
    rows = [2, 0, 1, 0]
    with apply_lora(model, several, rows):
        batch = logits(model, ids)
    for row, index in enumerate(rows):
        with apply_lora(model, several[index]):
            torch.testing.assert_close(batch[row], logits(model, ids[row : row + 1])[0], rtol=1e-3, atol=1e-3)


def test_nested_contexts_add_up():
    model = tiny_model()
    first, second = random_weights(), random_weights(rank=2, seed=1, entries=[(1, "down_proj")])
    with apply_lora(model, first), apply_lora(model, second):
        nested = logits(model)
    with apply_lora(model, first.concatenate(second)):
        torch.testing.assert_close(nested, logits(model), rtol=1e-3, atol=1e-3)


def test_gradients_of_applied_weights_equal_those_of_merged_matrices():
    model = tiny_model().requires_grad_(False)
    weights = random_weights()
    for pair in weights.tensors.values():
        for tensor in pair:
            tensor.requires_grad_()
    with apply_lora(model, [weights], rows=[0, 0]):
        model(IDS).logits.square().mean().backward()
    # Chain rule by hand, with dL/dW from a model whose own weight is trainable: dL/dB = s · dL/dW · Aᵀ.
    a, b = (tensor.detach() for tensor in weights.tensors[1, "up_proj"])
    weights.detach().merge_into(model)
    full = model.get_parameter("model.layers.1.mlp.up_proj.weight").requires_grad_()
    (gradient,) = torch.autograd.grad(model(IDS).logits.square().mean(), full)
    b_grad, a_grad = 2.0 * gradient @ a.T, 2.0 * b.T @ gradient
    torch.testing.assert_close(weights.tensors[1, "up_proj"][1].grad, b_grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(weights.tensors[1, "up_proj"][0].grad, a_grad, rtol=1e-3, atol=1e-5)
    gradients = [tensor.grad for pair in weights.tensors.values() for tensor in pair]
    assert all(one is not None and one.abs().sum() > 0 for one in gradients)


def test_hooks_go_when_the_model_fails():
    model = tiny_model()
    before = logits(model)
    with pytest.raises(ValueError, match="batch rows"), apply_lora(model, [random_weights()], rows=[0, 0, 0]):
        model(IDS)
    assert torch.equal(logits(model), before)


def test_rows_are_checked():
    model = tiny_model()
    with pytest.raises(ValueError, match="below 1"), apply_lora(model, [random_weights()], rows=[0, 1]):
        pass
    with pytest.raises(ValueError, match="several"), apply_lora(model, random_weights(), rows=[0, 0]):
        pass
    with pytest.raises(ValueError, match="at least one"), apply_lora(model, []):
        pass


def paths_of(model) -> list[str]:
    return [path for path, _ in gated_ffn_layers(model)]


MIXED: dict[str, dict[str, Any]] = {
    "same rank everywhere": dict(),
    "one projection of some layers": dict(entries=[(1, "down_proj"), (2, "down_proj")]),
    "own ranks": dict(own_ranks={(2, "down_proj"): 11, (0, "up_proj"): 1}, alpha=6.0),
    "fractional alpha": dict(own_ranks={(1, "down_proj"): 3}, alpha=3.5),
}


@pytest.mark.parametrize("family", ["llama", "qwen", "gemma"])
@pytest.mark.parametrize("case", MIXED)
def test_peft_gives_the_logits_of_the_merged_model(family, case, tmp_path: Path):
    model, weights = tiny_model(family), random_weights(**MIXED[case])
    weights.save_peft(tmp_path, "tiny", paths_of(model))
    adapted = PeftModel.from_pretrained(tiny_model(family), tmp_path)
    with weights.merge_into(model):
        torch.testing.assert_close(logits(adapted), logits(model), rtol=1e-3, atol=1e-3)
    touched = [name for name, module in adapted.named_modules() if hasattr(module, "lora_A")]
    assert len(touched) == len(weights.tensors)
    assert all(any(name.endswith(f"layers.{layer}.mlp.{kind}") for name in touched) for layer, kind in weights.tensors)


@pytest.mark.parametrize("case", MIXED)
def test_peft_folder_comes_back_as_it_went(case, tmp_path: Path):
    weights = random_weights(**MIXED[case])
    weights.save_peft(tmp_path, "tiny", paths_of(tiny_model()))
    back = LoRAWeights.load_peft(tmp_path)
    assert (back.layers, back.rank, back.alpha) == (weights.layers, weights.rank, weights.alpha)
    assert back.entries == weights.entries
    for entry in weights.entries:
        assert all(torch.equal(x, y) for x, y in zip(back.tensors[entry], weights.tensors[entry], strict=True))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_folders_that_peft_wrote_are_read(tmp_path: Path):
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["up_proj", "down_proj"],
        init_lora_weights=False,
        rank_pattern={"layers.1.mlp.up_proj": 2},
        alpha_pattern={"down_proj": 2},
    )
    adapted = get_peft_model(tiny_model(), config)
    adapted.save_pretrained(str(tmp_path))
    weights, model = LoRAWeights.load_peft(tmp_path), tiny_model()
    assert (weights.layers, weights.rank, weights.alpha) == (LAYERS, 4, 8)
    with weights.merge_into(model):
        torch.testing.assert_close(logits(model), logits(adapted.eval()), rtol=1e-3, atol=1e-3)


def test_saving_needs_a_path_for_every_layer_and_an_entry(tmp_path: Path):
    with pytest.raises(ValueError, match="2 module paths"):
        random_weights().save_peft(tmp_path, "tiny", ["a", "b"])
    with pytest.raises(ValueError, match="no entry"):
        LoRAWeights(1, 1, 1.0, {}).save_peft(tmp_path, "tiny", ["a"])


def saved(folder: Path) -> tuple[Path, Path]:
    random_weights().save_peft(folder, "tiny", paths_of(tiny_model()))
    return folder / "adapter_config.json", folder / "adapter_model.safetensors"


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "garbage"])
def test_damaged_files_are_named(which, damage, tmp_path: Path):
    file = saved(tmp_path)[which]
    content = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "garbage": b"\xff" * 200}[damage])
    with pytest.raises(CheckpointError, match=file.name):
        LoRAWeights.load_peft(tmp_path)


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"use_dora": True}, "use_dora"),
        ({"use_rslora": True}, "use_rslora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": 0}, "positive"),
        ({"r": True}, "positive"),
        ({"lora_alpha": float("nan")}, "positive numbers, found 4 and nan"),
        ({"lora_alpha": float("inf")}, "positive"),
        ({"rank_pattern": ["up_proj"]}, "rank_pattern must be an object"),
        ({"rank_pattern": {"(up": 4}}, r"'\(up' in rank_pattern is no regular expression"),
        ({"rank_pattern": {"up_proj": "4"}}, "'up_proj' in rank_pattern must be a positive number, found '4'"),
        ({"alpha_pattern": {"up_proj": float("nan")}}, "'up_proj' in alpha_pattern must be a positive number"),
        ({"r": 5}, "rank 5"),
    ],
)
def test_adapters_that_are_more_than_plain_lora_are_refused(setting, named, tmp_path: Path):
    config_file, _ = saved(tmp_path)
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | setting))
    with pytest.raises(CheckpointError, match=named):
        LoRAWeights.load_peft(tmp_path)


def test_tensors_that_are_missing_or_foreign_are_named(tmp_path: Path):
    _, tensor_file = saved(tmp_path)
    tensors = load_file(tensor_file)
    lost = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, tensor_file)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj"):
        LoRAWeights.load_peft(tmp_path)
    save_file(tensors | {"base_model.model.lm_head.lora_A.weight": torch.zeros(1, 1)}, tensor_file)
    with pytest.raises(CheckpointError, match="lm_head"):
        LoRAWeights.load_peft(tmp_path)
