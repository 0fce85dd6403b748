"""Specialising the embedded model with the generator that ships: what is kept comes back fast, and the same."""

import time

import pytest

from loragen_agents import ToolRegistry
from loragen_agents.conversation.prompts import Turn
from loragen_agents.conversation.react import ToolStep, parse_step
from loragen_agents.specialization.shared_models import shared_generator
from loragen_agents.specialization.specialize import forget_specializations, specialize
from loragen_agents.support.content import content_folder
from tests.decoded_steps import decoded


@pytest.fixture(scope="module")
def registry() -> ToolRegistry:
    """The 29 tools of GPT4Tools."""
    parts = [ToolRegistry.from_yaml(content_folder("tools") / f"gpt4tools_{part}.yaml") for part in ("seen", "unseen")]
    return ToolRegistry([tool for part in parts for tool in part], input_format="csv")


def test_a_kept_specialisation_loads_within_half_a_second(embedded_model, registry, tmp_path, monkeypatch):
    # The models are loaded already; what is kept goes to a folder of this test.
    generator = shared_generator("default", cloud=embedded_model, edge=embedded_model)
    monkeypatch.setenv("LORAGEN_AGENTS_CACHE", str(tmp_path))
    parts = {"edge": embedded_model, "cloud": embedded_model, "generator": generator}
    forget_specializations()
    made = specialize(registry, **parts)
    assert made.source == "generated"
    turns = [Turn("Please tell me what can be seen in images/a.png")]
    expected = decoded(made.model, turns).token_ids
    seconds = []
    for _ in range(3):
        forget_specializations()
        # CPU seconds of all threads: no less than the wall clock shows on a machine that does nothing else.
        started = time.process_time()
        loaded = specialize(registry, **parts)
        seconds.append(time.process_time() - started)
        assert loaded.source == "disk"
    assert min(seconds) < 0.5
    assert decoded(loaded.model, turns).token_ids == expected
    forget_specializations()


@pytest.mark.parametrize(
    ("request_", "tool", "arguments"),
    [
        ("Compute 17 * 23", "calculator", {"expression": "17 * 23"}),
        ("Convert 5 miles to kilometres", "convert_units", {"value": 5, "from_unit": "miles"}),
        ("Read the file shopping.txt", "read_file", {"path": "shopping.txt"}),
    ],
)
def test_the_generator_that_ships_calls_the_assistants_tools(embedded_model, request_, tool, arguments):
    """What the README and `make demo` show."""
    assistant = ToolRegistry.from_yaml(content_folder("tools") / "assistant.yaml")
    generator = shared_generator("default", cloud=embedded_model, edge=embedded_model)
    made = specialize(assistant, edge=embedded_model, cloud=embedded_model, generator=generator, cache=False)
    step = parse_step(decoded(made.model, [Turn(request_)]).text, assistant)
    assert isinstance(step, ToolStep) and step.action == tool
    assert arguments.items() <= step.arguments.items()
