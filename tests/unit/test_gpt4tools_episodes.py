"""Episodes drawn from GPT4Tools rows: a function of their number, with registries that serve their requests."""

import json
from collections import Counter
from pathlib import Path

import pytest

from loragen_agents.conversation.prompts import TakenStep, Turn
from loragen_agents.conversation.react import Answer, ToolStep, parse_step
from loragen_agents.data.episodes import GoldCall, target_text
from loragen_agents.data.gpt4tools_episodes import GPT4ToolsSampler, gpt4tools_samplers
from loragen_agents.data.gpt4tools_files import GPT4ToolsSample
from loragen_agents.data.gpt4tools_mini import mini_tool_names
from loragen_agents.data.gpt4tools_mini_rows import mini_rows, write_mini
from loragen_agents.data.options import GPT4ToolsOptions
from loragen_agents.errors import DataError
from loragen_agents.training.recipe import Recipe

ROWS = mini_rows("train")


def test_an_episode_is_a_function_of_its_number() -> None:
    one, two = GPT4ToolsSampler(ROWS, seed=5), GPT4ToolsSampler(ROWS, seed=5)
    assert [one.episode(n) for n in (3, 0)] == [two.episode(n) for n in (3, 0)]
    assert one.episode(3) != GPT4ToolsSampler(ROWS, seed=6).episode(3)


def test_what_is_drawn_parses_back_to_the_gold_step() -> None:
    sampler = GPT4ToolsSampler(ROWS, options=GPT4ToolsOptions(tools=(4, 10), answered=0.25, invented=0.5))
    due, invented = Counter[str | None](), 0
    for number in range(150):
        episode = sampler.episode(number)
        assert len(episode.samples) == 8 and len(episode.registry) >= 4
        assert set(episode.tool_ids) <= set(mini_tool_names("train"))
        invented += episode.registry.names != episode.tool_ids
        for sample in episode.samples:
            due[sample.tool] += 1
            step = parse_step(target_text(sample, episode.registry), episode.registry)
            if isinstance(sample.gold, GoldCall):
                assert isinstance(step, ToolStep)
                assert (step.action, step.arguments) == (sample.gold.name, sample.gold.arguments)
                # The source's tool, under whatever name it has in this registry.
                assert episode.tool_ids[episode.registry.names.index(sample.gold.name)] == sample.tool
            else:
                assert isinstance(step, Answer) and step.text == sample.gold
            assert all(taken.action in episode.registry for taken in sample.turns[-1].steps)
    assert 0.4 < invented / 150 < 0.6
    assert 0.2 < due[None] / 1200 < 0.3
    assert len(due) == 22 and min(due.values()) > 20


def test_splits_share_no_row() -> None:
    splits = [GPT4ToolsSampler(ROWS, split=split) for split in ("train", "dev")]  # type: ignore[arg-type]
    train, dev = (
        {sample.turns for number in range(200) for sample in sampler.episode(number).samples} for sampler in splits
    )
    assert not train & dev and len(dev) > 40


def test_outputs_of_several_steps_become_samples() -> None:
    registry = ROWS[0].registry
    question = "Thought: Do I need to use a tool?"
    due = (
        TakenStep("Edge Detection On Image", "a.png", "b.png"),
        TakenStep("Generate Image Condition On Canny Image", "b.png, a fox", "c.png"),
    )
    output = "".join(
        f"{question} Yes\nAction: {s.action}\nAction Input: {s.action_input}\nObservation: {s.observation}\n"
        for s in due
    )
    row = GPT4ToolsSample("1", registry, (Turn("A fox."),), f"{question} No\nAI: c.png\n", ())
    both = GPT4ToolsSample("2", registry, (Turn("A fox, please."),), f"{output}{question} No\nAI: c.png\n\n", due)
    kinds = Counter(
        (sample.kind, len(sample.turns[-1].steps))
        for number in range(30)
        for sample in GPT4ToolsSampler([row, both], options=GPT4ToolsOptions(invented=1.0)).episode(number).samples
    )
    assert set(kinds) == {("call", 0), ("next_call", 1), ("final_answer", 2)}


def test_recipes_name_their_data(tmp_path: Path) -> None:
    for name in ("gpt4tools_lora", "gpt4tools_lora_definitions", "gpt4tools_lora_gen"):
        recipe = Recipe.load(name)
        samplers = gpt4tools_samplers(recipe.data, recipe.sampler, recipe.seed)
        assert samplers is not None and set(samplers[1]) == {"real", "invented"}
    path, _ = write_mini("seen", tmp_path)
    assert gpt4tools_samplers([str(path)], {"tools": [3, 5]}, 0) is not None
    assert gpt4tools_samplers([str(tmp_path)], {}, 0) is None
    with pytest.raises(DataError, match="can't be mixed"):
        gpt4tools_samplers(["gpt4tools-mini", str(tmp_path)], {}, 0)
    with pytest.raises(DataError, match=r"tools.1: field required; csv: unexpected"):
        gpt4tools_samplers(["gpt4tools-mini"], {"csv": 1.0, "tools": [4]}, 0)
    path.write_text(json.dumps([]), encoding="utf-8")
    with pytest.raises(DataError, match="no row for the dev split"):
        gpt4tools_samplers([str(path)], {}, 0)
