"""GBNF of schemas of all kinds: llama.cpp must take it, and what it lets through must be what the schema says."""

import json
from pathlib import Path
from typing import Any

import pytest

from loragen_agents import ToolRegistry
from loragen_agents.conversation.gbnf import tool_gbnf
from loragen_agents.conversation.react import ToolStep, parse_step
from tests.llama_cpp import LlamaCpp
from tests.tiny_gguf import write_gguf
from tests.tiny_models import tiny_model, tiny_tokenizer

SCHEMAS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "optional": {"properties": {"a": {"type": "integer"}, "b": {"enum": ["x", 'y"z', 3]}, "c": {"type": "boolean"}}},
    "mixed": {"properties": {"a": {"type": "boolean"}, "b": {"const": None}, "c": {"type": "null"}}, "required": ["b"]},
    "list": {
        "properties": {"a": {"type": "array", "items": {"enum": [1, 2]}, "minItems": 1, "maxItems": 3}},
        "required": ["a"],
    },
    "empty list": {"properties": {"a": {"type": "array", "maxItems": 0}}, "required": ["a"]},
    "nested": {
        "properties": {"a": {"type": "object", "properties": {"b": {"const": 1}}, "required": ["b"]}},
        "required": ["a"],
    },
    "either": {
        "properties": {"a": {"anyOf": [{"const": "x"}, {"type": "object", "properties": {"k": {"const": 1}}}]}},
        "required": ["a"],
    },
    "short": {"properties": {"a": {"type": "string", "minLength": 2, "maxLength": 3}}, "required": ["a"]},
    "types": {"properties": {"a": {"type": ["boolean", "null"]}}, "required": ["a"]},
    "map": {"properties": {"a": {"type": "object", "additionalProperties": {"const": 1}}}, "required": ["a"]},
    "tree": {
        "properties": {"a": {"$ref": "#/$defs/Node"}},
        "required": ["a"],
        "$defs": {
            "Node": {
                "type": "object",
                "properties": {"n": {"const": 1}, "next": {"$ref": "#/$defs/Node"}},
                "required": ["n"],
            }
        },
    },
}


def registry(schema: dict[str, Any], **options: Any) -> ToolRegistry:
    return ToolRegistry.from_tools([{"name": "go", "description": "Go.", "parameters": schema}], **options)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Any:
    base: Path = tmp_path_factory.mktemp("tiny") / "base.gguf"
    write_gguf(base, tiny_model(), tiny_tokenizer())
    with LlamaCpp(base) as llama:
        yield llama


def calls(llama: LlamaCpp, held: ToolRegistry, number: int = 12) -> list[str]:
    """Calls that a random model makes when it is held to the grammar, sampled with several seeds."""
    grammar = tool_gbnf(held).replace("root ::= call | answer", "root ::= call")
    return [
        llama.complete("Go!", max_tokens=120, grammar=grammar, temperature=1.0, seed=seed) for seed in range(number)
    ]


@pytest.mark.parametrize("name", SCHEMAS)
def test_calls_fit_their_schema(llama, name):
    held = registry(SCHEMAS[name])
    assert "# not held" not in tool_gbnf(held)
    # A random model writes bytes that make no character; llama.cpp counts them in another way than Python.
    finished = [text for text in calls(llama, held) if text.endswith("\nObservation:") and "\ufffd" not in text]
    assert finished or name == "short"
    for text in finished:
        step = parse_step(text, held)
        assert isinstance(step, ToolStep), (text, step)


def test_optional_properties_come_in_every_combination(llama):
    held = registry({"properties": {"a": {"const": 1}, "b": {"const": 2}, "c": {"const": 3}}})
    seen = {tuple(parse_step(text, held).arguments) for text in calls(llama, held, 40)}  # type: ignore[union-attr]
    assert len(seen) >= 5
    assert all(list(names) == sorted(names) for names in seen)


def test_csv_inputs(llama):
    schema = {
        "properties": {"a": {"enum": ["red", "blue"]}, "b": {"type": "integer"}, "c": {"type": "boolean"}},
        "required": ["a", "b"],
    }
    held = registry(schema, input_format="csv")
    for text in calls(llama, held):
        if text.endswith("\nObservation:"):
            assert isinstance(parse_step(text, held), ToolStep), text
    assert "red" in tool_gbnf(held)


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"properties": {"a": {"type": "string", "pattern": "^x$"}}}, "# not held: tool go: pattern"),
        ({"properties": {"a": {"type": "integer", "minimum": 3}}}, "# not held: tool go: minimum"),
        ({"properties": {"a": {"type": "string", "maxLength": 5000}}}, "# not held: tool go: minLength and maxLength"),
    ],
)
def test_what_is_not_held_is_said(schema, said):
    assert tool_gbnf(registry(schema)).startswith(said)


def test_an_answer(llama):
    grammar = tool_gbnf(ToolRegistry([]))
    text = llama.complete("Go!", max_tokens=12, grammar=grammar)
    assert text.startswith(" No\nAI: ")


def test_names_are_quoted(llama):
    held = ToolRegistry.from_tools([{"name": 'say "hi" \\ ü', "description": "Say hi."}])
    (text,) = calls(llama, held, 1)
    step = parse_step(text, held)
    assert isinstance(step, ToolStep)
    assert json.dumps(step.arguments) == "{}"
