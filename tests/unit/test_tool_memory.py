"""The associative memory: its formula, what it writes, and what it leaves alone."""

import torch
import torch.nn.functional as F

from loragen_agents.generator.tool_memory import FIRST, LATER, ToolMemory, ToolReading
from loragen_agents.generator.tool_reading import (
    capture_down_proj_inputs,
    description_as_request,
    read_tools,
    reading_ids,
)
from loragen_agents.lora_weights import LoRAWeights, apply_lora
from loragen_agents.prompting import PromptRenderer
from loragen_agents.registry import Tool
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
    torch.manual_seed(2)
    return [ToolReading(torch.randn(len(LAYERS), length, INTERMEDIATE), torch.arange(length)) for length in lengths]


def test_pieces_follow_the_formula_written_out_for_one_piece() -> None:
    made, readings = memory(), random_readings(2, 3)
    directions = torch.randn(5, HIDDEN)
    a, b = made(readings, directions)[2, "down_proj"]

    # By hand: layer 2 is the memory's layer 1; of tool 1 the second piece, which is of the kind LATER.
    x = torch.cat([reading.activations[1] for reading in readings]) - made.background[[0, 1, 0, 1, 1], 1]
    x = x - x @ made.common[1] @ made.common[1].T
    c = x + x @ made.key_down[1] @ made.key_up[1]
    later = [1, 3, 4]
    key = c[3] - c[later].mean(dim=0)
    e = F.normalize(directions[3] - directions[later].mean(dim=0), dim=0)
    value = e + e @ made.value_down[1] @ made.value_up[1]

    torch.testing.assert_close(a[3], key / key.norm())
    torch.testing.assert_close(b[:, 3], made.scale[LATER, 1] * value)
    assert a.shape == (5, INTERMEDIATE) and b.shape == (HIDDEN, 5)


def test_keys_ignore_the_common_directions() -> None:
    made, readings = memory(), random_readings(1, 1, 1)
    made.key_up.data.zero_()
    shifted = [
        ToolReading(r.activations + 3 * made.common[:, None, :, 0] * (n + 1), r.token_ids)
        for n, r in enumerate(readings)
    ]
    torch.testing.assert_close(made.keys(shifted)[0], made.keys(readings)[0], atol=1e-5, rtol=1e-4)


def test_a_request_that_looks_like_a_description_matches_its_tool() -> None:
    made, readings = memory(), random_readings(2, 2, 2)
    made.match_weight.data.fill_(5.0)
    requests = torch.stack([reading.activations[:, 0] for reading in readings], dim=1)
    logits = made.match(readings, requests + 0.1 * torch.randn_like(requests))
    assert logits.argmax(dim=1).tolist() == [0, 1, 2]


def test_order_of_tools_changes_nothing_but_the_order_of_pieces() -> None:
    made, readings = memory(), random_readings(2, 3)
    directions = torch.randn(5, HIDDEN)
    straight = made(readings, directions)[1, "down_proj"]
    turned = made(readings[::-1], torch.cat([directions[2:], directions[:2]]))[1, "down_proj"]
    torch.testing.assert_close(straight[1] @ straight[0], turned[1] @ turned[0])


def test_a_single_tool_gets_pieces_too() -> None:
    made, readings = memory(), random_readings(1)
    a, b = made(readings, torch.randn(1, HIDDEN))[1, "down_proj"]
    assert a.norm() > 0.9 and b.norm() > 0


def test_background_is_the_mean_of_readings_and_common_the_leading_directions() -> None:
    made, readings = memory(), random_readings(2, 3)
    direction = F.normalize(torch.randn(INTERMEDIATE), dim=0)
    activations = torch.randn(len(LAYERS), 50, INTERMEDIATE) * 0.1 + 5 * torch.randn(len(LAYERS), 50, 1) * direction
    made.set_background(readings, activations)
    firsts = torch.stack([reading.activations[:, 0] for reading in readings])
    torch.testing.assert_close(made.background[FIRST].data, firsts.mean(dim=0))
    for basis in made.common:
        torch.testing.assert_close(basis.T @ basis, torch.eye(4), atol=1e-4, rtol=0)
        assert (basis.T @ direction).norm() > 0.99


def test_readings_stand_where_a_token_of_the_name_comes_next() -> None:
    model, renderer = tiny_model(), PromptRenderer(tiny_tokenizer())
    readings = read_tools(model, renderer, TOOLS, LAYERS)
    for each, reading in zip(TOOLS, readings, strict=True):
        ids, count = reading_ids(renderer, each)
        text = str(tiny_tokenizer().decode(ids))
        assert description_as_request(each) in text and text.endswith(f" Yes\nAction: {each.name}\n")
        assert tiny_tokenizer().decode(reading.token_ids) == f" {each.name}\n"
        alone = capture_down_proj_inputs(model, LAYERS, torch.tensor([ids]))
        torch.testing.assert_close(reading.activations, alone[:, 0, -count - 1 : -1], atol=1e-5, rtol=1e-4)


def test_reading_in_small_batches_gives_the_same() -> None:
    model, renderer = tiny_model(), PromptRenderer(tiny_tokenizer())
    whole = read_tools(model, renderer, TOOLS, LAYERS)
    pieces = read_tools(model, renderer, TOOLS, LAYERS, max_tokens=1)
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one.activations, other.activations, atol=1e-5, rtol=1e-4)


def test_written_pieces_raise_the_name_behind_its_description() -> None:
    """In an untrained model, with nothing learnt, the pieces alone make the name's first token more likely."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    renderer = PromptRenderer(tokenizer)
    readings = read_tools(model, renderer, TOOLS, LAYERS)
    made = ToolMemory(LAYERS, HIDDEN, INTERMEDIATE, common_rank=1, initial_scale=4.0)
    unembedding = model.get_output_embeddings().weight.float()
    directions = unembedding[torch.cat([reading.token_ids for reading in readings])]
    weights = LoRAWeights(SIZES["num_hidden_layers"], 1, 1, made(readings, directions))
    for each in TOOLS:
        ids, count = reading_ids(renderer, each)
        tokens = torch.tensor(ids[-count:])

        def name_score(ids: list[int] = ids, count: int = count, tokens: torch.Tensor = tokens) -> float:
            logits = model(input_ids=torch.tensor([ids])).logits[0, -count - 1 : -1]
            return logits.log_softmax(-1).gather(-1, tokens[:, None]).sum().item()

        with torch.no_grad():
            before = name_score()
            with apply_lora(model, weights):
                assert name_score() > before + 1
