"""Updates that run beside a model's weights, held against the same updates merged into a copy of them."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from loragen_agents.adapter.lora_weights import LoRAWeights
from loragen_agents.adapter.updates import DownUpdates
from loragen_agents.edge.decoding import Decoder, Sampling
from loragen_agents.edge.grammar import ToolGrammar
from loragen_agents.models.clone import clone_sharing_tensors
from loragen_agents.registry import Tool, ToolRegistry
from tests.tiny_models import SIZES, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PROMPTS = [
    TOKENIZER.encode(text, add_special_tokens=False)
    for text in ("Thought: Do I need to use a tool?", "x", "Action: calculator\nAction Input: 1 + 2")
]
GREEDY = Sampling(max_tokens=10)


def random_weights(seed: int, rank: int = 3) -> LoRAWeights:
    """Large updates of `down_proj` in the last two of three layers."""
    generator = torch.Generator().manual_seed(seed)
    hidden, intermediate = SIZES["hidden_size"], SIZES["intermediate_size"]
    tensors = {
        (layer, "down_proj"): (
            torch.randn(rank, intermediate, generator=generator),
            torch.randn(hidden, rank, generator=generator),
        )
        for layer in (1, 2)
    }
    return LoRAWeights(layers=3, rank=rank, alpha=2.0 * rank, tensors=tensors)


def merged_model(model: PreTrainedModel, weights: LoRAWeights) -> PreTrainedModel:
    copy = clone_sharing_tensors(model)
    weights.merge_into(copy)
    return copy


@torch.no_grad()
def continued(reader: PreTrainedModel, writer: PreTrainedModel, prompt: list[int], count: int = 10) -> tuple[int, ...]:
    """Greedy tokens of `writer` behind a prompt whose states `reader` has made."""
    run: Any = reader
    output = run(torch.tensor([prompt]), use_cache=True)
    tokens: list[int] = []
    while True:
        tokens.append(int(output.logits[0, -1].argmax()))
        if len(tokens) == count or tokens[-1] == TOKENIZER.eos_token_id:
            return tuple(tokens)
        run = writer
        output = run(torch.tensor([tokens[-1:]]), past_key_values=output.past_key_values, use_cache=True)


@pytest.fixture(params=["llama", "gemma"])
def model(request: pytest.FixtureRequest, runtime: str) -> PreTrainedModel:
    """One that is run leanly, and one that transformers' modules run; both on each runtime."""
    return tiny_model(request.param)


def test_updates_do_what_merged_weights_do(model: PreTrainedModel) -> None:
    weights = random_weights(0)
    merged = merged_model(model, weights)
    decoder, updates = Decoder(model, TOKENIZER), DownUpdates.of(weights)
    for prompt in PROMPTS:
        expected = continued(merged, merged, prompt)
        assert expected != continued(model, model, prompt)
        assert decoder.generate([prompt], GREEDY, updates=updates)[0].token_ids == expected
    names = [[5, 6, 7], [8], [9, 10]]
    expected_scores = Decoder(merged, TOKENIZER).score(PROMPTS[0], names)
    assert decoder.score(PROMPTS[0], names, updates=updates) == pytest.approx(expected_scores, abs=1e-3)
    read = decoder.prefill(PROMPTS[2], capture=(1, 2), updates=updates)
    reference = Decoder(merged, TOKENIZER).prefill(PROMPTS[2], capture=(1, 2))
    assert read.activations is not None and reference.activations is not None
    torch.testing.assert_close(read.activations, reference.activations, atol=1e-3, rtol=1e-3)


def test_updates_begin_behind_what_was_read_without_them(model: PreTrainedModel) -> None:
    weights = random_weights(0)
    merged, updates = merged_model(model, weights), DownUpdates.of(weights)
    decoder = Decoder(model, TOKENIZER)
    for _ in range(2):
        read = decoder.prefill(PROMPTS[0])
        completion = decoder.generate([read], GREEDY, updates=updates)[0]
        assert completion.token_ids == continued(model, merged, PROMPTS[0])
        # What was written with the updates is in the store, and must not be used without them.
        followed = [*PROMPTS[0], *completion.token_ids]
        plain = decoder.generate([followed], GREEDY)[0]
        assert plain.token_ids == continued(model, model, followed)
    # The prompt itself was read by the bare model each time.
    assert decoder.generate([PROMPTS[0]], GREEDY)[0].cached_tokens == len(PROMPTS[0]) - 1


def test_prefixes_are_shared_only_where_they_were_read_alike(model: PreTrainedModel) -> None:
    decoder = Decoder(model, TOKENIZER)
    one, other = DownUpdates.of(random_weights(0)), DownUpdates.of(random_weights(1))
    prompt = PROMPTS[2]
    assert decoder.generate([prompt], GREEDY, updates=one)[0].cached_tokens == 0
    assert decoder.generate([prompt], GREEDY, updates=one)[0].cached_tokens == len(prompt) - 1
    assert decoder.generate([prompt], GREEDY, updates=other)[0].cached_tokens == 0
    assert decoder.generate([prompt], GREEDY)[0].cached_tokens == 0
    read = decoder.prefill(prompt)
    assert read.cached_tokens == len(prompt) - 1
    # Behind a read prompt, what other updates wrote before is not reused, what the same wrote is.
    registry = ToolRegistry(
        [Tool(name="ruler", description="Measures.", parameters={"properties": {"q": {"type": "string"}}})]
    )
    grammar = ToolGrammar(registry, TOKENIZER, "ruler")
    for updates in (one, other, one):
        fresh = Decoder(model, TOKENIZER)
        expected = fresh.generate([fresh.prefill(prompt)], Sampling(max_tokens=40), grammar, updates=updates)[0]
        assert decoder.generate([read], Sampling(max_tokens=40), grammar, updates=updates)[0].text == expected.text


def test_rows_of_a_batch_have_their_own_updates(model: PreTrainedModel) -> None:
    decoder = Decoder(model, TOKENIZER)
    values = [DownUpdates.of(random_weights(0)), None, DownUpdates.of(random_weights(1, rank=5))]
    prompts = [PROMPTS[0], PROMPTS[0], PROMPTS[0], *PROMPTS]
    own = [*values, *values]
    alone = [
        Decoder(model, TOKENIZER).generate([p], GREEDY, updates=one)[0] for p, one in zip(prompts, own, strict=True)
    ]
    together = decoder.generate(prompts, GREEDY, updates=own)
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert len({c.token_ids for c in together[:3]}) == 3
    with pytest.raises(ValueError, match="2 prompts can't be run with 1 updates"):
        decoder.generate(PROMPTS[:2], GREEDY, updates=[None])


def test_threads_do_not_see_each_others_updates(model: PreTrainedModel) -> None:
    decoder = Decoder(model, TOKENIZER)
    values = [DownUpdates.of(random_weights(seed)) for seed in range(3)] + [None]
    expected = [Decoder(model, TOKENIZER).generate([PROMPTS[0]], GREEDY, updates=one)[0].token_ids for one in values]

    def run(place: int) -> bool:
        completion = decoder.generate([PROMPTS[0]], GREEDY, updates=values[place % 4])[0]
        return completion.token_ids == expected[place % 4]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(24)))


def test_activations_are_captured_whatever_runs_the_model(model: PreTrainedModel) -> None:
    seen: list[torch.Tensor] = []
    layers: Any = model.model.layers
    handle = layers[1].mlp.down_proj.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    with torch.no_grad():
        model(torch.tensor([PROMPTS[0]]))
    handle.remove()
    read = Decoder(model, TOKENIZER).prefill(PROMPTS[0], capture=(1,))
    assert read.activations is not None
    torch.testing.assert_close(read.activations[0], seen[0][0, -1], atol=1e-4, rtol=1e-4)


def test_updates_that_do_not_fit_are_refused() -> None:
    a, b = torch.zeros(2, 64), torch.zeros(32, 3)
    with pytest.raises(ValueError, match="layer 1 do not fit"):
        DownUpdates({1: (a, b)})
    weights = LoRAWeights(3, 2, 2.0, {(0, "up_proj"): (torch.zeros(2, 32), torch.zeros(64, 2))})
    with pytest.raises(ValueError, match="up_proj"):
        DownUpdates.of(weights)
