"""The associative memory: its formula, what it writes, and what it leaves alone."""

import torch
import torch.nn.functional as F

from loragen_agents.adapter.lora_weights import LoRAWeights
from loragen_agents.adapter.tool_updates import UpdateKind
from loragen_agents.adapter.unmerged import apply_lora
from loragen_agents.conversation.prompts import PromptRenderer
from loragen_agents.generator.tool_memory import ToolMemory, ToolReading
from loragen_agents.generator.tool_reading import (
    capture_down_proj_inputs,
    read_tools,
    reading_text,
)
from loragen_agents.generator.tool_texts import as_request
from loragen_agents.registry import InputFormat, Tool
from tests.tiny_models import SIZES, tiny_model, tiny_tokenizer

HIDDEN, INTERMEDIATE = SIZES["hidden_size"], SIZES["intermediate_size"]
LAYERS = (1, 2)


def tool(name: str, description: str) -> Tool:
    return Tool(name=name, description=description, parameters={"type": "object", "properties": {}})


TOOLS = [
    tool("weather", "Tell the weather of a city."),
    tool("currency", "Change money into another currency."),
    tool("wine list", "Name wines that go with a dish."),
]


def memory(**settings: int) -> ToolMemory:
    torch.manual_seed(1)
    made = ToolMemory(LAYERS, HIDDEN, INTERMEDIATE, common_rank=4, key_rank=3, value_rank=3, **settings)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        made.common.copy_(torch.linalg.qr(torch.randn(len(LAYERS), INTERMEDIATE, 4)).Q)
    return made


def random_readings(*lengths: int) -> list[ToolReading]:
    """Readings with names of these lengths, and an update of each other kind; updates in the order of `kinds_of`."""
    torch.manual_seed(2)
    return [
        ToolReading(
            torch.randn(len(LAYERS), len(kinds), INTERMEDIATE), torch.randn(len(kinds), HIDDEN), torch.tensor(kinds)
        )
        for kinds in map(kinds_of, lengths)
    ]


def kinds_of(length: int) -> list[int]:
    name = [UpdateKind.NAME_START, *([UpdateKind.NAME] * (length - 1))]
    return [int(kind) for kind in (UpdateKind.DECISION, *name, UpdateKind.INPUT, UpdateKind.ARGUMENT)]


def test_updates_follow_the_formula_written_out_for_one_update() -> None:
    made, readings = memory(), random_readings(2, 3)
    a, b = made(readings)[2, "down_proj"]

    # By hand: layer 2 is the memory's layer 1; the kinds of the updates are D S N I A, D S N N I A.
    later = [2, 7, 8]
    x = torch.cat([reading.activations[1] for reading in readings])[later] - made.background[UpdateKind.NAME, 1]
    x = x - x @ made.common[1] @ made.common[1].T
    c = x + x @ made.key_down[UpdateKind.NAME, 1] @ made.key_up[UpdateKind.NAME, 1]
    key = c[1] - c.mean(dim=0)
    directions = torch.cat([reading.directions for reading in readings])[later]
    e = F.normalize(directions[1] - directions.mean(dim=0), dim=0)
    value = e + e @ made.value_down[1] @ made.value_up[1]

    torch.testing.assert_close(a[7], key / key.norm())
    torch.testing.assert_close(b[:, 7], made.scale[UpdateKind.NAME, 1] * value)
    assert a.shape == (11, INTERMEDIATE) and b.shape == (HIDDEN, 11)


def test_what_holds_for_every_tool_is_not_taken_off() -> None:
    """All tools that say the same of inputs, or of being called at all, say it together and no louder than one."""
    made = memory()
    made.value_up.data.zero_()
    one = random_readings(1)[0]
    alone, crowd = made([one])[2, "down_proj"], made([one] * 5)[2, "down_proj"]
    index = kinds_of(1).index(UpdateKind.INPUT)
    inputs = [index + 4 * n for n in range(5)]
    torch.testing.assert_close(crowd[1][:, inputs] @ crowd[0][inputs], alone[1][:, [index]] @ alone[0][[index]])
    torch.testing.assert_close(
        crowd[1][:, 4 * 3], made.scale[UpdateKind.DECISION, 1] * F.normalize(one.directions[0], dim=0)
    )


def test_what_all_names_begin_with_writes_nothing() -> None:
    """`get_weather` and `get_wine`: the first token tells the tools apart for nobody, and rounding errors least."""
    made, readings = memory(), random_readings(1, 1, 1)
    index = kinds_of(1).index(UpdateKind.NAME_START)
    same = torch.randn(HIDDEN)
    for reading in readings:
        reading.directions[index] = same * 7
    _, values = made(readings)[2, "down_proj"]
    assert values[:, [index, index + 4, index + 8]].abs().max() < 1e-3 < values[:, index + 1].abs().max()


def test_keys_ignore_the_common_directions() -> None:
    made, readings = memory(), random_readings(1, 1, 1)
    made.key_up.data.zero_()
    shifted = [
        ToolReading(r.activations + 3 * made.common[:, None, :, 0] * (n + 1), r.directions, r.kinds)
        for n, r in enumerate(readings)
    ]
    shifted_keys, keys = (made.mapped(each).unit_keys() for each in (shifted, readings))
    torch.testing.assert_close(shifted_keys, keys, atol=1e-5, rtol=1e-4)


def test_a_request_that_looks_like_a_description_matches_its_tool() -> None:
    made, readings = memory(), random_readings(2, 2, 2)
    made.match_weight.data.fill_(5.0)
    requests = torch.stack([reading.activations[:, 1] for reading in readings], dim=1)
    logits = made.match(readings).choose(requests + 0.1 * torch.randn_like(requests))
    assert logits.argmax(dim=1).tolist() == [0, 1, 2]


def test_a_request_that_no_description_looks_like_is_for_no_tool() -> None:
    made, readings = memory(), random_readings(2, 2, 2)
    made.decision_weight.data.fill_(5.0)
    served = torch.stack([reading.activations[:, 0] for reading in readings], dim=1)
    others = torch.randn(len(LAYERS), 4, INTERMEDIATE)
    logits = made.match(readings).decide(torch.cat([served, others], dim=1))
    assert logits.argmax(dim=1).tolist() == [0, 1, 2, 3, 3, 3, 3]


def test_order_of_tools_changes_nothing_but_the_order_of_updates() -> None:
    made, readings = memory(), random_readings(2, 3)
    straight = made(readings)[1, "down_proj"]
    turned = made(readings[::-1])[1, "down_proj"]
    torch.testing.assert_close(straight[1] @ straight[0], turned[1] @ turned[0])


def test_a_single_tool_gets_updates_too() -> None:
    made, readings = memory(), random_readings(1)
    a, b = made(readings)[1, "down_proj"]
    assert (a.norm(dim=1) > 0.9).all() and (b.norm(dim=0) > 0).all()


def test_background_is_the_mean_of_readings_and_common_the_leading_directions() -> None:
    made, readings = memory(), random_readings(2, 3)
    direction = F.normalize(torch.randn(INTERMEDIATE), dim=0)
    activations = torch.randn(len(LAYERS), 50, INTERMEDIATE) * 0.1 + 5 * torch.randn(len(LAYERS), 50, 1) * direction
    made.set_background(readings, activations)
    for place, kind in enumerate((UpdateKind.DECISION, UpdateKind.NAME_START)):
        own = torch.stack([reading.activations[:, place] for reading in readings])
        torch.testing.assert_close(made.background[kind].data, own.mean(dim=0))
    for basis in made.common:
        torch.testing.assert_close(basis.T @ basis, torch.eye(4), atol=1e-4, rtol=0)
        assert (basis.T @ direction).norm() > 0.99


def updates_of(tool: Tool, form: InputFormat, kind: UpdateKind) -> list[tuple[str, str, str]]:
    """What stands before each update of a kind, what it raises, and what it lowers."""
    decode = tiny_tokenizer().decode
    text = reading_text(PromptRenderer(tiny_tokenizer()), tool, form)

    def spelt(token: int | None) -> str:
        return "" if token is None else str(decode([token]))

    return [
        (str(decode(text.ids[: place + 1])), spelt(raised), spelt(lowered))
        for place, own, raised, lowered in zip(text.places, text.kinds, text.raised, text.lowered, strict=True)
        if own is kind
    ]


FLIGHTS = Tool(
    name="flights",
    description="Find flights.",
    parameters={"type": "object", "properties": {"city": {"type": "string"}, "seats": {"type": "integer"}}},
)


def test_a_reading_ends_a_name_where_the_line_ends() -> None:
    for each in TOOLS:
        (before, first, _), *later = updates_of(each, "json", UpdateKind.NAME_START) + updates_of(
            each, "json", UpdateKind.NAME
        )
        assert as_request(each.description) in before and before.endswith("tool? Yes\nAction:")
        assert first + "".join(raised for _, raised, _ in later) == f" {each.name}\n"


def test_a_reading_decides_for_a_tool_behind_the_question() -> None:
    ((before, raised, lowered),) = updates_of(FLIGHTS, "json", UpdateKind.DECISION)
    assert before.endswith("Thought: Do I need to use a tool?")
    assert (" Yes".startswith(raised), " No".startswith(lowered)) == (True, True) and raised != lowered


def test_a_reading_spells_arguments_in_json_alone() -> None:
    updates = updates_of(FLIGHTS, "json", UpdateKind.ARGUMENT)
    assert "".join(raised for _, raised, _ in updates) == "cityseats"
    assert updates[0][0].endswith('Action Input: {"')
    assert updates[-1][0].rpartition("Action Input:")[2].startswith(' {"city": "city", "')
    assert updates_of(FLIGHTS, "csv", UpdateKind.ARGUMENT) == []


def test_the_input_format_turns_the_sign_of_how_an_input_begins() -> None:
    ((before, raised, lowered),) = updates_of(FLIGHTS, "json", UpdateKind.INPUT)
    assert before.endswith("Action Input:") and ' {"'.startswith(raised) and not lowered
    ((before, raised, lowered),) = updates_of(FLIGHTS, "csv", UpdateKind.INPUT)
    assert before.endswith("Action Input:") and ' {"'.startswith(lowered) and not raised
    ((_, raised, _),) = updates_of(TOOLS[0], "json", UpdateKind.INPUT)
    assert " {}".startswith(raised)


def test_a_tool_says_how_its_input_begins_with_the_others_and_on_its_own() -> None:
    for form in ("json", "csv"):
        for each in (FLIGHTS, TOOLS[0]):
            assert updates_of(each, form, UpdateKind.INPUT) == updates_of(each, form, UpdateKind.OWN_INPUT)


def test_an_input_that_begins_unlike_the_others_is_told_from_them() -> None:
    """One of three tools takes no arguments: where its own name was written, its updates speak for `{}`."""
    made = memory()
    made.value_up.data.zero_()
    torch.manual_seed(3)
    opening, empty = torch.randn(2, HIDDEN)
    own = int(UpdateKind.OWN_INPUT)
    readings = [
        ToolReading(torch.randn(len(LAYERS), 1, INTERMEDIATE), direction[None], torch.tensor([own]))
        for direction in (opening, empty, opening)
    ]
    a, b = made(readings)[2, "down_proj"]
    said = (b @ a @ a.T).T @ (empty - opening)
    assert said[1] > 0 > max(said[0], said[2])


def test_activations_are_those_at_the_places_of_the_updates() -> None:
    model, renderer = tiny_model(), PromptRenderer(tiny_tokenizer())
    tools = [*TOOLS, FLIGHTS]
    for each, reading in zip(tools, read_tools(model, renderer, tools, LAYERS), strict=True):
        text = reading_text(renderer, each)
        alone = capture_down_proj_inputs(model, LAYERS, torch.tensor([text.ids]))
        torch.testing.assert_close(reading.activations, alone[:, 0, text.places], atol=1e-5, rtol=1e-4)
        assert reading.kinds.tolist() == text.kinds


def test_reading_in_small_batches_gives_the_same() -> None:
    model, renderer = tiny_model(), PromptRenderer(tiny_tokenizer())
    whole = read_tools(model, renderer, [*TOOLS, FLIGHTS], LAYERS)
    updates = read_tools(model, renderer, [*TOOLS, FLIGHTS], LAYERS, max_tokens=1)
    for one, other in zip(whole, updates, strict=True):
        torch.testing.assert_close(one.activations, other.activations, atol=1e-5, rtol=1e-4)


def test_written_updates_raise_the_name_behind_its_description() -> None:
    """In an untrained model, with nothing learnt, the updates alone make the call's own tokens more likely."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    renderer = PromptRenderer(tokenizer)
    readings = read_tools(model, renderer, TOOLS, LAYERS)
    made = ToolMemory(LAYERS, HIDDEN, INTERMEDIATE, common_rank=1, initial_scale=4.0)
    weights = LoRAWeights(SIZES["num_hidden_layers"], 1, 1, made(readings))
    for each in TOOLS:
        text = reading_text(renderer, each)
        named = [n for n, kind in enumerate(text.kinds) if kind in (UpdateKind.NAME_START, UpdateKind.NAME)]
        places, tokens = [text.places[n] for n in named], torch.tensor([text.raised[n] for n in named])

        def name_score(ids: list[int] = text.ids, places: list[int] = places, tokens: torch.Tensor = tokens) -> float:
            logits = model(input_ids=torch.tensor([ids])).logits[0, places]
            return logits.log_softmax(-1).gather(-1, tokens[:, None]).sum().item()

        with torch.no_grad():
            before = name_score()
            with apply_lora(model, weights):
                assert name_score() > before + 1
