"""Schemas beyond the grammar: a wider one holds the model, the parser finds what is wrong with the finished call."""

from enum import Enum
from typing import Any

import pytest
from pydantic import BaseModel

from loragen_agents.conversation.react import InvalidStep, ToolStep, format_action_input, parse_step, tool_step_text
from loragen_agents.edge.grammar import ToolGrammar
from loragen_agents.edge.held_schemas import held_parameters
from loragen_agents.errors import GrammarError
from loragen_agents.registry import InputFormat, Tool, ToolRegistry
from tests.tiny_models import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXT: dict[str, Any] = {"type": "string"}
WHOLE = {"type": "integer"}


def registry_of(schema: Any, input_format: InputFormat = "json") -> ToolRegistry:
    parameters = {"type": "object", "properties": {"x": schema}, "required": ["x"]}
    return ToolRegistry([Tool(name="t", description="A tool.", parameters=parameters)], input_format=input_format)


def accepts(registry: ToolRegistry, text: str) -> bool:
    matcher = ToolGrammar(registry, TOKENIZER).matcher()
    try:
        matcher.accept(TOKENIZER.encode(text, add_special_tokens=False))
    except GrammarError:
        return False
    return matcher.finished


@pytest.mark.parametrize(
    ("schema", "right", "caught", "refused"),
    [
        # The parser finds what the grammar lets through; what the grammar can hold, it still refuses.
        ({"type": "array", "items": TEXT, "uniqueItems": True}, '["a", "b"]', '["a", "a"]', "[1]"),
        ({"type": "object", "propertyNames": {"pattern": "^a"}}, '{"a": 1}', '{"b": 1}', "1"),
        ({"type": "object", "minProperties": 2, "additionalProperties": WHOLE}, '{"a": 1, "b": 2}', None, '{"a": "b"}'),
        ({"type": "string", "not": {"const": "x"}}, '"y"', '"x"', "1"),
        ({"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}, "5", "9223372036854775808", '"5"'),
        ({"type": "number", "minimum": 0, "maximum": 1.7976931348623157e308}, "0.5", None, "-1"),
        ({"type": "string", "pattern": "^(?=.*a).*b$"}, '"ab"', '"b"', "1"),
        ({"type": "string", "pattern": r"^(a|b)\1$"}, '"aa"', '"ab"', "1"),
        ({"type": "object", "patternProperties": {"^(?!x)": WHOLE}}, '{"a": 1}', '{"a": "b"}', "1"),
        ({"oneOf": [TEXT, {"type": "string", "maxLength": 2}]}, '"long"', '"s"', "1"),
        ({"type": "array", "contains": {"const": 1}}, "[1, 2]", "[2]", "1"),
        (
            {
                "type": "object",
                "properties": {"a": TEXT, "b": TEXT},
                "if": {"properties": {"a": {"const": "x"}}},
                "then": {"required": ["b"]},
            },
            '{"a": "y"}',
            '{"a": "x"}',
            '{"a": 1}',
        ),
        (
            {"type": "object", "properties": {"a": TEXT, "b": TEXT}, "dependentRequired": {"a": ["b"]}},
            '{"a": "x", "b": "y"}',
            '{"a": "x"}',
            "1",
        ),
        ({"type": "string", "format": "int64"}, '"x"', None, "1"),
    ],
)  # fmt: skip
def test_wider_in_the_grammar_and_checked_behind(schema: Any, right: str, caught: str | None, refused: str) -> None:
    registry = registry_of(schema)

    def call(value: str) -> str:
        return tool_step_text("t", f'{{"x": {value}}}')

    assert accepts(registry, call(right))
    assert isinstance(parse_step(call(right), registry), ToolStep)
    assert not accepts(registry, call(refused))
    if caught is not None:
        assert accepts(registry, call(caught))
        step = parse_step(call(caught), registry)
        assert isinstance(step, InvalidStep) and "argument 'x'" in step.error


@pytest.mark.parametrize(
    ("schema", "right", "caught"),
    [
        ({"type": "string", "pattern": "^a"}, "abc", "b"),
        ({"allOf": [TEXT, {"minLength": 2}]}, "ab", "a"),
        ({"type": "string", "not": {"const": "x"}}, "y", "x"),
        ({"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}, "5", "9223372036854775808"),
        ({"type": "string", "minLength": 5000}, "a" * 5000, "a" * 4000),
        ({"enum": [f"value {number}" for number in range(2000)]}, "value 1999", None),
    ],
)
def test_in_csv_too(schema: Any, right: str, caught: str | None) -> None:
    registry = registry_of(schema, "csv")
    assert accepts(registry, tool_step_text("t", right))
    assert isinstance(parse_step(tool_step_text("t", right), registry), ToolStep)
    if caught is not None:
        assert accepts(registry, tool_step_text("t", caught))
        assert isinstance(parse_step(tool_step_text("t", caught), registry), InvalidStep)


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Paint(BaseModel):
    """Paint something."""

    names: set[str]
    amounts: dict[Colour, int]


def test_sets_and_dicts_by_enum_as_pydantic_and_mcp_servers_write_them() -> None:
    registry = ToolRegistry.from_tools([Paint])
    arguments = {"names": ["a", "b"], "amounts": {"red": 1, "blue": 2}}
    text = tool_step_text("Paint", format_action_input(registry["Paint"], arguments, "json"))
    assert accepts(registry, text)
    assert parse_step(text, registry).arguments == arguments  # type: ignore[union-attr]
    assert not accepts(registry, text.replace("blue", "pink"))


def test_an_argument_that_cannot_be_held_at_all_is_held_to_its_types(monkeypatch: pytest.MonkeyPatch) -> None:
    def complaint(rule: str) -> str:
        return "too odd" if "maxItems" in rule else ""

    monkeypatch.setattr("loragen_agents.edge.held_schemas._complaint", complaint)
    odd = {"type": ["array", "null"], "maxItems": 5}
    held = held_parameters({"type": "object", "properties": {"x": odd, "y": WHOLE}})
    assert held["properties"] == {"x": {"type": ["array", "null"]}, "y": WHOLE}


def test_what_the_grammar_knows_is_left_as_it_is() -> None:
    parameters = {
        "type": "object",
        "properties": {
            "a": {"type": "string", "pattern": "^[a-z]+$", "minLength": 2},
            "b": {"type": "integer", "minimum": 1, "maximum": 10},
            "c": {"type": "array", "items": {"type": "number", "multipleOf": 0.5}, "maxItems": 3},
        },
        "required": ["a"],
        "additionalProperties": False,
    }
    assert held_parameters(parameters) == parameters
