"""Training on tiny models: what is learnt, what a broken run goes on with, and what bad input says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loragen_agents.conversation.renderers import shared_renderer
from loragen_agents.data.gpt4tools_episodes import gpt4tools_samplers
from loragen_agents.data.options import SamplerOptions, checked_options
from loragen_agents.data.records import Call, CallRecord, DataSet, Split, ToolRecord
from loragen_agents.data.sampler import RegistrySampler
from loragen_agents.errors import DataError
from loragen_agents.generator import GeneratorConfig, LoRAGenerator
from loragen_agents.models.language_models import load_language_model
from loragen_agents.support.content import content_folder
from loragen_agents.training.batches import PARTS
from loragen_agents.training.episode_model import EpisodeModel, tokenize_episode
from loragen_agents.training.packing import batches
from loragen_agents.training.recipe import Recipe, load_recipe
from loragen_agents.training.trainer import train
from tests.tiny_models import save_tiny_model

THINGS = ["weather", "money", "music", "letters", "photos", "trains", "recipes", "plants"]
GENERATOR: dict[str, Any] = {"n_experts": 1, "expert_scope": "per_layer", "rank": 4, "alpha": 8.0, "memory_layers": 2}
GENERATOR |= {"memory_common_rank": 4, "memory_key_rank": 4, "memory_value_rank": 4}


def data() -> DataSet:
    tools, calls = {}, []
    for number, thing in enumerate(THINGS):
        split: Split = "dev" if number >= 6 else "train"
        properties = {"place": {"type": "string"}, "day": {"type": "string"}}
        schema = {"type": "object", "properties": properties, "required": ["place"]}
        tool = ToolRecord(f"t/{thing}", f"find_{thing}", f"Find {thing} in a place.", thing, "t", split, schema)
        tools[tool.id] = tool
        for place, day in (("Rome", ""), ("Oslo", "Friday"), ("Lima", ""), ("Bern", "Sunday")):
            given = {"place": place, "day": day} if day else {"place": place}
            query = f"{thing} in {place} on {day}?" if day else f"{thing} in {place}?"
            calls.append(CallRecord(query, (Call(tool.id, given),), "t", split))
    return DataSet(tools, tuple(calls))


@pytest.fixture(scope="module")
def edge(tmp_path_factory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("edge")))


def recipe(edge: str, **changes) -> Recipe:
    settings = {
        "cloud": edge,
        "edge": edge,
        "dtype": "float32",
        "generator": GENERATOR,
        "sampler": {"tools": [[2, 4, 1.0]], "requests": 3, "history": 0.0, "sources": {"t": 1.0}},
        "steps": 6,
        "warmup": 1,
        "learning_rate": 5e-3,
        "save_every": 3,
        "evaluation": {"every": 3, "episodes": 2, "tools": 2},
    }
    return Recipe.model_validate(settings | changes)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "weights" / "generator.safetensors")


def test_every_target_token_has_its_part(edge):
    renderer = shared_renderer(load_language_model(edge).tokenizer)
    episode = RegistrySampler(data(), options=None).episode(0)
    for sample, raw in zip(tokenize_episode(renderer, episode).samples, episode.samples, strict=True):
        named = [
            t
            for t, part in zip(sample.input_ids[sample.prompt_length :], sample.parts, strict=True)
            if PARTS[part] == "name"
        ]
        text = load_language_model(edge).tokenizer.decode(named)
        assert text == ("" if isinstance(raw.gold, str) else f" {raw.gold.name}")
        if sample.action_place is not None:
            so_far = str(load_language_model(edge).tokenizer.decode(sample.input_ids[: sample.action_place + 1]))
            assert so_far.endswith("Action:")


def test_learning_makes_the_loss_fall_and_reaches_every_part(edge):
    model = load_language_model(edge, dtype="float32")
    generator = LoRAGenerator(GeneratorConfig(**GENERATOR), None, model)
    learner = EpisodeModel(generator, shared_renderer(model.tokenizer))
    sampler = RegistrySampler(data(), options=SamplerOptions(csv=0.0, tools=((4, 6, 1.0),)))
    episode = tokenize_episode(shared_renderer(model.tokenizer), sampler.episode(1))
    learner.set_background([episode])
    learner.train()
    optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = learner([episode])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    still = [n for n, p in generator.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not still


def test_the_match_learns_what_serves_a_request(edge):
    model = load_language_model(edge, dtype="float32")
    renderer = shared_renderer(model.tokenizer)
    learner = EpisodeModel(LoRAGenerator(GeneratorConfig(**GENERATOR), None, model), renderer)
    options = checked_options(
        SamplerOptions, {"tools": [[2, 3, 1.0]], "kinds": {"call": 0.6, "irrelevant": 0.4}, "history": 0.0}
    )
    drawn = RegistrySampler(data(), options=options).episode(0)
    assert {sample.kind for sample in drawn.samples} == {"call", "irrelevant"}
    episode = tokenize_episode(renderer, drawn)
    learner.set_background([episode])
    learner.train()
    optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        learner([episode]).backward()
        optimizer.step()
    learner.eval()
    learner.rates.clear()
    learner([episode])
    rates = learner.rates.means()
    assert (rates["serves"], rates["match"]) == (1.0, 1.0)
    assert learner.rates.counts["serves"] == len(drawn.samples)


def test_several_episodes_in_a_step_weigh_the_same_as_one_by_one(edge):
    model = load_language_model(edge, dtype="float32")
    learner = EpisodeModel(LoRAGenerator(GeneratorConfig(**GENERATOR), None, model), shared_renderer(model.tokenizer))
    episodes = [tokenize_episode(shared_renderer(model.tokenizer), RegistrySampler(data()).episode(n)) for n in (1, 2)]
    apart = torch.stack([learner([episode]) for episode in episodes]).mean()
    torch.testing.assert_close(learner(episodes), apart)


def test_padding_and_batching_change_no_loss(edge):
    model = load_language_model(edge, dtype="float32")
    generator = LoRAGenerator(GeneratorConfig(**GENERATOR), None, model)
    episode = tokenize_episode(shared_renderer(model.tokenizer), RegistrySampler(data()).episode(3))
    together, alone = (
        EpisodeModel(generator, shared_renderer(model.tokenizer), batch_tokens=size)([episode]) for size in (4096, 1)
    )
    torch.testing.assert_close(together, alone)


def test_definitions_in_the_prompt_run_once_and_give_the_same_loss(edge, monkeypatch):
    model = load_language_model(edge, dtype="float32")
    renderer = shared_renderer(model.tokenizer)
    generator = LoRAGenerator(GeneratorConfig(n_experts=1, expert_scope="per_layer", rank=2, alpha=4), None, model)
    episode = tokenize_episode(renderer, RegistrySampler(data()).episode(3), "full_react")

    def loss_and_tokens(share: bool) -> tuple[torch.Tensor, int]:
        counts = []

        def counted(*args, **options):
            for batch in batches(*args, **options | {"share": share}):
                counts.append(batch.ids.numel())
                yield batch

        monkeypatch.setattr("loragen_agents.training.episode_model.batches", counted)
        return EpisodeModel(generator, renderer, batch_tokens=4096)([episode]), sum(counts)

    (together, few), (alone, many) = loss_and_tokens(True), loss_and_tokens(False)
    torch.testing.assert_close(together, alone)
    assert few < many / 3


def test_a_broken_run_goes_on_to_the_same_weights(edge, tmp_path):
    settings: dict[str, Any] = {"steps": 4, "evaluation": {"every": 2, "episodes": 1, "tools": 2}}
    whole = train(recipe(edge, save_every=4, **settings), tmp_path / "whole", data=data())
    train(recipe(edge, save_every=2, **settings), tmp_path / "broken", data=data())
    # What a kill behind step 2 leaves: the checkpoint of that step and none later.
    for path in (tmp_path / "broken").glob("checkpoint-4/**/*"):
        if path.is_file():
            path.unlink()
    for path in sorted((tmp_path / "broken").glob("checkpoint-4/**"), reverse=True):
        path.rmdir()
    train(recipe(edge, save_every=2, **settings), tmp_path / "broken", resume=True, data=data())
    one, other = (weights(tmp_path / name / "checkpoint-4") for name in ("whole", "broken"))
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)
    best = json.loads((tmp_path / "whole" / "best.json").read_text())
    assert whole.is_dir() and 0 <= best["eval_score"] <= 1 and best["step"] in (2, 4)


def test_a_trained_generator_loads_for_its_model(edge, tmp_path):
    folder = train(recipe(edge, steps=3), tmp_path, data=data())
    model = load_language_model(edge)
    assert LoRAGenerator.load(folder, None, model).notes["step"] == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"generator": {"experts": 8}}, "experts"),
        ({"generator": {"memory_layers": 99}}, "memory_layers is 99, and the edge LM has 3 layers"),
        ({"sampler": {"tool": 3}}, "tool: unexpected"),
        ({"sampler": {"other_sources": {"sgd": 0.3}}}, "other_sources: input should be a valid number"),
        ({"sampler": {"csv": 20}}, "csv: input should be less than or equal to 1"),
        ({"sampler": {"names": {"invent": 1.0}}}, "names.invent.*'invented'"),
    ],
)
def test_settings_that_cannot_be_used_are_named(edge, tmp_path, changes, said):
    with pytest.raises(DataError, match=said):
        train(recipe(edge, **changes), tmp_path, data=data())


def test_a_folder_with_a_run_is_not_written_over(edge, tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(DataError, match="--resume"):
        train(recipe(edge), tmp_path, data=data())
    with pytest.raises(DataError, match="no checkpoint"):
        train(recipe(edge), tmp_path / "empty", resume=True, data=data())


def test_a_recipe_file_says_what_is_wrong_with_it(tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text("steps: many\nrate: 3\n")
    with pytest.raises(DataError, match=r"bad\.yaml: steps: .*; rate: extra"):
        Recipe.load(file)
    with pytest.raises(DataError, match="no recipe 'nothing'"):
        Recipe.load("nothing")


def test_the_recipes_that_ship_are_valid():
    files = sorted(content_folder("training").glob("*.yaml"))
    assert {"embedded", "paper", "lora", "lora_definitions"} <= {file.stem for file in files}
    for file in files:
        recipe = load_recipe(file)
        if not isinstance(recipe, Recipe):
            assert f"train {file.stem} --data" in file.read_text().splitlines()[0]
            continue
        GeneratorConfig.from_dict(recipe.generator)
        first = file.read_text().splitlines()[0]
        if gpt4tools_samplers(recipe.data, recipe.sampler, recipe.seed) is None:
            checked_options(SamplerOptions, recipe.sampler)
            assert first.startswith("#") and f"train {file.stem} --data" in first
        else:  # their data is shipped
            assert first == f"# loragen-agents train {file.stem}"


def test_gpt4tools_data_trains_too(tmp_path):
    edge = save_tiny_model(tmp_path / "edge")
    recipe = Recipe.model_validate(
        {
            "edge": str(edge),
            "cloud": str(edge),
            "dtype": "float32",
            "generator": GENERATOR,
            "data": ["gpt4tools-mini"],
            "max_tokens": 600,
            "sampler": {"requests": 2, "tools": [4, 5]},
            "steps": 2,
            "warmup": 0,
            "evaluation": {"every": 1, "episodes": 1},
        }
    )
    weights = train(recipe, tmp_path / "run")
    language_model = load_language_model(edge, dtype="float32")
    assert LoRAGenerator.load(weights, language_model, language_model).notes["step"] in (1, 2)


def test_a_run_with_given_tools_tells_how_their_calls_go(edge, tmp_path):
    settings = recipe(edge, whole_every=2, notes=0.5, episodes=2, log_every=2, evaluation={"every": 6, "episodes": 1})
    train(settings, tmp_path, data=data())
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {"given_call", "given_copied", "loss_name"} <= lines[0].keys()
    assert "eval_given_given_call" in json.loads((tmp_path / "best.json").read_text())


def test_a_run_over_time_ends_when_the_time_is_over_at_a_low_rate(edge, tmp_path):
    train(recipe(edge, steps=10**6, minutes=0.015, log_every=1), tmp_path, data=data())
    rates = [json.loads(line).get("learning_rate") for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    rates = [rate for rate in rates if rate is not None]
    assert 1 < len(rates) < 10**5
    # How far it falls depends on how long the last step took.
    assert rates[-1] < max(rates)
    assert rates == sorted(rates, reverse=True)
