"""The run, its files, the report, the comparison and the latency series, with an engine that writes by rule."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loragen_agents.bench import plots
from loragen_agents.bench.call_scores import CHOICE_METRICS, METRICS, score_call, score_choice
from loragen_agents.bench.compare import compare, comparison_table
from loragen_agents.bench.costs import PeakMemory, TurnCost, break_even_turns, kv_cache_bytes, model_bytes, variant_cost
from loragen_agents.bench.display import LiveTable
from loragen_agents.bench.gpt4tools_task import mini_task, score_sample
from loragen_agents.bench.latency import draw, latency_table, measure, tool_pool
from loragen_agents.bench.latency import run_latency as launch_latency
from loragen_agents.bench.report import markdown, render, write_report
from loragen_agents.bench.results import RunFolder, read_records, read_results, results_document, summarize
from loragen_agents.bench.runner import run_variants
from loragen_agents.bench.tasks import BLOCK, BenchSample, Task, Written
from loragen_agents.bench.variants import DEFAULT_VARIANTS, Variant, variant_from_name, variants_from_names
from loragen_agents.conversation.prompts import THOUGHT_QUESTION, TakenStep, Turn
from loragen_agents.data.episodes import GoldCall
from loragen_agents.data.gpt4tools_mini_rows import mini_registry
from loragen_agents.errors import DataError
from loragen_agents.registry import ToolRegistry
from loragen_agents.support.console import results as console
from tests.tiny_models import tiny_model


class FakeSession:
    def __init__(self, engine: "FakeEngine", variant: Variant, tokens: int) -> None:
        self.engine, self.variant, self.tokens = engine, variant, tokens
        self.setup_seconds: float | None = 0.5 if variant.base.source == "generator" else None

    def write(self, turns: Sequence[Turn]) -> Written:
        self.engine.written += 1
        if self.engine.written == self.engine.stop_after:
            raise KeyboardInterrupt
        text = self.engine.answers[self.variant.name](turns)
        prompt_tokens = 10 + (self.tokens if self.variant.definitions else 0)
        seconds = prompt_tokens / 1000
        return Written("prompt", text, "stop", TurnCost(prompt_tokens, 0, 11, seconds, seconds + 0.1, 1000))

    def choose(self, turns: Sequence[Turn]) -> Written:
        return replace(self.write(turns), tools={"one": 0.75, "two": 0.25})


class FakeEngine:
    """The first variant of the table is always right, the others always answer without a tool."""

    def __init__(self, task: Task | None = None, stop_after: int | None = None) -> None:
        gold = {sample.turns: sample.gold.removeprefix(THOUGHT_QUESTION) for sample in task.samples} if task else {}
        self.stop_after, self.written, self.opened = stop_after, 0, 0
        no_tool = lambda turns: " No\nAI: I can't."  # noqa: E731
        self.answers: dict[str, Any] = {name: no_tool for name in DEFAULT_VARIANTS}
        if task:
            self.answers["lora-gen"] = lambda turns: gold[tuple(turns)]

    def open(self, variant: Variant, registry: ToolRegistry, system_text: str) -> FakeSession:
        self.opened += 1
        return FakeSession(self, variant, 100 * len(registry))

    def missing(self, variants: Sequence[Variant]) -> dict[str, str]:
        return {}

    def describe(self, variants: Sequence[Variant]) -> dict[str, Any]:
        return {"rows_run": [variant.name for variant in variants]}

    def shape(self, variant: Variant) -> tuple[int, int]:
        return 0, 0

    def output_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(text.split()) for text in texts]


def run(task: Task, folder: RunFolder, variants: Sequence[Variant], stop_after: int | None = None) -> dict[str, Any]:
    engine = FakeEngine(task, stop_after)
    seen: list[Any] = []
    try:
        run_variants(task, variants, engine, folder, seen.append)
        complete = True
    except KeyboardInterrupt:
        complete = False
    finally:
        folder.close()
    shapes = {variant.name: (5000, 2) for variant in variants}
    summary = summarize(
        [(variant.name, variant.title) for variant in variants], folder.records, list(task.metrics), shapes, 20
    )
    results = results_document(
        folder.header, summary, missing={"lora": "loragen-agents train x.yaml"}, complete=complete, command="bench"
    )
    folder.write_results(results)
    return json.loads(json.dumps(results))


def header(task: Task) -> dict[str, Any]:
    return {
        "task": {"name": task.name, "title": task.title, "metrics": task.metrics, "fingerprint": task.fingerprint},
        "models": {"edge": {"name": "tiny", "fingerprint": "0" * 64}},
        "equal_tokens": 20,
    }


@pytest.fixture(scope="module")
def task() -> Task:
    return mini_task(("unseen",), limit=20)


ROWS = variants_from_names(["definitions", "lora-gen"])


def test_every_row_scores_every_sample(task: Task, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, header(task))
    results = run(task, folder, ROWS)
    assert [record["variant"] for record in folder.records[: 2 * BLOCK]] == ["definitions"] * BLOCK + [
        "lora-gen"
    ] * BLOCK
    assert results["variants"]["lora-gen"]["metrics"]["average"]["value"] == pytest.approx(1, abs=1e-6)
    no_tool_due = sum("Action:" not in sample.gold for sample in task.samples) / 20
    assert results["variants"]["definitions"]["metrics"]["success"]["value"] == pytest.approx(no_tool_due)
    cost = results["variants"]["lora-gen"]["cost"]
    assert cost["compression"] == pytest.approx(810 / 10)
    assert cost["tokens_per_second"] == pytest.approx(100)
    assert cost["equal_turn_ms"] == pytest.approx(10 + 19 * 10)
    assert cost["peak_bytes"] == 6000 and cost["kv_bytes"] == 2 * 21
    # 500 ms once against 800 ms more to the first token each turn.
    assert cost["break_even_turns"] == pytest.approx(500 / 800)
    assert cost["break_even_cached_turns"] is None
    assert results["complete"] and results["versions"]["torch"] and results["machine"]["cores"]


def test_due_steps_are_written_one_after_the_other(tmp_path: Path) -> None:
    registry = mini_registry("unseen")
    gold = (TakenStep("Detect Face", "a.png", "b.png"), TakenStep("Recognize Face", "b.png", "Ann"))
    output = "".join(
        f"{THOUGHT_QUESTION} Yes\nAction: {s.action}\nAction Input: {s.action_input}\nObservation: {s.observation}\n"
        for s in gold
    )
    sample = BenchSample("1", "own", "positive", registry, (Turn("Who is it?"),), output, due=gold)
    several = Task("gpt4tools", "Two steps", {"success": "SR"}, [sample], score_sample)
    engine = FakeEngine()

    def write(turns: Sequence[Turn]) -> str:
        step = gold[len(turns[-1].steps)]
        return f" Yes\nAction: {step.action}\nAction Input: {step.action_input}"

    engine.answers["bare"] = write
    folder = RunFolder(None, header(several))
    run_variants(several, variants_from_names(["bare", "lora-gen"]), engine, folder, lambda record: None)
    assert [record["scores"]["success"] for record in folder.records] == [1.0, 0.0]
    assert engine.written == 3  # an answer ends the steps


def test_two_calls_in_either_order_are_followed_by_their_own_reports(tmp_path: Path) -> None:
    registry = ToolRegistry.from_tools([{"name": name, "description": f"{name}!"} for name in ("north", "south")])
    due = (TakenStep("north", "{}", "north done"), TakenStep("south", "{}", "south done"))
    calls = (GoldCall("north", {}), GoldCall("south", {}))
    sample = BenchSample("1", "own", "2 calls", registry, (Turn("Both"),), "", calls=calls, due=due)
    seen: list[tuple[TakenStep, ...]] = []

    def write(turns: Sequence[Turn]) -> str:
        seen.append(turns[-1].steps)
        return f" Yes\nAction: {'north' if turns[-1].steps else 'south'}\nAction Input: {{}}"

    engine = FakeEngine()
    engine.answers["lora-gen"] = write
    task = Task("calls", "Two calls", METRICS, [sample], score_call)
    folder = RunFolder(None, header(task))
    run_variants(task, variants_from_names(["lora-gen"]), engine, folder, lambda record: None)
    assert folder.records[0]["scores"]["call"] == 1.0
    assert seen == [(), (TakenStep("south", "{}", "south done"),)]


def test_the_choice_alone_takes_no_step(tmp_path: Path) -> None:
    registry = ToolRegistry.from_tools([{"name": name, "description": f"{name}!"} for name in ("one", "two")])
    sample = BenchSample("1", "own", "call", registry, (Turn("?"),), "", calls=(GoldCall("one", {}),))
    task = Task("choice", "Choice", CHOICE_METRICS, [sample], score_choice, choice_only=True)
    folder = RunFolder(None, header(task))
    run_variants(task, variants_from_names(["lora-gen+match"]), FakeEngine(), folder, lambda record: None)
    assert folder.records[0]["scores"] == {"tool": 0.0, "best": 1.0, "called": 0.0}
    assert folder.records[0]["tools"] == {"one": 0.75, "two": 0.25}


def test_same_run_same_scores(task: Task, tmp_path: Path) -> None:
    one, two = (run(task, RunFolder(tmp_path / name, header(task)), ROWS) for name in "ab")
    assert one["variants"] == two["variants"]


def test_interrupted_run_keeps_its_records_and_goes_on(task: Task, tmp_path: Path) -> None:
    first = run(task, RunFolder(tmp_path, header(task)), ROWS, stop_after=13)
    assert not first["complete"] and len(read_records(tmp_path / "predictions.jsonl")) == 12
    with (tmp_path / "predictions.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"variant": "definitions", "id": "cut o')  # what a kill leaves behind
    folder = RunFolder(tmp_path, header(task), resume=True)
    assert len(folder.done) == 12
    second = run(task, folder, ROWS)
    whole = run(task, RunFolder(tmp_path / "whole", header(task)), ROWS)
    assert second["complete"]
    for row in whole["variants"]:
        assert second["variants"][row]["metrics"] == whole["variants"][row]["metrics"]
    assert len(read_records(tmp_path / "predictions.jsonl")) == 40


def test_folders_are_not_mixed_up(task: Task, tmp_path: Path) -> None:
    RunFolder(tmp_path, header(task)).close()
    with pytest.raises(DataError, match="--resume"):
        RunFolder(tmp_path, header(task))
    with pytest.raises(DataError, match="equal_tokens"):
        RunFolder(tmp_path, {**header(task), "equal_tokens": 21}, resume=True)
    with pytest.raises(DataError, match="no run to resume"):
        RunFolder(tmp_path / "other", header(task), resume=True)
    with pytest.raises(DataError, match="--out"):
        RunFolder(None, header(task), resume=True)


def test_damaged_records_name_their_row(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    path.write_text('{"variant": "a", "id": "1", "scores": {}, "cost": {}}\n{"variant": \n', encoding="utf-8")
    with pytest.raises(DataError, match="line 2"):
        read_records(path)
    with pytest.raises(DataError, match=r"results\.json"):
        read_results(tmp_path)


def test_report_and_tables(task: Task, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, header(task))
    results = run(task, folder, ROWS)
    written = write_report(tmp_path, results)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "GPT4Tools-mini" in text and "loragen-agents train x.yaml" in text and "81.0x" in text
    assert "100.0 [100.0, 100.0]" in text
    assert text == markdown(results, [path.name for path in written if path.suffix == ".png"])
    if plots.hint() is None:
        assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")
    with console.capture() as capture:
        console.print(render(results))
    assert "lora-gen" in capture.get() and "no weights yet" in capture.get()


def test_live_table_counts_as_it_goes(task: Task) -> None:
    folder = RunFolder(None, header(task))
    table = LiveTable(task.title, task.metrics, [variant.name for variant in ROWS], {}, [], total=2 * len(task.samples))
    with table:
        run_variants(task, ROWS, FakeEngine(task), folder, table)
    with console.capture() as capture:
        console.print(table._render())
    assert "40/40" in capture.get() and "100.0" in capture.get()


def test_compare_pairs_samples(task: Task, tmp_path: Path) -> None:
    run(task, RunFolder(tmp_path / "a", header(task)), ROWS)
    run(task, RunFolder(tmp_path / "b", header(task)), ROWS)
    same = compare(tmp_path / "a", tmp_path / "b")
    assert [comparison.variant_a for comparison in same] == ["definitions", "lora-gen"]
    assert all(difference.value == 0 and difference.p == 1 for c in same for difference in c.differences.values())
    (mixed,) = compare(tmp_path / "a", tmp_path / "a", variant_a="definitions", variant_b="lora-gen")
    assert mixed.differences["success"].low > 0 and mixed.samples == 20
    headings, cells = comparison_table([mixed], task.metrics)
    assert len(cells) == 6 and all(len(row) == len(headings) for row in cells)
    assert cells[0][0] == "definitions / lora-gen"


def test_compare_refuses_what_cant_be_paired(task: Task, tmp_path: Path) -> None:
    run(task, RunFolder(tmp_path / "a", header(task)), ROWS)
    other = mini_task(("seen",), limit=3)
    run(other, RunFolder(tmp_path / "b", header(other)), ROWS)
    with pytest.raises(DataError, match="share no sample"):
        compare(tmp_path / "a", tmp_path / "b")
    with pytest.raises(DataError, match="no variant 'bare'"):
        compare(tmp_path / "a", tmp_path / "a", variant_a="bare")
    run(task, RunFolder(tmp_path / "c", {**header(task), "task": {**header(task)["task"], "name": "calls"}}), ROWS)
    with pytest.raises(DataError, match="run of gpt4tools and"):
        compare(tmp_path / "a", tmp_path / "c")


def test_row_names() -> None:
    variant = variant_from_name("definitions+grammar+cached")
    assert variant.name == "definitions+cached+grammar" and variant.cached and variant.grammar and variant.definitions
    assert "prefix kept" in variant.title
    assert [variant.name for variant in variants_from_names(["bare", "bare", "lora-gen"])] == ["bare", "lora-gen"]
    for name, message in (("nonsense", "expected one of"), ("bare+fast", "no option"), ("lora-gen+cached", "prefix")):
        with pytest.raises(DataError, match=message):
            variant_from_name(name)
    with pytest.raises(DataError, match="No variants"):
        variants_from_names([])


def turn(prompt: int, first: float, seconds: float, tokens: int = 11) -> TurnCost:
    return TurnCost(prompt, 0, tokens, first, seconds)


def cost(first: float, setup: float | None) -> Any:
    return variant_cost(
        [turn(10, 9.0, 90.0), turn(10, first, first + 1.0)],
        [] if setup is None else [setup],
        model_bytes=0,
        kv_bytes=0,
        equal_tokens=11,
        reference_prompt_tokens=None,
    )


def test_break_even() -> None:
    plain = cost(1.0, None)
    assert plain.first_token_ms.median == 1000  # the first turn is left out
    assert break_even_turns(cost(0.5, 2.0), plain) == pytest.approx(4)
    assert break_even_turns(cost(0.5, 2.0), cost(1.0, 1.0)) == pytest.approx(2)
    assert break_even_turns(cost(1.5, 2.0), plain) == math.inf
    assert break_even_turns(cost(0.5, None), plain) == 0


def test_turns_of_one_token_have_no_rate() -> None:
    only = variant_cost(
        [turn(10, 0.1, 0.1, tokens=1)], [], model_bytes=1, kv_bytes=1, equal_tokens=9, reference_prompt_tokens=20
    )
    assert only is not None and only.tokens_per_second is None and only.equal_turn_ms is None
    assert only.compression == 2 and only.peak_bytes is None
    assert variant_cost([], [], model_bytes=1, kv_bytes=1, equal_tokens=9, reference_prompt_tokens=None) is None


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_kv_bytes_are_what_a_cache_holds(family: str) -> None:
    model = tiny_model(family)
    with torch.no_grad():
        cache = model(torch.arange(7)[None], use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert kv_cache_bytes(model.config, 7, torch.float32) == held


def test_model_bytes_count_shared_tensors_once() -> None:
    model = tiny_model("gemma")  # ties its embedding to its head
    assert model_bytes(model) < 1.1 * sum(p.nbytes for p in model.parameters())
    layer = torch.nn.Linear(100, 100, bias=False)
    assert model_bytes(torch.nn.ModuleList([layer, layer])) == 40_000


def test_peak_memory_sees_what_comes_and_goes() -> None:
    # Freed memory that stays with the allocator, because a piece behind it is still in use.
    pieces = [torch.ones(4_000) for _ in range(15_000)]
    last = torch.ones(4_000)
    del pieces
    meter = PeakMemory(torch.device("cpu"))
    with meter.measure():
        torch.ones(25_000_000).sum()
    if meter.bytes is None:
        pytest.skip("this system can't tell")
    assert 90_000_000 < meter.bytes < 150_000_000
    assert last.sum() == 4_000


def test_latency_series(tmp_path: Path) -> None:
    pool = tool_pool([mini_registry("seen"), mini_registry("unseen")], 40)
    assert len({tool.name for tool in pool}) == 40 and pool[29].name == f"{pool[0].name} 2"
    told: list[float] = []
    points = list(
        measure(
            FakeEngine(),
            ROWS,
            pool,
            counts=(1, 4),
            repeats=2,
            turn_tokens=21,
            progress=lambda _, part: told.append(part),
        )
    )
    assert [(point.variant, point.tools) for point in points] == [
        ("definitions", 1), ("lora-gen", 1), ("definitions", 4), ("lora-gen", 4)
    ]  # fmt: skip
    assert points[2].first_token_ms == pytest.approx(410) and points[2].turn_ms == pytest.approx(410 + 200)
    assert points[3].first_token_ms == pytest.approx(10) and points[3].setup_ms == pytest.approx(500)
    assert told == sorted(told)
    assert latency_table(points, 21)[1][0][:2] == ["definitions", "1"]
    assert len(draw(points, 21, tmp_path)) == (0 if plots.hint() else 2)
    with pytest.raises(DataError, match="50 tools were asked for"):
        next(measure(FakeEngine(), ROWS, pool, counts=(50,)))


def test_a_latency_run_that_was_stopped_goes_on(tmp_path: Path) -> None:
    pool = tool_pool([mini_registry("seen")], 4)

    def run_latency(engine: FakeEngine, resume: bool, repeats: int = 1) -> dict[str, Any]:
        return launch_latency(
            engine, ROWS, pool, counts=(1, 4), repeats=repeats, turn_tokens=21, out=tmp_path, resume=resume, command="x"
        )

    stopped = run_latency(FakeEngine(stop_after=6), False)
    assert not stopped["complete"]
    assert [(point["variant"], point["tools"]) for point in stopped["points"]] == [("definitions", 1), ("lora-gen", 1)]
    assert "| lora-gen | 1 |" in (tmp_path / "report.md").read_text()
    with pytest.raises(DataError, match="other settings \\(repeats\\)"):
        run_latency(FakeEngine(), True, repeats=3)
    engine = FakeEngine()
    whole = run_latency(engine, True)
    assert whole["complete"] and len(whole["points"]) == 4 and engine.opened == 2
    assert whole["points"][:2] == stopped["points"]
    assert json.loads((tmp_path / "results.json").read_text()) == whole
