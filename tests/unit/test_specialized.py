import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from loragen_agents.adapter.lora_weights import LoRAWeights
from loragen_agents.conversation.prompts import TakenStep, Turn
from loragen_agents.conversation.react import Answer, ToolStep, parse_step
from loragen_agents.edge.sampling import Sampling
from loragen_agents.edge.specialized import SpecializedLM
from loragen_agents.edge.tool_choice import ToolProbabilities
from loragen_agents.errors import GrammarError
from loragen_agents.models.language_models import PROJECTIONS, LanguageModel
from loragen_agents.registry import Tool, ToolRegistry
from tests.decoded_steps import decoded
from tests.tiny_models import SIZES, tiny_model, tiny_tokenizer

LAYERS, HIDDEN, WIDTH = SIZES["num_hidden_layers"], SIZES["hidden_size"], SIZES["intermediate_size"]
TURNS = [Turn("What is 2 + 3?")]
SHORT = Sampling(max_tokens=12)


def transformers_tokens(edge: LanguageModel, special: SpecializedLM) -> list[int]:
    """What transformers' own greedy decoding writes with the edge LM as it stands."""
    prompt = torch.tensor([special.renderer.user_turn(TURNS)])
    generate: Any = edge.model.generate
    return generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :].tolist()


def language_model(family: str = "llama", dtype: torch.dtype = torch.float32) -> LanguageModel:
    model = tiny_model(family, dtype=dtype).requires_grad_(False)
    return LanguageModel(f"tiny-{family}", Path("tiny"), model, tiny_tokenizer(), "fingerprint")


def registry(*names: str) -> ToolRegistry:
    parameters = {"type": "object", "properties": {"unit": {"enum": ["cm", "inch"]}}, "required": ["unit"]}
    return ToolRegistry([Tool(name=name, description=f"The tool {name}.", parameters=parameters) for name in names])


def random_weights(seed: int, *, zero: tuple[str, ...] = ()) -> LoRAWeights:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(LAYERS):
        for projection in PROJECTIONS:
            size_in, size_out = (WIDTH, HIDDEN) if projection == "down_proj" else (HIDDEN, WIDTH)
            b = torch.randn(size_out, 4, generator=generator) / 3 * (projection not in zero)
            tensors[layer, projection] = (torch.randn(4, size_in, generator=generator) / 3, b)
    return LoRAWeights(LAYERS, 4, 4.0, tensors)


def test_only_the_changed_matrices_have_memory_of_their_own():
    edge = language_model()
    special = SpecializedLM(edge, random_weights(0, zero=("up_proj",)), registry("ruler"))
    base = dict(edge.model.named_parameters())
    own = {name for name, parameter in special.decoder.model.named_parameters() if parameter is not base[name]}
    assert own == {f"model.layers.{n}.mlp.{p}.weight" for n in range(LAYERS) for p in ("gate_proj", "down_proj")}
    base_buffers = dict(edge.model.named_buffers())
    assert all(buffer is base_buffers[name] for name, buffer in special.decoder.model.named_buffers())


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", torch.float32), ("llama", torch.bfloat16), ("qwen", torch.float32), ("gemma", torch.float32)],
)
def test_tokens_are_those_of_the_merged_model_in_transformers(family, dtype):
    edge, weights = language_model(family, dtype), random_weights(1)
    special = SpecializedLM(edge, weights, registry("ruler"))
    completion = decoded(special, TURNS, SHORT, grammar=False)
    bare = transformers_tokens(edge, special)
    with weights.merge_into(edge.model):
        merged = transformers_tokens(edge, special)
    assert list(completion.token_ids) == merged != bare


def test_without_weights_it_is_the_bare_model():
    edge = language_model()
    special = SpecializedLM(edge, None, registry())
    completion = decoded(special, TURNS, SHORT, grammar=False)
    assert list(completion.token_ids) == transformers_tokens(edge, special)


def test_steps_are_held_to_the_registry():
    special = SpecializedLM(language_model(), random_weights(0), registry("ruler", "scale"))
    called = decoded(special, TURNS, tool_choice="any")
    step = parse_step(called.text, special.registry)
    assert isinstance(step, ToolStep) and step.action in ("ruler", "scale")
    assert step.arguments["unit"] in ("cm", "inch")
    named = parse_step(decoded(special, TURNS, tool_choice="scale").text, special.registry)
    assert isinstance(named, ToolStep) and named.action == "scale"
    answered = decoded(special, TURNS, SHORT, tool_choice="none")
    assert isinstance(parse_step(answered.text, special.registry), Answer)
    with pytest.raises(GrammarError, match="hammer"):
        special.stream(TURNS, tool_choice="hammer")


def test_the_pieces_of_a_stream_are_the_text_that_its_tokens_spell():
    special = SpecializedLM(language_model(), random_weights(0), registry("ruler", "scale"))
    again = [Turn("How long is it?", (TakenStep("ruler", '{"unit": "cm"}', "12"),))]
    for turns in (TURNS, again):
        stream = special.stream(turns, SHORT)
        assert "".join(stream) == stream.completion.text != ""
        spelt = str(special.edge.tokenizer.decode(list(stream.completion.token_ids), skip_special_tokens=True))
        assert stream.completion.text == spelt.removesuffix("\nObservation:")


def test_free_text_ends_before_the_tools_report(monkeypatch):
    special = SpecializedLM(language_model(), None, registry("ruler"))
    seen = []
    stream = special.decoder.stream

    def watched(prompt, sampling, *arguments):
        seen.append(sampling)
        return stream(prompt, sampling, *arguments)

    monkeypatch.setattr(special.decoder, "stream", watched)
    special.stream(TURNS, Sampling(stop=("END",)), grammar=False)
    special.stream(TURNS, Sampling(stop=("END",)))
    assert [sampling.stop for sampling in seen] == [("END", "\nObservation:"), ("END",)]


def test_an_answer_ends_before_further_lines_of_a_step(monkeypatch):
    special = SpecializedLM(language_model(), None, registry("ruler", "scale"))
    seen = []
    stream = special.decoder.stream

    def watched(prompt, sampling, *arguments):
        seen.append(sampling.stop)
        return stream(prompt, sampling, *arguments)

    monkeypatch.setattr(special.decoder, "stream", watched)
    own = special.scorer

    class Decided:
        prefill = staticmethod(own.prefill)

        def __init__(self, calls: float) -> None:
            self.calls = calls

        def __call__(self, request: Any) -> ToolProbabilities:
            return ToolProbabilities(self.calls, {"ruler": 1.0, "scale": 0.0})

    for calls in (0.0, 1.0):
        monkeypatch.setattr(special, "scorer", Decided(calls))
        special.stream(TURNS, Sampling(stop=("END",)))
    assert seen == [("END", "\nObservation:", "\nThought:", "\nHuman:"), ("END",)]


def test_turn_ends_of_the_chat_template_stop_decoding():
    edge = language_model()
    edge.model.generation_config.eos_token_id = None
    edge.tokenizer.eos_token = "<|endoftext|>"
    special = SpecializedLM(edge, None, registry())
    ends = {edge.tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")}
    assert special.decoder.stop_token_ids == ends


def test_a_stream_can_be_cancelled(monkeypatch):
    special = SpecializedLM(language_model(), random_weights(0), registry("ruler", "scale"))
    cancel = threading.Event()
    cancel.set()
    monkeypatch.setattr(special, "scorer", lambda prompt: pytest.fail("tools were scored for nobody"))
    stream = special.stream(TURNS, SHORT, cancel=cancel)
    assert "".join(stream) == "" and stream.completion.finish_reason == "cancelled"


def test_registries_served_in_threads_give_what_they_give_one_after_the_other():
    edge = language_model()
    before = edge.model(torch.arange(3, 20)[None]).logits
    conversations = [[Turn(f"Request {number}: how long is it?")] for number in range(2)]
    sampled = Sampling(max_tokens=12, temperature=1.0, seed=7)

    def build(number: int) -> SpecializedLM:
        return SpecializedLM(edge, random_weights(number), registry("ruler", f"tool{number}"))

    def tokens(special: SpecializedLM) -> list[tuple[int, ...]]:
        streamed = []
        for turns in conversations:
            for sampling in (SHORT, sampled):
                stream = special.stream(turns, sampling, grammar=sampling is sampled)
                for _ in stream:
                    pass
                streamed.append(stream.completion.token_ids)
        return streamed

    expected = [tokens(build(number)) for number in range(2)]
    assert expected[0] != expected[1]
    start = threading.Barrier(4)

    def serve(number: int) -> list[tuple[int, ...]]:
        start.wait()
        return tokens(build(number))

    with ThreadPoolExecutor(4) as pool:
        served = list(pool.map(serve, [0, 1, 0, 1]))
    assert served == expected * 2
    assert torch.equal(edge.model(torch.arange(3, 20)[None]).logits, before)
