"""Values that are copied from the request: which words may be one, and what the model hears of them while it writes."""

from typing import Any

import pytest
import torch

from loragen_agents.adapter.argument_reader import FoundArguments, Reading
from loragen_agents.conversation.prompts import Turn
from loragen_agents.conversation.renderers import shared_renderer
from loragen_agents.edge.copying import CopiedValues, RequestText, copied_types, copied_values
from loragen_agents.edge.decoding import Decoder
from loragen_agents.edge.grammar import ToolGrammar
from loragen_agents.edge.sampling import Sampling
from loragen_agents.registry import Tool, ToolRegistry
from tests.tiny_models import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
RENDERER = shared_renderer(TOKENIZER)
TEXT = {"type": "string"}
RIDE = Tool(
    name="ride",
    description="Book a ride.",
    parameters={
        "type": "object",
        "properties": {"start": TEXT, "goal": TEXT, "seats": {"type": "integer"}},
        "required": ["start", "goal"],
    },
)
REQUEST = "From Anna's house in Bern (Old Town) to Rome, please"


def found(turns: list[Turn], tool: Tool = RIDE, sure: float = 8.0, **values: str) -> FoundArguments:
    """What a reader finds that is sure of some values, and of the others that they stand nowhere."""
    ids, text, starts = RENDERER.user_turn_with_starts(turns)
    names, tokens = tool.argument_names, len(ids)
    begins, ends = torch.zeros(2, 1, len(names), 1 + tokens)
    for row, name in enumerate(names):
        if name in values:
            at = text.index(values[name])
            first = max(n for n in range(tokens) if starts[n] <= at)
            last = max(n for n in range(tokens) if starts[n] < at + len(values[name]))
            begins[0, row, 1 + first] = ends[0, row, 1 + last] = sure
        else:
            begins[0, row, 0] = ends[0, row, 0] = sure
    shapes = torch.zeros(1, tokens, 1 + len(names)), torch.zeros(1, len(names))
    inside = torch.zeros(1, len(names), tokens)
    return FoundArguments(
        dict.fromkeys(names, 1.0), Reading(*shapes, begins.log_softmax(dim=-1), ends.log_softmax(dim=-1), inside)
    )


def copied(turns: list[Turn], tool: Tool = RIDE, sure: float = 8.0, **values: str) -> CopiedValues:
    made = copied_values(tool, turns, RENDERER, TOKENIZER, found(turns, tool, sure, **values))
    assert made is not None
    return made


def test_plain_texts_and_numbers_are_copied() -> None:
    properties: dict[str, Any] = {
        "plain": {"type": "string", "description": "Any."},
        "choice": {"enum": ["a", "b"]},
        "fixed": {"type": "string", "enum": ["a"]},
        "shaped": {"type": "string", "pattern": "^a"},
        "count": {"type": "integer", "minimum": 1},
        "day": {"type": "string", "format": "date"},
        "either": {"type": ["string", "integer"]},
        "anything": True,
        "some": {"type": ["string", "null"], "default": None},
        "maybe": {"anyOf": [{"type": "number", "minimum": 0}, {"type": "null"}], "title": "Maybe"},
        "mixed": {"anyOf": [{"type": "number"}, {"type": "string"}]},
        "elsewhere": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}]},
        "picked": {"anyOf": [{"type": "string", "enum": ["a"]}, {"type": "null"}]},
    }
    parameters = {"type": "object", "properties": properties, "$defs": {"a": {"enum": ["a", "b"]}}}
    tool = Tool(name="t", description="Do it.", parameters=parameters)
    assert copied_types(tool) == {"plain": "string", "count": "integer", "some": "string", "maybe": "number"}


def test_values_begin_and_end_at_words_without_their_punctuation() -> None:
    text = f"user: {REQUEST}. 3-5pm? See /home/anna/x. (5+3)*12"
    begins, ends = RequestText(text, list(range(len(text))), text.index("From"), len(text)).words
    may_be = {text[begin:end] for begin in begins for end in ends if begin < end}
    assert {
        "Bern",
        "Old Town",
        "Rome",
        "Anna",
        "Anna's house",
        "3",
        "5pm",
        "3-5pm",
        "/home/anna/x",
        "x",
        "(5+3)*12",
    } <= may_be
    assert not any(value.endswith((",", "?", ".")) or value.startswith("user") for value in may_be)


@pytest.mark.parametrize(
    ("request_text", "value"),
    [(REQUEST, "Old Town"), (REQUEST, "Anna"), ('Say "so what" to Bo', "so what"), ("é à ö", "à")],
)
def test_the_likeliest_stretch_is_the_one_that_the_reader_marks(request_text: str, value: str) -> None:
    turns = [Turn("From Wien to Bo", (), "Done."), Turn(request_text)]
    read = found(turns, start=value)
    _, text, starts = RENDERER.user_turn_with_starts(turns)
    likely = RequestText(text, starts, *RENDERER.request_place(turns)).likeliest(read, ["start", "goal"])
    texts = likely["start"].texts
    assert max(texts, key=texts.__getitem__) == value and texts[value] > likely["start"].absent
    assert max(likely["goal"].texts.values()) < likely["goal"].absent


def test_words_of_one_argument_are_less_likely_those_of_another() -> None:
    turns = [Turn("from Bern to Rome")]
    _, text, starts = RENDERER.user_turn_with_starts(turns)
    read, other = (found(turns, start="Bern", goal=goal).reading for goal in ("Bern", "Rome"))
    for one, two in ((read.begins, other.begins), (read.ends, other.ends)):
        one[0, 1] = (0.6 * one[0, 1].exp() + 0.4 * two[0, 1].exp()).log()
    both = FoundArguments(dict.fromkeys(RIDE.argument_names, 1.0), read)
    request = RequestText(text, starts, *RENDERER.request_place(turns))
    alone = request.likeliest(both, ["start", "goal"])["goal"].texts
    settled = request.likeliest(both, ["start", "goal"], ["start", "goal"])
    assert alone["Bern"] > alone["Rome"]
    assert settled["goal"].texts["Rome"] > settled["goal"].texts["Bern"]
    assert settled["start"].texts["Bern"] == max(settled["start"].texts.values())


def written(values: CopiedValues, call: str, logits: torch.Tensor) -> dict[str, float]:
    """What is added to the logits behind the beginning of a call, by the text of each token that gets something."""
    guide = values.guide()
    for token in RENDERER.encode_text(call):
        guide.accept(token)
    after = logits.clone()
    guide.add(after)
    return {
        str(TOKENIZER.decode([n])): float(after[n] - logits[n]) for n in range(len(logits)) if after[n] != logits[n]
    }


def test_inside_a_value_its_next_token_gains_and_at_its_end_the_quote_mark() -> None:
    turns = [Turn("from Bern to Rome")]
    values, logits = copied(turns, start="Bern", goal="Rome"), torch.zeros(len(TOKENIZER))
    begun = ' Yes\nAction: ride\nAction Input: {"start": "'
    first = TOKENIZER.decode(RENDERER.encode_text("Bern")[:1])
    gains = written(values, begun, logits)
    assert max(gains, key=gains.__getitem__) == first and gains[first] > 1
    gains = written(values, f"{begun}Bern", logits)
    assert gains['"'] == max(gains.values()) > 1
    first = TOKENIZER.decode(RENDERER.encode_text("Rome")[:1])
    gains = written(values, begun + 'Bern", "goal": "', logits)
    assert max(gains, key=gains.__getitem__) == first


@pytest.mark.parametrize("call", ["", ' Yes\nAction: ride\nAction Input: {"start": "Wien', '{"seats": ', '{"other": "'])
def test_elsewhere_nothing_is_added(call: str) -> None:
    values = copied([Turn("from Bern to Rome")], start="Bern", goal="Rome")
    assert written(values, call, torch.zeros(len(TOKENIZER))) == {}


def test_a_conversation_without_words_of_its_own_gives_nothing() -> None:
    no_text = RIDE.model_copy(update={"parameters": {"type": "object", "properties": {"quiet": {"type": "boolean"}}}})
    turns = [Turn("two quiet seats")]
    assert copied_values(no_text, turns, RENDERER, TOKENIZER, found(turns, no_text)) is None


@pytest.mark.parametrize("goal", ["Rome", "Old Town", "Anna"])
def test_a_model_that_knows_nothing_writes_what_the_reader_is_sure_of(goal: str) -> None:
    """Held to the grammar of a call, in a batch beside a sequence that copies nothing."""
    decoder = Decoder(tiny_model().eval(), TOKENIZER)
    grammar = ToolGrammar(ToolRegistry([RIDE]), TOKENIZER, "ride")
    turns = [Turn(REQUEST)]
    values = copied(turns, sure=40.0, start="Bern", goal=goal)
    prompt = RENDERER.user_turn(turns)
    sampling = Sampling(max_tokens=80)
    told, alone = decoder.generate([prompt, prompt], sampling, grammar, guided=[values, None])
    assert f'{{"start": "Bern", "goal": "{goal}"' in told.text
    (plain,) = decoder.generate([prompt], sampling, grammar)
    assert alone.text == plain.text != told.text
    streamed = decoder.stream(prompt, sampling, grammar, guided=values)
    assert "".join(streamed) == told.text
    with pytest.raises(ValueError, match="guide"):
        decoder.generate([prompt], sampling, guided=[values, None])
