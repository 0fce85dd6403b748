"""The argument head: what it learns from, that it learns, and that calls are held to what it finds."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from loragen_agents.adapter.argument_reader import (
    ArgumentKind,
    ArgumentReader,
    FoundArguments,
    Listed,
    Reading,
    side_by_side,
)
from loragen_agents.adapter.registry_weights import RegistryWeights
from loragen_agents.conversation.prompts import Turn
from loragen_agents.conversation.renderers import shared_renderer
from loragen_agents.data.records import DataSet
from loragen_agents.edge.held_arguments import held_arguments, narrowed
from loragen_agents.edge.specialized import SpecializedLM, merged_decoder
from loragen_agents.errors import DataError
from loragen_agents.generator import GeneratorConfig, LoRAGenerator
from loragen_agents.generator.argument_head import argument_kinds, read_arguments, read_values, value_width
from loragen_agents.generator.tool_texts import argument_texts
from loragen_agents.models.language_models import LanguageModel, load_language_model
from loragen_agents.registry import Tool, ToolRegistry
from loragen_agents.training.argument_examples import NONE, UNKNOWN, build_argument_examples, reworded, token_labels
from loragen_agents.training.argument_recipe import ArgumentRecipe
from loragen_agents.training.argument_trainer import train_argument_head
from loragen_agents.training.recipe import load_recipe
from tests.tiny_models import save_tiny_model
from tests.unit.test_trainer import GENERATOR, data

SETTINGS: dict[str, Any] = {"argument_layers": 1, "argument_width": 16, "joined": 10, "earlier": 5}
SETTINGS |= {"argument_hidden": 32, "dropout": 0.0, "step_requests": 12}


def schema(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required)}


TEXT = {"type": "string"}
TABLE = Tool(
    name="book_table",
    description="Book a table in a restaurant.",
    parameters=schema(
        ("place",),
        place=TEXT,
        people={"type": "integer"},
        day={"enum": ["today", "tomorrow"]},
        quiet={"type": "boolean"},
    ),
)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A tiny edge LM and a generator for it with a tool head."""
    folder = tmp_path_factory.mktemp("argument_head")
    edge = str(save_tiny_model(folder / "edge"))
    model = load_language_model(edge, dtype="float32")
    torch.manual_seed(0)
    generator = LoRAGenerator(GeneratorConfig(**GENERATOR, head_layers=2, head_width=4), None, model)
    return edge, str(generator.save(folder / "generator"))


def trained(start: tuple[str, str], folder: Path, given: DataSet | None = None, **changes: Any) -> Path:
    edge, generator = start
    settings = {**SETTINGS, "cloud": edge, "edge": edge, "dtype": "float32", "start_from": generator}
    recipe = ArgumentRecipe.model_validate(settings | changes)
    return train_argument_head(recipe, folder, data=given or data())


def labels(text: str, tool: Tool, **arguments: Any) -> dict[int, str]:
    """What the tokens of a request stand for, as the text of each label."""
    renderer = shared_renderer(load_language_model(EDGE[0]).tokenizer)
    ids, stands, (begin, end) = token_labels(renderer, [Turn(text)], tool, arguments)
    assert renderer.encode_text(text)[0] == ids[begin] and set(stands[:begin] + stands[end:]) == {UNKNOWN}
    _, prompt, starts = renderer.user_turn_with_starts([Turn(text)])
    ends = [*starts[1:], len(prompt)]
    found: dict[int, str] = {}
    for label, first, last in zip(stands, starts, ends, strict=True):
        found[label] = found.get(label, "") + prompt[first:last]
    assert len(ids) == len(stands)
    return found


EDGE: list[str] = []


@pytest.fixture(autouse=True)
def _edge(start: tuple[str, str]) -> None:
    EDGE[:] = [start[0]]


def test_tokens_of_a_value_stand_for_its_argument_and_others_for_none() -> None:
    found = labels("a table in Rome for 4", TABLE, place="Rome", people=4)
    assert "Rome" in found[1] and "table" not in found[1]
    assert "4" in found[2] and "table" in found[NONE]


def test_where_a_value_is_not_in_the_request_nobody_knows_what_others_stand_for() -> None:
    found = labels("a quiet table in Rome", TABLE, place="Rome", quiet=True)
    assert "Rome" in found[1] and NONE not in found and "quiet" in found[UNKNOWN]


def test_a_value_inside_a_longer_word_is_no_place_of_it() -> None:
    found = labels("in Romeo's town for 4", TABLE, place="Rome", people=4)
    assert 1 not in found and "4" in found[2]


def test_each_argument_is_read_where_it_is_named() -> None:
    names = [f"detail_{number}" for number in range(11)]
    many = Tool(name="t", description="Do it.", parameters=schema((), **dict.fromkeys(names, TEXT)))
    read = [text[begin:end] for text, places in argument_texts(many) for begin, end in places]
    assert read == [name.replace("_", " ") for name in names]


def test_kinds_are_those_of_the_values() -> None:
    kinds = [ArgumentKind.TEXT, ArgumentKind.NUMBER, ArgumentKind.CHOICE, ArgumentKind.BOOLEAN]
    assert argument_kinds(TABLE) == kinds
    several = schema(a={"anyOf": [{"type": "integer"}, {"type": "null"}]}, b={"type": ["string", "number"]}, c=True)
    tool = Tool(name="t", description="Do it.", parameters=several)
    assert argument_kinds(tool) == [ArgumentKind.NUMBER, ArgumentKind.OTHER, ArgumentKind.OTHER]


def test_values_are_the_same_in_batches_and_in_the_decoders_cache(start: tuple[str, str]) -> None:
    edge = load_language_model(start[0], dtype="float32")
    renderer = shared_renderer(edge.tokenizer)
    rows = [renderer.user_turn([Turn(text)]) for text in ("trains", "money in Rome on Friday", "music?")]
    layers = [0, 1]
    for row, values in zip(rows, read_values(edge.model, layers, rows, max_tokens=64), strict=True):
        assert values.shape == (len(row), len(layers) * value_width(edge.model))
        states = merged_decoder(edge, None).prefill(row).states
        assert torch.allclose(values, side_by_side(states.values(layers)), atol=1e-5)


def test_tools_do_not_depend_on_each_other_when_they_are_read(start: tuple[str, str]) -> None:
    edge = load_language_model(start[0], dtype="float32")
    renderer = shared_renderer(edge.tokenizer)
    other = Tool(name="stop", description="Stop.", parameters=schema())
    alone = read_arguments(edge.model, renderer, [TABLE], [0])[0]
    together = read_arguments(edge.model, renderer, [other, TABLE], [0])
    assert together[0].shape == (0, alone.shape[1]) and torch.allclose(alone, together[1], atol=1e-5)


def test_padding_changes_nothing_and_tokens_see_what_is_behind_them() -> None:
    torch.manual_seed(0)
    reader = ArgumentReader([0], 6, width=8, hidden=16).eval()
    kinds, required = torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, dtype=torch.bool)
    listed = Listed(torch.randn(2, 3, 32), kinds, required, ~required)
    values = torch.randn(2, 9, 6)
    present = torch.arange(9) < torch.tensor([[4], [9]])
    read = reader(values, present, listed)
    first = Listed(listed.vectors[:1], kinds[:1], required[:1], ~required[:1])
    alone = reader(values[:1, :4], present[:1, :4], first)
    assert torch.allclose(read.stands[:1, :4], alone.stands, atol=1e-5)
    assert torch.allclose(read.given[:1], alone.given, atol=1e-5)
    assert torch.allclose(read.begins[:1, :, :5], alone.begins, atol=1e-5)
    assert torch.allclose(read.ends[:1, :, :5], alone.ends, atol=1e-5)
    assert torch.allclose(alone.begins.exp().sum(dim=-1), torch.ones(1, 3))
    values[1, 8] += 1.0
    assert not torch.allclose(read.stands[1, 2], reader(values, present, listed).stands[1, 2], atol=1e-6)


def test_stretches_share_the_probability_with_none_of_them() -> None:
    torch.manual_seed(0)
    parts = {"stands": torch.randn(1, 5, 3), "given": torch.randn(1, 2), "inside": torch.randn(1, 2, 5)}
    ends, begins = torch.randn(2, 1, 2, 6).log_softmax(dim=-1)
    found = FoundArguments({"a": 0.5, "b": 0.5}, Reading(begins=begins, ends=ends, **parts))
    spans, absent = found.spans("b", [0, 3], [1, 2, 4])
    assert torch.isinf(spans[1, :2]).all() and torch.isfinite(spans[0]).all() and torch.isfinite(spans[1, 2])
    assert float(spans.exp().sum()) + float(torch.tensor(absent).exp()) == pytest.approx(1.0)
    odds = begins[0, 1, 1] + ends[0, 1, 3] + 0.3 * parts["inside"][0, 1, :3].sum() - begins[0, 1, 0] - ends[0, 1, 0]
    assert float(spans[0, 1] - absent) == pytest.approx(float(odds), abs=1e-5)


def test_a_tool_is_read_in_other_words_too() -> None:
    described = {"type": "string", "description": "Where to eat."}
    tool = TABLE.model_copy(update={"parameters": schema(("place",), place=described, people={"type": "integer"})})
    (named, first), (unnamed, second) = reworded(tool, random.Random(0))
    assert [named.argument_names[place] for place in first] == ["place", "people"]
    assert "description" not in named.parameters["properties"]["place"] and "Where" not in argument_texts(named)[0][0]
    place, people = (unnamed.argument_names[place] for place in second)
    assert place != "place" and people == "people" and unnamed.parameters["properties"][place] == described
    assert tool.parameters["properties"]["place"] == described


def test_it_learns_which_arguments_a_request_gives(start: tuple[str, str], tmp_path: Path) -> None:
    edge = load_language_model(start[0], dtype="float32")
    # Single requests: pairs of them and earlier turns make rows long, and steps slow.
    plain: dict[str, Any] = {"joined": 0, "earlier": 0, "steps": 60, "learning_rate": 1e-2}
    generator = LoRAGenerator.load(trained(start, tmp_path, **plain), None, edge)
    scores = generator.notes["argument_head"]
    assert scores["all_t"] >= 0.8 and scores["copied_t"] >= 0.6  # half of the requests name a day
    registry = ToolRegistry(
        [Tool(name=t.name, description=t.description, parameters=t.parameters) for t in data().tools.values()]
    )
    parts = generator.generate_parts("", registry)
    keys = parts.arguments("find_plants")
    assert keys is not None and keys is parts.arguments("find_plants")

    def given(request: str) -> float:
        states = (
            merged_decoder(edge, parts.shared)
            .prefill(shared_renderer(edge.tokenizer).user_turn([Turn(request)]))
            .states
        )
        return keys.find(side_by_side(states.values(keys.reader.layers))).given["day"]

    assert given("plants in Bern on Sunday?") > given("plants in Bern?")


def test_it_goes_on_from_what_was_read(start: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = trained(start, tmp_path, steps=3)

    def refuse(*arguments: Any) -> None:
        raise AssertionError("a request is read again")

    monkeypatch.setattr("loragen_agents.training.argument_trainer.read_values", refuse)
    assert trained(start, tmp_path, steps=3) == first


def test_the_other_parts_of_the_generator_stay(start: tuple[str, str], tmp_path: Path) -> None:
    edge = load_language_model(start[0], dtype="float32")
    before, after = (LoRAGenerator.load(one, None, edge) for one in (start[1], trained(start, tmp_path, steps=2)))
    own = after.own_tensors()
    for name, tensor in before.own_tensors().items():
        assert torch.equal(own[name], tensor.to(torch.bfloat16).float() if tensor.dim() > 1 else tensor), name


def test_its_recipe_ships_and_asks_for_data() -> None:
    recipe = load_recipe("argument_head")
    assert isinstance(recipe, ArgumentRecipe)
    with pytest.raises(DataError, match="--data"):
        train_argument_head(recipe, "unused")


def test_only_words_of_the_open_request_stand_for_the_arguments_of_the_call_that_is_due(start: tuple[str, str]) -> None:
    renderer = shared_renderer(load_language_model(start[0]).tokenizer)
    plain = build_argument_examples(
        data(), renderer, ArgumentRecipe.model_validate({"joined": 0, "earlier": 0})
    ).requests
    longest = max(len(one.ids) for one in plain)
    for changes in ({"joined": 30, "earlier": 0}, {"joined": 0, "earlier": 30}):
        made = build_argument_examples(data(), renderer, ArgumentRecipe.model_validate(changes)).requests[len(plain) :]
        assert len(made) > 10 and max(len(one.ids) for one in made) > longest
        for one in made:
            stood = {label for label in one.stands if label > 0}
            assert stood == {1 + n for n, given in enumerate(one.given) if given}
        if changes["earlier"]:
            # Earlier turns hold values of their own, in the first half of the prompt.
            assert all(max(one.stands[: len(one.ids) // 3]) <= 0 for one in made)


# Holding calls to what was found


def test_what_is_sure_is_demanded_or_refused_and_required_arguments_stay() -> None:
    demanded, refused = held_arguments(TABLE, {"place": 0.0, "people": 0.99, "day": 0.01, "quiet": 0.02})
    assert demanded == {"people"} and refused == {"day", "quiet"}
    parameters = narrowed(TABLE, demanded, refused).parameters
    assert list(parameters["properties"]) == ["place", "people"] and parameters["required"] == ["place", "people"]
    assert TABLE.argument_names == ("place", "people", "day", "quiet")


def test_schemas_whose_other_keywords_speak_of_arguments_are_left_as_they_are() -> None:
    either = {**TABLE.parameters, "anyOf": [{"required": ["people"]}, {"required": ["day"]}]}
    tool = TABLE.model_copy(update={"parameters": either})
    assert held_arguments(tool, {"people": 0.0, "day": 0.0}) == (frozenset(), frozenset())


class _Keys:
    """Stands for the keys of a tool whose reader finds what a test says."""

    def __init__(self, **given: float) -> None:
        self._given, self.reader = given, self
        self.layers = (0,)

    def find(self, values: torch.Tensor) -> FoundArguments:
        count, tokens = len(self._given), len(values)
        places = torch.zeros(1, count, 1 + tokens).log_softmax(dim=-1)
        stands, inside = torch.zeros(1, tokens, 1 + count), torch.zeros(1, count, tokens)
        return FoundArguments(self._given, Reading(stands, torch.zeros(1, count), places, places, inside))


@pytest.mark.parametrize("input_format", ["json", "csv"])
@pytest.mark.parametrize("choice", ["auto", "book_table"])
def test_calls_are_held_to_what_the_reader_finds(start: tuple[str, str], choice: str, input_format: Any) -> None:
    edge: LanguageModel = load_language_model(start[0], dtype="float32")
    registry = ToolRegistry([TABLE], input_format=input_format)
    made = LoRAGenerator.load(start[1], None, edge).generate_parts("", registry)
    found: Any = _Keys(place=0.9, people=0.9, day=0.1, quiet=0.1)
    special = SpecializedLM(
        edge, RegistryWeights(made.shared, made.keys, made.combined, None, lambda _: found), registry
    )
    turns = [Turn("a table for 4 in Rome")]
    grammar = special.score(turns, "any").grammar
    if choice != "auto":
        grammar = special._unscored(special.renderer.user_turn(turns), turns, choice, None).grammar
    written = '{"place": "a", "people": 4}'
    refused = ['{"place": "a"}', '{"place": "a", "people": 4, "day": "today"}']
    if input_format == "csv":
        # Arguments are told by their place there, so they stay as they are.
        assert _takes(grammar, "a, 4, today") and _takes(grammar, "a")
    else:
        assert _takes(grammar, written) and not any(_takes(grammar, text) for text in refused)


def _takes(grammar: Any, action_input: str) -> bool:
    matcher = grammar.matcher()
    tokenizer = grammar.tokenizer
    ids = shared_renderer(tokenizer).encode_text(
        f" Yes\nAction: book_table\nAction Input: {action_input}\nObservation:"
    )
    return bool(matcher._matcher.try_consume_tokens(ids) == len(ids))
