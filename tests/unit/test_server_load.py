"""The load on a server: it counts what it is there to count."""

import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest

from loragen_agents import LoRAGenChatModel
from loragen_agents.errors import DataError
from loragen_agents.server.load import Client, draw_registries, main, run_load
from tests.served import served
from tests.tiny_chat import tiny_generator, tiny_language_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> LoRAGenChatModel:
    edge = tiny_language_model(tmp_path_factory.mktemp("tiny") / "edge")
    return LoRAGenChatModel(model=edge, generator=tiny_generator(edge))


@pytest.fixture(scope="module")
def url(model) -> Iterator[str]:
    # Less room than connections: some requests are told to come again.
    with served(lambda: model, workers=2, waiting=1) as (url, _):
        yield url


def test_many_connections_get_what_they_get_alone(url, capsys):
    flags = ["--requests", "40", "--registries", "5", "--tools", "2", "--connections", "8", "--max-tokens", "4"]
    assert main([url, *flags]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["requests"], report["different"], report["lost"]) == (40, 0, 0)
    assert report["p95_ms"] >= report["p50_ms"] > 0
    assert report["memory_after_mib"] > 0


def test_different_answers_are_found(url, monkeypatch):
    given, count = LoRAGenChatModel.steps, itertools.count()

    def steps(model: Any, messages: Any, *arguments: Any, **kwargs: Any) -> Any:
        kwargs["tool_choice"] = "none" if next(count) % 3 else "any"
        return given(model, messages, *arguments, **kwargs)

    monkeypatch.setattr(LoRAGenChatModel, "steps", steps)
    report = run_load(Client(url, None, 24), draw_registries(2, 2), requests=24, connections=2)
    assert report.different > 0
    assert report.lost == 0


def test_lost_answers_are_counted(url, monkeypatch, capsys):
    given, count = LoRAGenChatModel.steps, itertools.count()

    def steps(*arguments: Any, **kwargs: Any) -> Any:
        if next(count) >= 12:
            raise KeyError("inside")
        return given(*arguments, **kwargs)

    monkeypatch.setattr(LoRAGenChatModel, "steps", steps)
    report = run_load(Client(url, None, 4), draw_registries(2, 2), requests=24, connections=2)
    assert report.lost == 24
    assert "answers 500" in capsys.readouterr().err


def test_registries_differ_and_stay_the_same():
    drawn = draw_registries(20, 6)
    names = [tuple(tool["function"]["name"] for tool in registry) for registry in drawn]
    assert len(set(names)) == 20
    assert drawn == draw_registries(20, 6)


def test_no_server():
    with pytest.raises(DataError, match="can't be asked"):
        Client("http://127.0.0.1:9", None, 4).ask("x", [])
