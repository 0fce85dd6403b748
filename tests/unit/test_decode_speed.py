"""The decoding benchmark, on a tiny model: every way is run and every ratio is one of the rounds' own."""

import json
from pathlib import Path

import pytest
import torch

from loragen_agents.bench import decode_speed
from loragen_agents.edge.decoding import Decoder
from loragen_agents.registry import Tool, ToolRegistry
from tests.tiny_models import save_tiny_model, tiny_model, tiny_tokenizer


def test_ratios_follow_the_speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = iter([(9.0, 9.0, 9.0, 9.0), (2.0, 3.0, 6.0, 4.5), (2.0, 4.0, 4.0, 4.0), (4.0, 6.0, 3.0, 2.4)] * 2)
    current: tuple[float, ...] = ()

    def generate(*arguments: object) -> float:
        nonlocal current
        current = next(speeds)
        return current[0]

    def decode(decoder: Decoder, prompt: list[int], tokens: int, grammar: object = None, forced: int = 0) -> float:
        if grammar is not None:
            assert forced > 0
            return current[3]
        return current[1 if decoder.model is model else 2]

    model = tiny_model()
    monkeypatch.setattr(decode_speed, "_generate", generate)
    monkeypatch.setattr(decode_speed, "_decode", decode)
    result = decode_speed.measure_speeds(model, model, tiny_tokenizer(), registry(), tokens=4, rounds=3)
    assert (result.generate, result.bare, result.merged, result.grammar) == (2.0, 4.0, 4.0, 4.0)
    assert result.bare_over_generate == 1.5
    assert result.merged_over_bare == 1.0
    assert result.merged_over_generate == 2.0
    assert result.grammar_cost == pytest.approx(0.2)
    assert result.tool_call > 0 and result.bandwidth_limit > 0


def test_the_command_prints_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny_model(tmp_path / "tiny")
    monkeypatch.setattr(
        "sys.argv",
        ["decode_speed", "--model", str(folder), "--tokens", "5", "--rounds", "1", "--threads", "1", "--json"],
    )
    threads = torch.get_num_threads()
    try:
        decode_speed.main()
    finally:
        torch.set_num_threads(threads)
    printed = json.loads(capsys.readouterr().out)
    assert printed["threads"] == 1
    assert all(value > 0 for key, value in printed.items() if key not in ("model", "dtype", "grammar_cost"))


def registry() -> ToolRegistry:
    parameters = {"properties": {"query": {"type": "string"}}}
    return ToolRegistry([Tool(name="search", description="Searches.", parameters=parameters)])
