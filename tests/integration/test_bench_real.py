"""The benchmark on the embedded model: a few turns of every row that needs no training."""

import json
from pathlib import Path
from typing import Any

import pytest

from loragen_agents.bench.results import read_records
from loragen_agents.cli import main

pytestmark = pytest.mark.integration

ROWS = "definitions,definitions+cached,bare,bare+grammar,lora-gen,lora-gen+grammar"


def run(out: Path) -> dict[str, Any]:
    command = ["bench", "gpt4tools", "--registry", "all", "--limit", "2", "--max-tokens", "12", "--variants", ROWS]
    assert main([*command, "--json", "--out", str(out)]) == 0
    return dict(json.loads((out / "results.json").read_text(encoding="utf-8")))


def test_the_same_command_gives_the_same_scores_and_the_paper_s_compression(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = run(tmp_path / "one"), run(tmp_path / "two")
    assert {name: row["metrics"] for name, row in one["variants"].items()} == {
        name: row["metrics"] for name, row in two["variants"].items()
    }
    texts = [
        [
            (record["variant"], record["id"], record["generated"])
            for record in read_records(tmp_path / name / "predictions.jsonl")
        ]
        for name in ("one", "two")
    ]
    assert texts[0] == texts[1]
    rows = one["variants"]
    # 29 tools: the user turn alone is at most a tenth of the prompt with definitions.
    assert rows["bare"]["cost"]["compression"] >= 10
    for name in rows.keys() - {"definitions", "definitions+cached"}:
        assert rows[name]["cost"]["prompt_tokens"] == rows["bare"]["cost"]["prompt_tokens"]
    cached = rows["definitions+cached"]["cost"]
    assert cached["read_tokens"] < cached["prompt_tokens"] / 5
    assert cached["setup_ms"]["median"] > 0
    assert all(record["generated"].startswith((" Yes\nAction: ", " No\nAI:")) for record in grammar_records(tmp_path))


def grammar_records(folder: Path) -> list[dict[str, Any]]:
    return [r for r in read_records(folder / "one" / "predictions.jsonl") if r["variant"].endswith("+grammar")]
