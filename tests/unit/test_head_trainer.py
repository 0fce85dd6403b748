"""Training the tool head on a tiny model: what is read, what is drawn, and that it learns."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from loragen_agents.data.records import DataSet
from loragen_agents.errors import DataError
from loragen_agents.generator import GeneratorConfig, LoRAGenerator
from loragen_agents.generator.tool_head import ToolHead
from loragen_agents.generator.tool_texts import TextKind
from loragen_agents.models.language_models import load_language_model
from loragen_agents.registry import Tool, ToolRegistry
from loragen_agents.support.progress import silent
from loragen_agents.training import head_features
from loragen_agents.training.head_examples import Asked, HeadExamples, build_examples
from loragen_agents.training.head_recipe import HeadRecipe
from loragen_agents.training.head_trainer import _Draws, fit_head, head_scores, train_head
from loragen_agents.training.recipe import Recipe, load_recipe
from loragen_agents.training.trainer import _take_over
from tests.tiny_models import save_tiny_model
from tests.unit.test_trainer import GENERATOR, data

SMALL: dict[str, Any] = {
    "head_layers": 2,
    "head_width": 4,
    "directions": 24,
    "invented_names": 3,
    "small_talk": 10,
    "later_steps": 12,
    "steps": 20,
}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A tiny edge LM and a generator for it."""
    folder = tmp_path_factory.mktemp("head")
    edge = str(save_tiny_model(folder / "edge"))
    model = load_language_model(edge, dtype="float32")
    torch.manual_seed(0)
    generator = LoRAGenerator(GeneratorConfig(**GENERATOR), None, model)
    with torch.no_grad():
        for parameter in generator.producer.parameters():
            parameter.add_(torch.randn_like(parameter) / 20)
    return edge, str(generator.save(folder / "generator"))


def recipe(start: tuple[str, str], **changes: Any) -> HeadRecipe:
    edge, generator = start
    settings = {**SMALL, "cloud": edge, "edge": edge, "dtype": "float32", "start_from": generator}
    return HeadRecipe.model_validate(settings | changes)


def examples(**changes: Any) -> HeadExamples:
    return build_examples(data(), HeadRecipe.model_validate(SMALL | changes))


def test_every_text_is_read_once_and_every_request_has_its_tool() -> None:
    made = examples()
    assert len(set(made.texts)) == len(made.texts) and len(made.tools) == 8
    for one in made.asked:
        request = made.texts[one.text].request
        if one.tool is not None and not made.texts[one.text].steps:
            thing = made.tools[one.tool].name.removeprefix("find_")
            assert thing in request.lower() and one.tool in one.never
    assert {one.split for one in made.asked if one.tool is not None} == {"train", "dev"}


def test_what_is_due_behind_steps_is_the_next_tool_or_none() -> None:
    made = examples(later_steps=60)
    later = [(made.texts[one.text], one) for one in made.asked if made.texts[one.text].steps]
    assert {one.tool is None for _, one in later} == {True, False}
    for turn, one in later:
        taken = {step.action for step in turn.steps}
        due = None if one.tool is None else made.tools[one.tool].name
        named = {tool.name for tool in made.tools if tool.name.removeprefix("find_") in turn.request.lower()}
        assert named == taken | ({due} if due else set())


def test_no_registry_holds_a_tool_that_could_serve_the_request_too() -> None:
    made = examples()
    draws = _Draws(made, HeadRecipe.model_validate(SMALL))
    for _ in range(20):
        tools, texts, asked = draws.step()
        held, gold = draws.registries(asked, tools, torch.randn(len(asked), len(tools)))
        assert texts.shape == (len(tools), len(TextKind)) and held.shape == (len(asked), len(tools))
        for row, one in enumerate(asked):
            there = {tools[n] for n in held[row].nonzero()[:, 0].tolist()}
            served = int(gold[row]) < len(tools)
            assert there & one.never == ({one.tool} if served else set())
            assert not served or tools[int(gold[row])] == one.tool
            assert all(made.tools[tool].split == "train" for tool in there)


def test_a_head_learns_what_tools_have_in_common_with_their_requests() -> None:
    """Texts of one tool share a hidden direction, turned between requests and tools: maps have to find the turn."""
    torch.manual_seed(0)
    tools, slots, width = 40, 4, 16
    turn = torch.linalg.qr(torch.randn(width, width))[0]
    meaning = torch.randn(tools, 8, 4)
    lift = torch.randn(8, slots * width) / 3

    def spread(meaning: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize((meaning @ lift).view(-1, slots, width), dim=-1)

    made = HeadExamples()
    base = examples()
    coordinates: list[torch.Tensor] = []
    for index in range(tools):
        own = meaning[index].mean(dim=1)
        record = base.tools[0]
        made.tools.append(
            record.__class__(**{**record.__dict__, "id": str(index), "split": "dev" if index >= 30 else "train"})
        )
        made.tool_texts.append([len(coordinates), len(coordinates), -1])
        coordinates.append(spread(own[None]) @ turn)
        for _ in range(6):
            split: Any = "dev" if index >= 30 else "train"
            made.asked.append(Asked(len(coordinates), index, frozenset({index}), "t", split))
            coordinates.append(spread((own + torch.randn(8) * 0.15)[None]))
    made.invented = [0]
    x = torch.cat(coordinates).half()
    settings = HeadRecipe.model_validate(SMALL | {"steps": 150, "invented": 0.0, "dropped": 0.0, "learning_rate": 1e-2})
    head = ToolHead((1, 2), width, 8)
    with torch.no_grad():
        head.tool_map.copy_(torch.randn_like(head.tool_map) / 4)
    before = head_scores(head, x, made)
    fit_head(head, x, made, settings)
    after = head_scores(head, x, made)
    assert before["all_t"] < 0.5 < 0.7 < after["all_t"]
    assert after["eight_t"] > 0.85 and after["served"] + after["irrelevant"] > 1.3


def test_a_run_gives_a_generator_with_a_head(
    start: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    folder = train_head(recipe(start), tmp_path, data=data(), progress=lambda text, part: said.append(text))
    edge = load_language_model(start[0], dtype="float32")
    before, after = LoRAGenerator.load(start[1], None, edge), LoRAGenerator.load(folder, None, edge)
    kept = before.own_tensors()
    for name, tensor in after.own_tensors().items():
        if name in kept:
            torch.testing.assert_close(tensor, kept[name].to(torch.bfloat16).float())
    assert after.tool_head is not None and after.config.head_layers == 2
    registry = ToolRegistry([Tool(name="a", description="Find trains."), Tool(name="b", description="Find money.")])
    keys = after.generate_parts("", registry).keys
    assert keys is not None and keys.vectors.shape == (2, 2 * 2 * 4)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert (
        {"all_t", "eight_t", "served", "irrelevant", "none_chat"}
        <= scores.keys()
        == after.notes["head"].keys() - {"requests"}
    )
    assert any(text.startswith("Reading") for text in said) and any(text.startswith("Learning") for text in said)

    # What was read is not read again, and the same reading gives the same head.
    monkeypatch.setattr(head_features, "captured_at", lambda *given: pytest.fail("texts were read again"))
    again = LoRAGenerator.load(train_head(recipe(start), tmp_path, data=data()), None, edge)
    assert again.fingerprint == after.fingerprint


def test_reading_goes_on_where_it_was_stopped(
    start: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_features, "_BLOCK", 16)
    read: list[int] = []
    stops: list[int] = []
    captured = head_features.captured_at

    def stopped(model: Any, layers: Any, rows: Any) -> Any:
        read.append(len(rows))
        if len(read) == 3 and not stops:
            stops.append(len(read))
            raise KeyboardInterrupt
        return captured(model, layers, rows)

    monkeypatch.setattr(head_features, "captured_at", stopped)
    with pytest.raises(KeyboardInterrupt):
        train_head(recipe(start), tmp_path, data=data())
    total = len(build_examples(data(), recipe(start)).texts)
    train_head(recipe(start), tmp_path, data=data(), progress=silent)
    assert sum(read) == total + 16
    # Other texts are another reading.
    read.clear()
    train_head(recipe(start, small_talk=0), tmp_path, data=data())
    assert sum(read) == len(build_examples(data(), recipe(start, small_talk=0)).texts)


def test_data_without_a_dev_split_is_refused(start: tuple[str, str], tmp_path: Path) -> None:
    whole = data()
    calls = tuple(record for record in whole.calls if record.split == "train")
    with pytest.raises(DataError, match="no requests of split dev"):
        train_head(recipe(start), tmp_path, data=DataSet(whole.tools, calls))
    with pytest.raises(DataError, match="names no data"):
        train_head(recipe(start), tmp_path)


def test_a_head_on_more_layers_than_there_are_is_named(start: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="head_layers is 99, and the edge LM has 3 layers"):
        train_head(recipe(start, head_layers=99), tmp_path, data=data())


def test_recipes_of_heads_are_told_by_what_they_train(tmp_path: Path) -> None:
    assert isinstance(load_recipe("head"), HeadRecipe)
    with pytest.raises(DataError, match="recipe of a head"):
        Recipe.load("head")
    file = tmp_path / "mine.yaml"
    file.write_text("trains: head\nheadlayers: 3\n")
    with pytest.raises(DataError, match="headlayers"):
        load_recipe(file)


def test_training_the_experts_leaves_an_older_head_behind(start: tuple[str, str], tmp_path: Path) -> None:
    edge = load_language_model(start[0], dtype="float32")
    torch.manual_seed(0)
    headed = LoRAGenerator(GeneratorConfig(**GENERATOR, head_layers=2, argument_layers=1), None, edge)
    headed.save(tmp_path)
    plain = LoRAGenerator(GeneratorConfig(**GENERATOR), None, edge)
    _take_over(plain, tmp_path)
    for name, tensor in plain.own_tensors().items():
        assert torch.equal(tensor, headed.own_tensors()[name])
    with pytest.raises(DataError, match="other generator settings than the recipe: head_layers"):
        _take_over(LoRAGenerator(GeneratorConfig(**GENERATOR, head_layers=1), None, edge), tmp_path)
