import pytest
import torch

from loragen_agents.errors import PromptError
from loragen_agents.generator.meta_tokens import MetaTokens
from tests.tiny_models import SIZES, tiny_model

HIDDEN = SIZES["hidden_size"]
PROMPTS = [[5, 9, 12, 40, 7], [8, 30], list(range(10, 33))]


def meta_tokens(model, **settings) -> MetaTokens:
    torch.manual_seed(0)
    return MetaTokens(model, 4, **({"rank": 3, "alpha": 6.0, "dropout": 0.0} | settings)).eval()


def train_a_little(module: MetaTokens) -> None:
    """Make the LoRA on q and v differ from zero, through an optimiser as in training."""
    optimiser = torch.optim.SGD([p for n, p in module.named_parameters() if ".lora_" in n], lr=1.0)
    torch.manual_seed(1)
    for parameter in optimiser.param_groups[0]["params"]:
        parameter.grad = torch.randn_like(parameter) / 5
    optimiser.step()


@pytest.mark.parametrize("family", ["llama", "qwen", "gemma"])
def test_states_are_those_of_the_model_with_its_lora_worked_out_by_hand(family):
    model = tiny_model(family)
    module = meta_tokens(model)
    train_a_little(module)
    reference = tiny_model(family)
    for name, parameter in module.named_parameters():
        if ".lora_A" in name:
            b = module.get_parameter(name.replace("lora_A", "lora_B"))
            weight = reference.get_parameter(f"{name.removeprefix('cloud.').split('.lora_A')[0]}.weight")
            with torch.no_grad():
                weight.add_(6.0 / 3 * b @ parameter)
    with torch.no_grad():
        for prompt in PROMPTS:
            words = reference.get_input_embeddings()(torch.tensor([prompt]))
            inputs = torch.cat([words, module.embeddings[None]], dim=1)
            expected = reference.base_model(inputs_embeds=inputs).last_hidden_state[:, -4:]
            torch.testing.assert_close(module([prompt]), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen", "gemma"])
def test_a_batch_gives_what_each_prompt_gives_alone(family):
    module = meta_tokens(tiny_model(family))
    train_a_little(module)
    for states in (module, module.merged_states):
        batch = states(PROMPTS)
        assert batch.shape == (3, 4, HIDDEN) and batch.dtype == torch.float32
        for row, prompt in enumerate(PROMPTS):
            torch.testing.assert_close(batch[row], states([prompt])[0], rtol=1e-4, atol=1e-5)


def test_merged_states_follow_the_training():
    module = meta_tokens(tiny_model())
    for _ in range(2):
        torch.testing.assert_close(module.merged_states(PROMPTS), module(PROMPTS).detach(), rtol=1e-3, atol=1e-4)
        before = module.merged_states(PROMPTS)
        train_a_little(module)
        assert not torch.allclose(module.merged_states(PROMPTS), before, atol=1e-2)
    assert not module.merged_states(PROMPTS).requires_grad


def test_the_merge_is_kept_between_passes():
    module = meta_tokens(tiny_model())
    train_a_little(module)
    assert module._merged_cloud() is module._merged_cloud()


def test_the_model_that_was_handed_in_computes_what_it_did_before():
    model = tiny_model()
    names = list(model.state_dict())
    before = model(torch.tensor(PROMPTS[:1])).logits
    module = meta_tokens(model)
    train_a_little(module)
    module.train()(PROMPTS)
    module.eval().merged_states(PROMPTS)
    assert torch.equal(model(torch.tensor(PROMPTS[:1])).logits, before)
    assert list(model.state_dict()) == names and not model.training


def test_frozen_weights_are_shared_not_copied():
    model = tiny_model()
    module = meta_tokens(model)
    train_a_little(module)
    own = {id(p) for n, p in module.named_parameters() if ".lora_" in n or n == "embeddings"}
    assert {id(p) for p in module.parameters()} - own == {id(p) for p in model.parameters()}
    merged = module._merged_cloud()
    changed = {n for n, p in merged.named_parameters() if p is not model.get_parameter(n)}
    projections = {f"model.layers.{n}.self_attn.{p}.weight" for n in range(3) for p in ("q_proj", "v_proj")}
    assert changed == projections


def test_gradients_reach_the_embeddings_and_the_lora_alone():
    module = meta_tokens(tiny_model())
    train_a_little(module)
    module.train()(PROMPTS).square().sum().backward()
    for name, parameter in module.named_parameters():
        trained = ".lora_" in name or name == "embeddings"
        assert parameter.requires_grad == trained, name
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == trained, name


def test_dropout_works_in_training_only():
    module = meta_tokens(tiny_model(), dropout=0.5)
    train_a_little(module)
    assert torch.equal(module(PROMPTS), module(PROMPTS))
    module.train()
    assert not torch.equal(module(PROMPTS), module(PROMPTS))


def test_adapters_of_a_bf16_model_are_kept_in_float32():
    module = meta_tokens(tiny_model(dtype=torch.bfloat16))
    assert {p.dtype for n, p in module.named_parameters() if ".lora_" in n} == {torch.float32}
    train_a_little(module)
    states = module(PROMPTS)
    assert states.dtype == torch.float32
    merged = module.merged_states(PROMPTS)
    assert (merged - states).norm() < 0.05 * states.norm()


def test_prompts_beyond_the_context_are_refused():
    model = tiny_model()
    model.config.max_position_embeddings = 20
    module = meta_tokens(model)
    module([list(range(10, 26))])
    with pytest.raises(PromptError, match="17 tokens, and the cloud LM takes 16"):
        module([list(range(10, 27))])
