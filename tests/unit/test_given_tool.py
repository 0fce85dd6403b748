"""Steps with the tool given: what is learnt of a call, and that each row has its own tool's updates alone."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from loragen_agents.conversation.argument_notes import MAX_CHARACTERS, argument_notes
from loragen_agents.conversation.prompts import Turn
from loragen_agents.conversation.renderers import shared_renderer
from loragen_agents.data.episodes import Episode, GoldCall, Sample
from loragen_agents.data.value_kinds import value_spans
from loragen_agents.generator import GeneratorConfig, LoRAGenerator
from loragen_agents.models.language_models import LanguageModel, load_language_model
from loragen_agents.registry import Tool, ToolRegistry
from loragen_agents.training.episode_model import EpisodeModel
from loragen_agents.training.given_tool import TOKEN_KINDS, GivenEpisode, given_episode
from tests.tiny_models import save_tiny_model

GENERATOR: dict[str, Any] = {"n_experts": 1, "expert_scope": "per_layer", "rank": 4, "alpha": 8.0, "memory_layers": 2}
GENERATOR |= {"memory_common_rank": 4, "memory_key_rank": 4, "memory_value_rank": 4}
LAMP = Tool(
    name="set_lamp",
    description="Set a lamp.",
    parameters={
        "type": "object",
        "properties": {
            "lamp": {"type": "string", "description": "the lamp's name"},
            "percent": {"type": "integer"},
            "colour": {"type": "string", "enum": ["red", "green"]},
            "fade": {"type": "boolean"},
            "rooms": {"type": "array", "items": {"type": "string"}},
            "at": {"type": "string", "description": "when, as HH:MM"},
        },
        "required": ["lamp"],
    },
)
TODAY = Tool(name="today", description="Tell the date.", parameters={"type": "object", "properties": {}})


@pytest.fixture(scope="module")
def edge(tmp_path_factory) -> LanguageModel:
    return load_language_model(str(save_tiny_model(tmp_path_factory.mktemp("edge"))), dtype="float32")


def episode(*asked: tuple[str, GoldCall | str]) -> Episode:
    registry = ToolRegistry([TODAY, LAMP])
    samples = tuple(
        Sample((Turn(request),), gold, "chat" if isinstance(gold, str) else "call", "t") for request, gold in asked
    )
    return Episode(registry, ("t/today", "t/lamp"), samples)


CALLS = episode(
    ("Desk lamp to red.", GoldCall("set_lamp", {"lamp": "desk lamp", "colour": "red"})),
    ("Hello!", "Hello."),
    ("Which day is it?", GoldCall("today", {})),
    ("Bed lamp to 5.", GoldCall("set_lamp", {"lamp": "bed lamp", "percent": 5})),
)


def test_values_are_told_apart_by_kind():
    given = {"lamp": "Desk lamp", "percent": 5, "colour": "red", "fade": True, "rooms": ["hall"], "at": "19:30"}
    text = '{"lamp": "Desk lamp", "percent": 5, "colour": "red", "fade": true, "rooms": ["hall"], "at": "19:30"}'
    spans = value_spans(LAMP, given, text, "the desk lamp to five, half past seven")
    found = [(span.kind, text[span.start : span.end]) for span in spans]
    assert found == [
        ("copied", '"Desk lamp"'),
        ("number", "5"),
        ("enum", '"red"'),
        ("boolean", "true"),
        ("list", '["hall"]'),
        ("converted", '"19:30"'),
    ]
    assert value_spans(LAMP, {"lamp": "Desk lamp"}, "Desk lamp", "") == []


def test_notes_name_the_arguments_and_fit_their_line():
    assert argument_notes(TODAY) == ""
    assert argument_notes(LAMP) == (
        " (lamp: the lamp's name; percent?: integer; colour?: red|green; fade?: boolean; rooms?: array; "
        "at?: when, as HH:MM)"
    )
    many = {f"argument_{n}": {"type": "string", "description": "what it is and what it does"} for n in range(40)}
    long = Tool(name="long", description="Long.", parameters={"type": "object", "properties": many})
    assert len(argument_notes(long)) <= MAX_CHARACTERS + 3


@pytest.mark.parametrize("noted", [False, True])
def test_a_sample_ends_its_prompt_at_the_input_and_learns_the_rest(edge, noted):
    renderer = shared_renderer(edge.tokenizer)
    made = given_episode(renderer, CALLS, [noted] * 4)
    assert made.registry.names == ("set_lamp", "today")
    assert [sample.tool for sample in made.samples] == [0, 1, 0]
    first = made.samples[0]
    prompt = str(edge.tokenizer.decode(first.input_ids[: first.prompt_length]))
    target = str(edge.tokenizer.decode(first.input_ids[first.prompt_length :]))
    assert prompt.endswith(f"\nAction: set_lamp{argument_notes(LAMP) if noted else ''}\nAction Input:")
    assert target == ' {"lamp": "desk lamp", "colour": "red"}\nObservation:'
    assert first.optional == (5, 1)
    kinds = {TOKEN_KINDS[kind] for kind in first.kinds}
    assert kinds == {"copied", "enum", "between"}


def test_long_samples_are_left_out(edge):
    made = given_episode(shared_renderer(edge.tokenizer), CALLS, [False] * 4, max_tokens=1)
    assert made.samples == ()


def learner(edge: LanguageModel, **settings: Any) -> EpisodeModel:
    torch.manual_seed(0)
    generator = LoRAGenerator(GeneratorConfig(**GENERATOR), None, edge)
    with torch.no_grad():
        for parameter in generator.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(std=0.05)
    return EpisodeModel(generator, shared_renderer(edge.tokenizer), given_weight=1.0, **settings)


def test_a_batch_of_many_tools_costs_what_its_rows_cost_alone(edge):
    model = learner(edge)
    whole = given_episode(shared_renderer(edge.tokenizer), CALLS, [False] * 4)
    tokens = [len(sample.kinds) for sample in whole.samples]
    alone = [
        model([GivenEpisode(ToolRegistry([list(whole.registry)[sample.tool]]), (replace(sample, tool=0),))]) * count
        for sample, count in zip(whole.samples, tokens, strict=True)
    ]
    torch.testing.assert_close(model([whole]), torch.stack(alone).sum() / sum(tokens))


def test_the_loss_falls_and_reaches_experts_and_memory(edge):
    model = learner(edge)
    made = given_episode(shared_renderer(edge.tokenizer), CALLS, [True, False, False, False])
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model([made])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    reached = {name for name, p in model.generator.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"producer.a.gate_proj", "producer.b.down_proj"} <= reached
    assert {"tool_memory.memory.key_up", "tool_memory.memory.value_up", "tool_memory.memory.scale"} <= reached


def test_rates_tell_kinds_notes_sources_and_optional_arguments_apart(edge):
    model = learner(edge)
    model([given_episode(shared_renderer(edge.tokenizer), CALLS, [True, False, False, False])])
    counts = model.rates.counts
    assert counts["given_call"] == counts["given_call_t"] == 3
    assert (counts["given_call_with_notes"], counts["given_call_without_notes"]) == (1, 2)
    assert (counts["given_copied"], counts["given_enum"], counts["given_number"]) == (2, 1, 1)
    assert counts["given_names_some_of_optional"] == 2
