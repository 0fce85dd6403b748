"""The benchmark of runtimes, on a tiny model."""

import json
from pathlib import Path

import pytest

from loragen_agents.bench import runtimes
from tests.tiny_models import save_tiny_model, tiny_model


def test_every_runtime_is_timed_at_every_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("openvino")
    folder = save_tiny_model(tmp_path / "tiny")
    arguments = ["runtimes", "--model", str(folder), "--lengths", "5", "9", "--rounds", "1"]
    monkeypatch.setattr("sys.argv", [*arguments, "--json"])
    runtimes.main()
    printed = json.loads(capsys.readouterr().out)
    for name in ("torch", "openvino"):
        assert all(printed[name][kind][length] > 0 for kind in ("prefill", "decode") for length in ("5", "9"))
    assert printed["missing"] == {}
    monkeypatch.setattr("sys.argv", arguments)
    runtimes.main()
    assert "OpenVINO" in capsys.readouterr().out


def test_medians_are_taken_over_the_rounds_that_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None)
    speeds = iter([(99.0, 99.0), (1.0, 30.0), (3.0, 10.0), (2.0, 20.0)])
    monkeypatch.setattr(runtimes, "_speeds", lambda *arguments: next(speeds))
    found, missing = runtimes.measure_runtimes(tiny_model(), lengths=(5,), rounds=3)
    assert found == {"torch": runtimes.RuntimeSpeed({5: 2.0}, {5: 20.0})}
    assert "pip install openvino" in missing["openvino"]
