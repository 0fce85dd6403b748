"""`loragen-agents serve`: what can't be served is said before it serves, and what can't be loaded ends it."""

from pathlib import Path

import pytest
import torch

from loragen_agents import cli
from loragen_agents.commands import serve
from loragen_agents.models.language_models import LanguageModel
from loragen_agents.specialization.specialize import bound_specializations, forget_specializations
from tests.tiny_chat import tiny_generator, tiny_language_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    edge = tiny_language_model(folder / "edge")
    tiny_generator(edge).save(folder / "generator")
    return folder


def test_a_model_that_is_not_there_ends_it(folder, capsys):
    models = ["--model", str(folder / "edge"), "--generator", str(folder / "generator")]
    try:
        assert cli.main(["serve", "--port", "0", "--device", "cpu", *models, "--cloud", str(folder / "missing")]) == 1
    finally:
        bound_specializations()
    said = capsys.readouterr()
    assert said.out.startswith("Serving edge at http://127.0.0.1:")
    assert said.err.startswith("Error: ") and "missing" in said.err and "Traceback" not in said.err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--host", "0.0.0.0"], "there is no API key"),
        (["--api-key", ""], "choose another one"),
        (["--workers", "0"], "--workers is 0; expected at least 1"),
        (["--port", "70000"], "there is no port 70000"),
    ],
)
def test_what_can_not_be_served(flags, said, capsys, monkeypatch):
    monkeypatch.delenv("LORAGEN_AGENTS_API_KEY", raising=False)
    assert cli.main(["serve", *flags]) == 1
    assert said in capsys.readouterr().err


def test_the_key_may_come_from_the_environment(monkeypatch, capsys):
    monkeypatch.setenv("LORAGEN_AGENTS_API_KEY", "two\nlines")
    assert cli.main(["serve"]) == 1
    assert "printable ASCII" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_serves_in_the_dtype_that_is_asked_for(folder, dtype):
    models = ["--model", str(folder / "edge"), "--generator", str(folder / "generator"), "--device", "cpu"]
    arguments = cli.build_parser().parse_args(["serve", *models, "--dtype", dtype])
    try:
        model = serve._load(arguments, arguments.model)
        assert isinstance(model.model, LanguageModel) and model.model.dtype == getattr(torch, dtype)
    finally:
        bound_specializations()
        forget_specializations()
