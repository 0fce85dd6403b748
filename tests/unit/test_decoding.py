"""Decoding on tiny random models, held against transformers' own `generate` and forward pass."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
)

from loragen_agents.adapter.lora_weights import LoRAWeights
from loragen_agents.adapter.unmerged import apply_lora
from loragen_agents.edge import decoding
from loragen_agents.edge.decoding import Completion, Decoder, PrefilledPrompt, Sampling
from loragen_agents.edge.forward import Runtime
from loragen_agents.edge.kv_cache import KVCache, PrefixStore
from loragen_agents.edge.lean_forward import LeanForward, _linear_in_float32
from loragen_agents.edge.module_forward import ModuleForward
from loragen_agents.errors import ModelLoadError, PromptError
from loragen_agents.models.arrangement import arrange_weights
from loragen_agents.models.clone import clone_sharing_tensors
from tests.tiny_models import SIZES, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PROMPTS = [
    TOKENIZER.encode(text, add_special_tokens=False)
    for text in (
        "<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\n",
        "Thought: Do I need to use a tool?",
        "x",
        "Action: calculator\nAction Input: 1 + 2\nObservation: 3, and so on, and so on, and so on",
    )
]


def family_model(family: str) -> PreTrainedModel:
    """The tiny models of the suite, and three that are run another way: Gemma 1, a window, a window in some layers."""
    sizes = {**SIZES, "vocab_size": len(TOKENIZER), "num_key_value_heads": 2}
    torch.manual_seed(0)
    model: PreTrainedModel
    if family == "gemma1":
        model = GemmaForCausalLM(GemmaConfig(**sizes, head_dim=8))
    elif family == "mistral_window":
        model = MistralForCausalLM(MistralConfig(**sizes, sliding_window=5))
    else:
        model = tiny_model(family)
        if family == "gemma":
            assert "sliding_attention" in model.config.layer_types
            model.config.sliding_window = 5
            layers: Any = model.model.layers
            for layer in layers:
                if layer.self_attn.sliding_window is not None:
                    layer.self_attn.sliding_window = 5
        return model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
            elif "norm" in name:
                parameter.normal_()
    model.generation_config.eos_token_id = TOKENIZER.eos_token_id
    return model.eval()


FAMILIES = ["llama", "qwen", "gemma", "gemma1", "mistral_window"]


def reference(model: PreTrainedModel, prompt: list[int], count: int = 12) -> tuple[int, ...]:
    """Greedy tokens by transformers' generate."""
    ids = torch.tensor([prompt])
    generate: Any = model.generate
    output = generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return tuple(output[0, len(prompt) :].tolist())


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small are slower on several threads, and far slower on a machine that has other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def llama() -> Decoder:
    return Decoder(tiny_model("llama"), TOKENIZER)


def test_which_models_are_run_leanly() -> None:
    kinds = {family: type(Runtime(family_model(family), "torch").bind()) for family in FAMILIES}
    assert kinds == {
        "llama": LeanForward,
        "qwen": LeanForward,
        "gemma1": LeanForward,
        "gemma": ModuleForward,
        "mistral_window": ModuleForward,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_equals_the_models_own(family: str, dtype: torch.dtype) -> None:
    model = family_model(family)
    model.to(dtype)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, len(TOKENIZER), (2, 20), generator=generator)
    tolerance = 2e-5 if dtype == torch.float32 else 0.05
    # Rows of different lengths, fed one, several or no tokens at a time.
    feeding = [(9, 1), (1, 1), (0, 4), (5, 7), (1, 1), (4, 0)]
    with torch.inference_mode():
        expected = model(ids).logits
        for forward in (Runtime(model, "torch").bind(), ModuleForward(model)):
            cache = KVCache(2)
            for counts in feeding:
                width = max(counts)
                fed = torch.zeros(2, width, dtype=torch.long)
                for row, count in enumerate(counts):
                    start = cache.lengths[row]
                    fed[row, :count] = ids[row, start : start + count]
                keep = torch.arange(width).expand(2, -1)
                logits = forward(fed, cache, keep)
                for row, count in enumerate(counts):
                    start = cache.lengths[row]
                    difference = logits[row, :count] - expected[row, start : start + count]
                    assert difference.numel() == 0 or difference.abs().max() < tolerance
                cache.advance(counts)
            assert cache.lengths == [20, 14]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate(family: str, runtime: str) -> None:
    model = family_model(family)
    decoder = Decoder(model, TOKENIZER)
    for prompt in PROMPTS:
        completion = decoder.stream(prompt, Sampling(max_tokens=12))
        text = "".join(completion)
        assert completion.completion.token_ids == reference(model, prompt)
        assert text == completion.completion.text


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.5, "top_p": 0.9, "seed": 3}])
def test_batch_equals_one_by_one(family: str, settings: dict, runtime: str) -> None:
    sampling = Sampling(max_tokens=9, **settings)
    decoder = Decoder(family_model(family), TOKENIZER)
    alone = [decoder.generate([prompt], sampling)[0] for prompt in PROMPTS]
    decoder.prefixes.clear()
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        together = decoder.generate([PROMPTS[place] for place in order], sampling, batch_size=3)
        assert [c.token_ids for c in together] == [alone[place].token_ids for place in order]
        assert [c.text for c in together] == [alone[place].text for place in order]


def test_rows_of_a_batch_end_for_themselves(llama: Decoder) -> None:
    first = reference(llama.model, PROMPTS[0], 12)
    stopping = Decoder(llama.model, TOKENIZER, stop_token_ids=[first[4]])
    done = stopping.generate(PROMPTS, Sampling(max_tokens=12))
    for prompt, completion in zip(PROMPTS, done, strict=True):
        free = reference(llama.model, prompt, 12)
        if first[4] in free:
            assert completion.finish_reason == "stop"
            assert completion.token_ids == free[: free.index(first[4]) + 1]
            assert completion.text == TOKENIZER.decode(list(completion.token_ids[:-1]))
        else:
            assert (completion.finish_reason, completion.token_ids) == ("length", free)
    assert {completion.finish_reason for completion in done} == {"stop", "length"}


def test_stop_tokens_default_to_the_models(llama: Decoder) -> None:
    assert llama.stop_token_ids == {TOKENIZER.eos_token_id}
    model = tiny_model("llama")
    model.generation_config.eos_token_id = [5, 6]
    assert Decoder(model, TOKENIZER).stop_token_ids == {5, 6, TOKENIZER.eos_token_id}


def test_stop_strings_cut_text_and_stream(llama: Decoder) -> None:
    sampling = Sampling(max_tokens=40, temperature=1.0, seed=5)
    free = llama.generate([PROMPTS[1]], sampling)[0].text
    for start, length in ((3, 1), (8, 4), (15, 6)):
        stop = free[start : start + length]
        expected = free[: free.index(stop)]
        stream = llama.stream(PROMPTS[1], Sampling(max_tokens=40, temperature=1.0, seed=5, stop=("never seen", stop)))
        pieces = list(stream)
        assert "".join(pieces) == stream.completion.text == expected
        assert stream.completion.finish_reason == "stop"
        assert len(stream.completion.token_ids) < 40


def test_a_seed_makes_sampling_reproducible(llama: Decoder) -> None:
    def draw(seed: int | None, **settings: float) -> tuple[int, ...]:
        sampling = Sampling(max_tokens=20, temperature=2.0, seed=seed, **settings)  # type: ignore[arg-type]
        return llama.generate([PROMPTS[0]], sampling)[0].token_ids

    assert draw(1) == draw(1) != draw(2)
    assert draw(None) != draw(None)
    assert draw(1, top_k=1) == reference(llama.model, PROMPTS[0], 20)
    assert draw(1, top_p=1e-6) == reference(llama.model, PROMPTS[0], 20)


def test_top_k_and_top_p_rule_out_the_unlikely() -> None:
    from loragen_agents.edge.sampling import pick

    shares = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15])

    def drawn(**settings: float) -> set[int]:
        generator = torch.Generator().manual_seed(0)
        sampling = Sampling(temperature=1.0, **settings)  # type: ignore[arg-type]
        return {pick(shares.log(), sampling, generator) for _ in range(300)}

    assert drawn() == {0, 1, 2, 3, 4}
    assert drawn(top_k=2) == {1, 3}
    assert drawn(top_p=0.65) == {1, 3}
    assert drawn(top_p=0.71) == {1, 3, 4}
    assert drawn(top_p=0.71, top_k=2) == {1, 3}
    # More tokens than are looked at first are needed to hold this probability.
    generator = torch.Generator().manual_seed(0)
    flat = torch.zeros(1000)
    assert max(pick(flat, Sampling(temperature=1.0, top_p=0.999), generator) for _ in range(300)) > 900


def test_sampling_follows_the_distribution() -> None:
    from loragen_agents.edge.sampling import pick

    shares = torch.tensor([0.2, 0.5, 0.3])
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(3)
    for _ in range(1500):
        counts[pick(shares.log() * 2, Sampling(temperature=2.0, top_p=0.999), generator)] += 1
    assert torch.allclose(counts / 1500, shares, atol=0.04)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_tokens": 0},
        {"temperature": -1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"stop": "x"},
        {"stop": ("",)},
    ],
)
def test_sampling_refuses_what_makes_no_sense(settings: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        Sampling(**settings)


def test_cancelling_keeps_what_was_generated(llama: Decoder) -> None:
    cancel = threading.Event()
    whole = llama.generate([PROMPTS[0]], Sampling(max_tokens=30))[0]
    stream = llama.stream(PROMPTS[0], Sampling(max_tokens=30), cancel=cancel)
    pieces = [next(stream)]
    cancel.set()
    pieces += list(stream)
    completion = stream.completion
    assert completion.finish_reason == "cancelled"
    assert 0 < len(completion.token_ids) < 30
    assert whole.token_ids[: len(completion.token_ids)] == completion.token_ids
    assert "".join(pieces) == completion.text
    # Cancelled before it began: nothing was generated, and that is no error.
    nothing = llama.generate(PROMPTS[:2], cancel=cancel)
    assert [(c.finish_reason, c.text, c.token_ids) for c in nothing] == [("cancelled", "", ())] * 2


def test_closing_a_stream_ends_it(llama: Decoder) -> None:
    stream = llama.stream(PROMPTS[0], Sampling(max_tokens=30))
    next(stream)
    with pytest.raises(RuntimeError, match="read to its end or closed"):
        _ = stream.completion
    stream.close()
    assert stream.completion.finish_reason == "cancelled"
    assert list(stream) == []
    untouched = llama.stream(PROMPTS[0])
    untouched.close()
    assert untouched.completion.token_ids == ()


def test_a_stream_leaves_torchs_modes_alone(llama: Decoder) -> None:
    stream = llama.stream(PROMPTS[0], Sampling(max_tokens=3))
    next(stream)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_kept_prefix_changes_nothing_but_the_reading(family: str, runtime: str) -> None:
    model = family_model(family)
    decoder = Decoder(model, TOKENIZER)
    first = decoder.generate([PROMPTS[3]], Sampling(max_tokens=6))[0]
    assert first.cached_tokens == 0
    # An agent's next prompt: the last one, what was generated, and the tool's report.
    following = [*PROMPTS[3], *first.token_ids, *PROMPTS[0]]
    second = decoder.generate([following], Sampling(max_tokens=10))[0]
    # The last generated token was never read.
    assert second.cached_tokens == len(PROMPTS[3]) + 5
    assert second.token_ids == reference(model, following, 10)
    # The same prompt again, and one that leaves it half-way.
    assert decoder.generate([following], Sampling(max_tokens=10))[0].cached_tokens == len(following) - 1
    other = [*following[:20], *PROMPTS[1]]
    third = decoder.generate([other], Sampling(max_tokens=10))[0]
    assert third.cached_tokens >= 20
    assert third.token_ids == reference(model, other, 10)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_bf16_states_do_not_depend_on_what_was_read_before(family: str) -> None:
    decoder = Decoder(family_model(family).to(torch.bfloat16), TOKENIZER)  # type: ignore[arg-type]
    prompt = PROMPTS[3] * 8
    assert len(prompt) > 2 * decoding._ALIGNED

    def fresh() -> PrefilledPrompt:
        decoder.prefixes.clear()
        return decoder.prefill(prompt)

    expected = fresh()
    assert expected.cached_tokens == 0
    # The same again: whole passes are not read anew, the rest is.
    assert decoder.prefill(prompt).cached_tokens == len(prompt) // decoding._ALIGNED * decoding._ALIGNED

    def the_same() -> None:
        found = decoder.prefill(prompt)
        assert torch.equal(found.logits, expected.logits)
        for own, other in zip(found.states.layers, expected.states.layers, strict=True):
            assert torch.equal(own, other)

    the_same()
    for length in (1, 5, 70, 128, 129, 200, len(prompt) - 1):
        decoder.prefixes.clear()
        decoder.prefill(prompt[:length], pin=length == 200)
        the_same()
    # What was generated is read one token at a time, what a batch shares in wide passes.
    decoder.prefixes.clear()
    generated = decoder.generate([prompt[:100]], Sampling(max_tokens=60))[0]
    prompt = [*prompt[:100], *generated.token_ids, *prompt]
    expected = fresh()
    decoder.prefixes.clear()
    decoder.generate([prompt[:100]], Sampling(max_tokens=60))
    the_same()
    decoder.prefixes.clear()
    decoder.generate([[*prompt[:150], 7], [*prompt[:150], 8, 9]], Sampling(max_tokens=2))
    the_same()


def test_cancelling_ends_the_reading_of_a_long_bf16_prompt() -> None:
    decoder = Decoder(tiny_model("llama", dtype=torch.bfloat16), TOKENIZER)
    cancel = threading.Event()
    stream = decoder.stream(PROMPTS[3] * 20, Sampling(max_tokens=3), cancel=cancel)
    original = decoder._forward()
    passes = 0

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal passes
        passes += 1
        cancel.set()
        return original(*args, **kwargs)

    counted.cache = original.cache  # type: ignore[attr-defined]
    decoder._bound = counted  # type: ignore[assignment]
    assert list(stream) == []
    assert stream.completion.finish_reason == "cancelled"
    assert passes == 1


def test_a_batch_reads_a_shared_head_once(llama: Decoder) -> None:
    decoder = Decoder(llama.model, TOKENIZER)
    head = PROMPTS[3] * 3
    prompts = [[*head, *prompt] for prompt in PROMPTS]
    done = decoder.generate(prompts, Sampling(max_tokens=6))
    assert all(completion.cached_tokens >= len(head) for completion in done)
    for prompt, completion in zip(prompts, done, strict=True):
        assert completion.token_ids == reference(llama.model, prompt, 6)
    # Equal prompts share all but the last token.
    same = decoder.generate([prompts[0]] * 2, Sampling(max_tokens=6))
    assert [c.token_ids for c in same] == [done[0].token_ids] * 2


def test_a_shared_head_needs_no_store(llama: Decoder) -> None:
    decoder = Decoder(llama.model, TOKENIZER, prefixes=PrefixStore(entries=0))
    prompts = [[*PROMPTS[3], *prompt] for prompt in PROMPTS]
    for prompt, completion in zip(prompts, decoder.generate(prompts, Sampling(max_tokens=4)), strict=True):
        assert completion.cached_tokens >= len(PROMPTS[3])
        assert completion.token_ids == reference(llama.model, prompt, 4)
    assert len(decoder.prefixes) == 0


def test_long_prompts_are_read_in_parts_and_can_be_cancelled(monkeypatch: pytest.MonkeyPatch, llama: Decoder) -> None:
    monkeypatch.setattr("loragen_agents.edge.feeding.CHUNK", 7)
    decoder = Decoder(llama.model, TOKENIZER)
    prompts = [PROMPTS[3] * 2, PROMPTS[0], PROMPTS[2]]
    for prompt, completion in zip(prompts, decoder.generate(prompts, Sampling(max_tokens=6)), strict=True):
        assert completion.token_ids == reference(llama.model, prompt, 6)

    class SetOnThirdLook(threading.Event):
        looks = 0

        def is_set(self) -> bool:
            self.looks += 1
            return self.looks > 2

    stream = Decoder(llama.model, TOKENIZER).stream(PROMPTS[3] * 2, cancel=SetOnThirdLook())
    assert list(stream) == []
    assert stream.completion.finish_reason == "cancelled"


def test_other_weights_make_a_decoder_forget(llama: Decoder) -> None:
    model = tiny_model("llama")
    decoder = Decoder(model, TOKENIZER)
    before = decoder.generate([PROMPTS[3]], Sampling(max_tokens=6))[0]
    generator = torch.Generator().manual_seed(2)
    tensors = {
        (layer, "gate_proj"): (torch.randn(4, 32, generator=generator), torch.randn(64, 4, generator=generator))
        for layer in range(3)
    }
    weights = LoRAWeights(layers=3, rank=4, alpha=4.0, tensors=tensors)
    with weights.merge_into(model):
        merged = decoder.generate([PROMPTS[3]], Sampling(max_tokens=6))[0]
        assert merged.cached_tokens == 0
        assert merged.token_ids == reference(model, PROMPTS[3], 6) != before.token_ids
    restored = decoder.generate([PROMPTS[3]], Sampling(max_tokens=6))[0]
    assert (restored.cached_tokens, restored.token_ids) == (0, before.token_ids)
    # Weights that run beside the model's own sit in hooks, which the lean way would miss.
    with apply_lora(model, weights):
        hooked = decoder.generate([PROMPTS[3]], Sampling(max_tokens=6))[0]
    assert (hooked.cached_tokens, hooked.token_ids) == (0, merged.token_ids)


def test_arranging_weights_changes_nothing_but_their_storage(tmp_path: Path) -> None:
    model, untouched = tiny_model("qwen"), tiny_model("qwen")
    sharing = clone_sharing_tensors(model)
    before = dict(model.named_parameters())
    arrange_weights(model)
    arrange_weights(model)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == {
        name: id(parameter) for name, parameter in before.items()
    }
    for (name, parameter), original in zip(model.named_parameters(), untouched.parameters(), strict=True):
        assert torch.equal(parameter, original), name
        assert not parameter.is_inference()
    gate, up = model.model.layers[1].mlp.gate_proj.weight, sharing.model.layers[1].mlp.up_proj.weight
    assert up.data_ptr() == gate.data_ptr() + gate.nbytes
    # Such a model can be saved, loaded and trained like any other.
    model.save_pretrained(tmp_path)
    loaded = Qwen2ForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(*pair) for pair in zip(loaded.parameters(), untouched.parameters(), strict=True))
    model(torch.tensor([PROMPTS[0]])).logits.sum().backward()
    assert up.grad is not None and up.grad.shape == up.shape


def test_merged_weights_are_arranged_without_moving_their_base() -> None:
    model = tiny_model("llama")
    arrange_weights(model)
    before = [parameter.data_ptr() for parameter in model.parameters()]
    merged = clone_sharing_tensors(model)
    pair = (torch.ones(4, 32), torch.ones(64, 4))
    tensors = {(0, "up_proj"): pair, (1, "up_proj"): pair, (1, "gate_proj"): pair}
    LoRAWeights(layers=3, rank=4, alpha=4.0, tensors=tensors).merge_into(merged)
    with torch.inference_mode():
        arrange_weights(merged, model)
    assert [parameter.data_ptr() for parameter in model.parameters()] == before

    def adjacent(layer: int) -> bool:
        mlp: Any = merged.model.layers[layer].mlp
        assert not mlp.up_proj.weight.is_inference()
        return mlp.up_proj.weight.data_ptr() == mlp.gate_proj.weight.data_ptr() + mlp.gate_proj.weight.nbytes

    # In the first layer the gate is the base's, which is not to be moved.
    assert [adjacent(layer) for layer in range(3)] == [False, True, True]
    for prompt in PROMPTS:
        assert Decoder(merged, TOKENIZER).generate([prompt], Sampling(max_tokens=6))[0].token_ids == reference(
            merged, prompt, 6
        )


def test_many_vectors_in_bf16_go_through_float32_where_bf16_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(3, len(TOKENIZER), (1, 60), generator=torch.Generator().manual_seed(1))
    keep = torch.arange(60)[None]
    seen: list[torch.Size] = []

    def counted(x: torch.Tensor, *others: Any) -> torch.Tensor:
        seen.append(x.shape)
        return _linear_in_float32(x, *others)

    monkeypatch.setattr("loragen_agents.edge.lean_forward._linear_in_float32", counted)
    for family in ("llama", "qwen"):
        model = tiny_model(family, dtype=torch.bfloat16)
        logits = {}
        for native in (True, False):
            monkeypatch.setattr("loragen_agents.edge.lean_forward.cpu_computes_bf16", lambda native=native: native)
            seen.clear()
            with torch.inference_mode():
                logits[native] = Runtime(model, "torch").bind()(ids, KVCache(1), keep)
            # Four products a layer once queries, keys and values, and gate and up, are one; here they are seven.
            assert len(seen) == (0 if native else 3 * 7 + 1)
        assert logits[True].dtype == logits[False].dtype == torch.bfloat16
        assert (logits[True] - logits[False]).abs().max() < 0.05


@pytest.mark.parametrize("family", ["llama", "qwen"])  # without biases and with them
@pytest.mark.parametrize("count", [3, 4, 20, 48, 49])
def test_few_tokens_at_once_come_out_as_in_the_modules(family: str, count: int) -> None:
    """Products are taken in another way for some numbers of tokens."""
    model = tiny_model(family)
    ids = torch.randint(3, len(TOKENIZER), (2, count), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        for rows in (ids[:1], ids):
            keep = torch.arange(count).expand(len(rows), -1)
            logits = Runtime(model, "torch").bind()(rows, KVCache(len(rows)), keep)
            torch.testing.assert_close(logits, model(rows).logits, atol=1e-4, rtol=1e-4)


def test_keys_and_values_must_be_of_one_size() -> None:
    cache = KVCache(1)
    cache.begin(1)
    with pytest.raises(ModelLoadError, match="one size"):
        cache.write(0, torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 4))


def test_threads_never_mix(llama: Decoder) -> None:
    other = Decoder(tiny_model("llama", seed=1), TOKENIZER)
    jobs = [(decoder, prompt) for decoder in (llama, other) for prompt in PROMPTS] * 2
    expected = [reference(decoder.model, prompt, 8) for decoder, prompt in jobs]
    llama.prefixes.clear()
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda job: job[0].generate([job[1]], Sampling(max_tokens=8))[0].token_ids, jobs))
    assert done == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_summed_log_probabilities(family: str) -> None:
    model = family_model(family)
    decoder = Decoder(model, TOKENIZER)
    continuations = [[5], [7, 8, 9, 10, 11, 12, 13], PROMPTS[2], [], [7, 8, 20], PROMPTS[0]]
    for prompt in (PROMPTS[3], PROMPTS[2]):
        expected = []
        for continuation in continuations:
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *continuation]])).logits[0].log_softmax(dim=-1)
            places = range(len(prompt) - 1, len(prompt) + len(continuation) - 1)
            expected.append(sum(logits[place, token].item() for place, token in zip(places, continuation, strict=True)))
        assert decoder.score(prompt, continuations) == pytest.approx(expected, abs=1e-3)
        assert decoder.score(decoder.prefill(prompt), continuations) == pytest.approx(expected, abs=1e-3)
    assert decoder.score(PROMPTS[0], []) == []


def test_scores_in_several_passes(monkeypatch: pytest.MonkeyPatch, llama: Decoder) -> None:
    continuations = [PROMPTS[0], PROMPTS[2], PROMPTS[1], PROMPTS[3]]
    at_once = llama.score(PROMPTS[1], continuations)
    monkeypatch.setattr("loragen_agents.edge.decoding._SCORED", 10)
    assert llama.score(PROMPTS[1], continuations) == pytest.approx(at_once, abs=1e-4)


def test_a_read_prompt_can_be_continued_any_number_of_times(llama: Decoder) -> None:
    decoder = Decoder(llama.model, TOKENIZER)
    read = decoder.prefill(PROMPTS[0])
    assert torch.allclose(read.logits, llama.model(torch.tensor([PROMPTS[0]])).logits[0, -1], atol=1e-5)
    decoder.prefixes.clear()
    decoder.score(read, [[3, 4, 5]])
    plain = reference(llama.model, PROMPTS[0], 8)
    for _ in range(2):
        completion = decoder.generate([read], Sampling(max_tokens=8))[0]
        assert completion.token_ids == plain
        assert completion.cached_tokens == completion.prompt_tokens == len(PROMPTS[0])
    mixed = decoder.generate([PROMPTS[3], read, PROMPTS[1]], Sampling(max_tokens=8))
    assert [c.token_ids for c in mixed] == [reference(llama.model, p, 8) for p in (PROMPTS[3], PROMPTS[0], PROMPTS[1])]


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_of_a_prompt_are_read_in_one_pass(monkeypatch: pytest.MonkeyPatch, family: str, runtime: str) -> None:
    """Also behind a prompt that was read, with a beginning that is known, and with passes shorter than the parts."""
    monkeypatch.setattr("loragen_agents.edge.feeding.CHUNK", 4)
    model = family_model(family)
    decoder = Decoder(model, TOKENIZER)
    parts = [PROMPTS[3], [7], [8, 9], PROMPTS[0]]
    layers = (0, 1)
    wholes = accumulate(parts, lambda before, part: [*before, *part])
    one_by_one = [Decoder(model, TOKENIZER).prefill(whole, capture=layers) for whole in wholes]
    decoder.prefill([*PROMPTS[3][:3], 60])
    first, *others = decoder.prefill_parts(parts[:2], capture=layers)
    assert first.cached_tokens == min(3, len(PROMPTS[3]) - 1)
    read = [first, *others, *decoder.prefill_parts(parts[2:], behind=others[-1], capture=layers)]
    for found, expected in zip(read, one_by_one, strict=True):
        assert found.token_ids == expected.token_ids
        torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-4)
        assert (found.activations is None) == (expected.activations is None)
        if expected.activations is not None:
            torch.testing.assert_close(found.activations, expected.activations, atol=1e-4, rtol=1e-4)
        decoder.prefixes.clear()
        (completion,) = decoder.generate([found], Sampling(max_tokens=6))
        assert list(completion.token_ids) == list(reference(model, list(found.token_ids), 6))


def test_impossible_prompts_are_refused(llama: Decoder) -> None:
    with pytest.raises(PromptError, match="no tokens"):
        llama.stream([])
    with pytest.raises(PromptError, match="no tokens"):
        llama.prefill([])
    model = tiny_model("llama")
    model.config.max_position_embeddings = 20
    short = Decoder(model, TOKENIZER)
    with pytest.raises(PromptError, match="room for 20"):
        short.stream([5] * 20)
    completion = short.generate([[5] * 15], Sampling(max_tokens=50))[0]
    assert (len(completion.token_ids), completion.finish_reason) == (5, "length")
    with pytest.raises(ValueError, match="2 prompts"):
        llama.generate(PROMPTS[:2], grammar=[None])


def test_unserved_attention_is_refused() -> None:
    model = family_model("gemma")
    model.config.layer_types[0] = "chunked_attention"
    with pytest.raises(ModelLoadError, match="chunked_attention"):
        Decoder(model, TOKENIZER).generate([PROMPTS[0]])


def test_eager_attention_gives_the_same(llama: Decoder) -> None:
    model = tiny_model("gemma")
    expected = reference(model, PROMPTS[0], 8)
    model.set_attn_implementation("eager")
    done = Decoder(model, TOKENIZER).generate([PROMPTS[0], PROMPTS[3]], Sampling(max_tokens=8))
    assert done[0].token_ids == expected


def test_times_and_counts_are_reported(llama: Decoder) -> None:
    completion = llama.generate([PROMPTS[0]], Sampling(max_tokens=5))[0]
    assert isinstance(completion, Completion)
    assert completion.prompt_tokens == len(PROMPTS[0])
    assert 0 < completion.first_token_seconds <= completion.seconds
    assert len(completion.token_ids) == 5


def test_store_keeps_the_recent_and_the_pinned(llama: Decoder) -> None:
    decoder = Decoder(llama.model, TOKENIZER, prefixes=PrefixStore(entries=2))
    decoder.prefill([1, 2, 3, 4], pin=True)
    for first in range(10, 15):
        decoder.prefill([first, 6, 7])
    assert len(decoder.prefixes) == 3
    assert decoder.prefill([1, 2, 3, 4, 9]).cached_tokens == 4
    assert decoder.prefill([14, 6, 7, 8]).cached_tokens == 3
    assert decoder.prefill([10, 6, 7, 8]).cached_tokens == 0
    # What a longer prefix contains is not kept twice.
    assert len(decoder.prefixes) == 3
    states = decoder.prefill([20, 21]).states
    tight = PrefixStore(size=states.size)
    tight.add([20, 21], states)
    tight.add([30, 31], states)
    assert tight.find([20, 21])[1] == 0
    assert tight.find([30, 31])[1] == 2
