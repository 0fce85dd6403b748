"""Decoding with the embedded model: the tokens that `generate` gives, tokenisation of forced text, and its speed."""

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from loragen_agents.bench.decode_speed import random_weights
from loragen_agents.conversation.prompts import PromptRenderer, TakenStep, Turn
from loragen_agents.conversation.react import ToolStep, parse_step, tool_step_text
from loragen_agents.edge.decoding import _ALIGNED, Decoder, Sampling
from loragen_agents.edge.grammar import ToolGrammar
from loragen_agents.edge.kv_cache import KVCache
from loragen_agents.edge.lean_forward import LeanForward
from loragen_agents.edge.module_forward import ModuleForward
from loragen_agents.models.language_models import LanguageModel, load_language_model
from loragen_agents.registry import Tool, ToolRegistry
from loragen_agents.support.content import content_folder

REQUESTS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain why the sky is blue, to a child.",
    "List three fruits that are not red.",
    "Translate 'good morning' into German, Spanish and Italian.",
    "def fibonacci(n):",
)


@pytest.fixture(scope="module")
def tokenizer(embedded_model: LanguageModel) -> PreTrainedTokenizerFast:
    assert isinstance(embedded_model.tokenizer, PreTrainedTokenizerFast)
    return embedded_model.tokenizer


@pytest.fixture(scope="module")
def renderer(tokenizer: PreTrainedTokenizerFast) -> PromptRenderer:
    return PromptRenderer(tokenizer)


@pytest.fixture(scope="module")
def decoders(embedded_model: LanguageModel) -> dict[str, Decoder]:
    """On PyTorch in float32, where two ways to the same sum agree, and in bf16, where they may round differently."""
    models = [load_language_model(embedded_model.folder, dtype=dtype) for dtype in ("float32", "bfloat16")]
    return {
        dtype: Decoder(model.model, model.tokenizer, runtime="torch")
        for dtype, model in zip(("float32", "bf16"), models, strict=True)
    }


@pytest.fixture(scope="module")
def decoder(decoders: dict[str, Decoder]) -> Decoder:
    return decoders["float32"]


@pytest.fixture(scope="module")
def registry() -> ToolRegistry:
    return ToolRegistry.from_yaml(content_folder("tools") / "gpt4tools_seen.yaml")


def chat(tokenizer: PreTrainedTokenizerFast, request: str) -> list[int]:
    ids = tokenizer.encode(f"<|im_start|>user\n{request}<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)
    return list(ids)


def reference(model: torch.nn.Module, prompt: list[int], count: int) -> tuple[int, ...]:
    ids = torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)  # type: ignore[operator]
    return tuple(output[0, len(prompt) :].tolist())


def test_greedy_equals_generate(decoder: Decoder, tokenizer: PreTrainedTokenizerFast) -> None:
    for request in REQUESTS[:3]:
        prompt = chat(tokenizer, request)
        assert decoder.generate([prompt], Sampling(max_tokens=16))[0].token_ids == reference(decoder.model, prompt, 16)


def test_greedy_in_bf16_parts_from_generate_at_ties_only(
    decoders: dict[str, Decoder], tokenizer: PreTrainedTokenizerFast
) -> None:
    decoder = decoders["bf16"]
    for request in REQUESTS[3:]:
        prompt = chat(tokenizer, request)
        expected = reference(decoder.model, prompt, 16)
        written = decoder.generate([prompt], Sampling(max_tokens=16))[0].token_ids
        parted = next((at for at, pair in enumerate(zip(written, expected, strict=False)) if pair[0] != pair[1]), None)
        if parted is None:
            assert written == expected
        else:
            with torch.no_grad():
                logits = decoder.model(torch.tensor([[*prompt, *expected[:parted]]])).logits[0, -1].float()
            gap = (logits[expected[parted]] - logits[written[parted]]).abs().item()
            # Four steps of bf16 at the size that these logits have.
            assert gap <= 4 * logits.abs().max().item() * 2**-8, (request, parted)


@pytest.mark.parametrize(("dtype", "mean", "most"), [("float32", 1e-5, 1e-3), ("bf16", 0.03, 0.5)])
def test_lean_and_module_forward_agree(
    decoders: dict[str, Decoder], tokenizer: PreTrainedTokenizerFast, dtype: str, mean: float, most: float
) -> None:
    decoder = decoders[dtype]
    prompt = torch.tensor([chat(tokenizer, REQUESTS[2] * 3)])
    lean, modules = decoder._forward(), ModuleForward(decoder.model)
    assert isinstance(lean, LeanForward)
    with torch.inference_mode():
        expected = decoder.model(prompt).logits[0].float()
        for forward in (lean, modules):
            cache, pieces = KVCache(1), []
            for begin, end in ((0, 9), (9, 10), (10, 11), (11, prompt.shape[1])):
                pieces.append(forward(prompt[:, begin:end], cache, torch.arange(end - begin)[None])[0].float())
                cache.advance([end - begin])
            difference = (torch.cat(pieces) - expected).abs()
            assert difference.mean() < mean * expected.std()
            assert difference.max() < most * expected.std()


def test_a_batch_writes_what_each_prompt_does(decoder: Decoder, tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = [chat(tokenizer, request) for request in REQUESTS[:4]]
    together = decoder.generate(prompts, Sampling(max_tokens=8))
    for prompt, completion in zip(prompts, together, strict=True):
        assert completion.token_ids == decoder.generate([prompt], Sampling(max_tokens=8))[0].token_ids


def test_forced_text_is_tokenised_as_the_model_was_taught(
    tokenizer: PreTrainedTokenizerFast, renderer: PromptRenderer
) -> None:
    """A step that follows the grammar has the tokens that the renderer gives the same step in the next prompt."""
    registry = ToolRegistry(
        [
            Tool(
                name=name,
                description="A tool.",
                parameters={"properties": {"expression": {"type": "string"}, "count": {"type": "integer"}}},
            )
            for name in ("calculator", "Detect the Given Object", "read-file", "read_file_2")
        ]
    )
    grammar = ToolGrammar(registry, tokenizer)
    for name in registry.names:
        text = tool_step_text(name, '{"expression": "1 + 2 of them", "count": 12}')
        expected = renderer.encode_text(text)
        matcher = grammar.matcher()
        written: list[int] = []
        forced_count = 0
        while not matcher.finished:
            forced = matcher.forced_tokens()
            step = forced or [expected[len(written)]]
            forced_count += len(forced)
            matcher.accept(step)
            written += step
            assert written == expected[: len(written)], (name, tokenizer.convert_ids_to_tokens(written))
        assert written == expected
        # About half of a step is not the model's to choose.
        assert forced_count > 0.4 * len(expected)


def test_steps_within_the_grammar_are_steps_of_the_registry(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerFast,
    renderer: PromptRenderer,
    registry: ToolRegistry,
) -> None:
    any_tool = ToolGrammar(registry, tokenizer, "any")
    prompts = [renderer.user_turn([Turn(request)]) for request in ("Cut out the dog in image/a.png.", "What is this?")]
    for completion in decoder.generate(prompts, Sampling(max_tokens=80), any_tool):
        if completion.finish_reason == "stop":
            step = parse_step(completion.text, registry)
            assert isinstance(step, ToolStep) and step.action in registry
        else:
            assert completion.text.startswith(" Yes\nAction: ")


def test_an_agents_next_step_reads_only_what_is_new(
    decoder: Decoder, tokenizer: PreTrainedTokenizerFast, renderer: PromptRenderer
) -> None:
    # Required, so that the grammar writes how the input begins: the bare model splits ` {"` its own way.
    schema = {"properties": {"sum": {"type": "string"}}, "required": ["sum"]}
    registry = ToolRegistry([Tool(name="calculator", description="Works it out.", parameters=schema)])
    decoder.prefixes.clear()
    first_prompt = renderer.user_turn([Turn("What is 17 times 23?")])
    first = decoder.generate([first_prompt], Sampling(max_tokens=60), ToolGrammar(registry, tokenizer, "any"))[0]
    step = parse_step(first.text, registry)
    assert isinstance(step, ToolStep)
    turn = Turn("What is 17 times 23?", steps=(TakenStep(step.action, step.action_input, "391"),))
    second_prompt = renderer.user_turn([turn])
    second = decoder.generate([second_prompt], Sampling(max_tokens=20), ToolGrammar(registry, tokenizer, "none"))[0]
    if decoder.model.dtype == torch.float32:
        assert second.cached_tokens > len(first_prompt)
        assert len(second_prompt) - second.cached_tokens < 30
    else:  # whole passes of the first prompt, and nothing that was generated
        assert second.cached_tokens == (len(first_prompt) - 1) // _ALIGNED * _ALIGNED
    decoder.prefixes.clear()
    anew = decoder.generate([second_prompt], Sampling(max_tokens=20), ToolGrammar(registry, tokenizer, "none"))[0]
    assert anew.cached_tokens == 0
    assert anew.text == second.text


def test_names_are_scored_as_the_model_reads_them(decoder: Decoder, renderer: PromptRenderer) -> None:
    prompt = renderer.user_turn([Turn("What is the capital of France?")])
    continuations = [renderer.encode_text(text) for text in (" No\nAI: Paris", " No\nAI: Table", " Yes\nAction: x")]
    scores = decoder.score(prompt, continuations)
    for score, continuation in zip(scores, continuations, strict=True):
        with torch.no_grad():
            logits = decoder.model(torch.tensor([[*prompt, *continuation]])).logits[0].float().log_softmax(dim=-1)
        places = range(len(prompt) - 1, len(prompt) + len(continuation) - 1)
        expected = sum(logits[place, token].item() for place, token in zip(places, continuation, strict=True))
        assert score == pytest.approx(expected, abs=1e-2)
    assert scores[0] > scores[1]


def test_random_weights_change_what_is_written(decoder: Decoder, tokenizer: PreTrainedTokenizerFast) -> None:
    """The merged model of the benchmark is one that differs, not the base under another name."""
    prompt = chat(tokenizer, REQUESTS[0])
    decoder.prefixes.clear()
    before = decoder.prefill(prompt)
    with random_weights(decoder.model).merge_into(decoder.model):
        merged = decoder.prefill(prompt)
    restored = decoder.prefill(prompt)
    assert merged.cached_tokens == restored.cached_tokens == 0
    assert not torch.allclose(merged.logits, before.logits, atol=0.1)
    assert torch.equal(restored.logits, before.logits)


def test_a_text_is_not_begun_with_the_space_of_a_number(tokenizer: PreTrainedTokenizerFast) -> None:
    """A model that expects digits takes the space alone; in a text it would be held to what never follows there."""
    schema = {"type": "object", "properties": {"sum": {"type": "string"}, "count": {"type": "integer"}}}
    grammar = ToolGrammar(ToolRegistry([Tool(name="add", description="Add.", parameters=schema)]), tokenizer)
    (space,), (quote,) = (tokenizer.encode(text, add_special_tokens=False) for text in (" ", ' "'))
    for argument, admitted in (("sum", {quote}), ("count", {space})):
        matcher = grammar.matcher(len(tokenizer))
        text = f' Yes\nAction: add\nAction Input: {{"{argument}":'
        matcher.accept(tokenizer.encode(text, add_special_tokens=False))
        allowed = matcher.mask(torch.zeros(len(tokenizer))).isfinite()
        assert {token for token in (space, quote) if allowed[token]} == admitted
