"""What a registry or an argument may cost: bombs and endless schemas are refused at once, by name."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loragen_agents.errors import ArgumentError, RegistryError
from loragen_agents.registry import Tool, ToolRegistry
from loragen_agents.registry.arguments import bind_arguments

TEXT: dict[str, Any] = {"type": "string"}
HEAD = "tools:\n- name: t\n  description: d\n  parameters:\n    properties:\n"


@pytest.fixture(autouse=True)
def soon() -> Iterator[None]:
    """All of it takes milliseconds; what it guards against takes minutes."""
    started = time.process_time()
    yield
    assert time.process_time() - started < 8


def aliases(levels: int) -> str:
    lines = [f"        - &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join([f"{HEAD}      x:\n        enum:\n        - &a0 [1, 2, 3, 4, 5, 6, 7, 8, 9]", *lines])


def merges(levels: int) -> str:
    lines = [f"      a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}], z{n}: 1}}" for n in range(1, levels)]
    return "\n".join([f"{HEAD}      a0: &a0 {{k: 1, l: 1}}", *lines])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (aliases(10), "line 13: more than 300,000 values once its aliases are written out"),
        (merges(10), "line 11: more than 300,000 values"),
        (f"{HEAD}      x: &a\n        items: *a\n", "line 6: an anchor holds itself"),
        (f"tools: {'[' * 600}{']' * 600}", "line 1: .*nested deeper than 100 levels"),
        ("tools: " + "{a: " * 600, "line 1: .*nested deeper than 100 levels"),
        ("#" * 4_000_001, "larger than 4,000,000 bytes"),
    ],
    ids=["aliases", "merges", "circle", "lists", "mappings", "size"],
)
def test_yaml(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "tools.yaml"
    path.write_text(text)
    with pytest.raises(RegistryError, match=message) as caught:
        ToolRegistry.from_yaml(path)
    assert str(path) in str(caught.value)


def test_some_aliases_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "tools.yaml"
    path.write_text(aliases(3))
    assert len(ToolRegistry.from_yaml(path)["t"].parameters["properties"]["x"]["enum"]) == 3


def test_schemas_that_share_their_parts() -> None:
    schema: dict[str, Any] = dict(TEXT)
    for _ in range(30):
        schema = {"type": "object", "properties": {"a": schema, "b": schema}}
    with pytest.raises(RegistryError, match=r"tool 't'.*more than 100000 parts"):
        Tool(name="t", description="d", parameters={"properties": {"x": schema}})


def test_json_with_many_keys() -> None:
    tool = Tool(name="t", description="d", parameters={"additionalProperties": {"type": "integer"}})
    keys = ", ".join(f'"k{number}": {number}' for number in range(30_000))
    assert len(bind_arguments(tool, f"{{{keys}}}", "json")) == 30_000
    with pytest.raises(ArgumentError, match="the key 'k0' stands in it twice"):
        bind_arguments(tool, f'{{{keys}, "k0": 1}}', "json")


SLOW = "^(a|a)*$"


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": SLOW},
        {"type": "object", "patternProperties": {SLOW: {"type": "integer"}}},
        {"type": "object", "patternProperties": {SLOW: {"type": "integer"}}, "additionalProperties": False},
        {"type": "object", "propertyNames": {"pattern": SLOW}, "additionalProperties": True},
        {"$schema": "http://json-schema.org/draft-07/schema#", "type": "string", "pattern": SLOW},
    ],
)
def test_patterns_that_never_come_to_an_end(schema: dict[str, Any]) -> None:
    tool = Tool(name="t", description="d", parameters={"properties": {"x": schema}})
    bad = "a" * 40 + "b"
    text = f'{{"x": "{bad}"}}' if schema["type"] == "string" else f'{{"x": {{"{bad}": 1}}}}'
    with pytest.raises(ArgumentError, match=r"tool 't'.*the pattern.*takes too long"):
        bind_arguments(tool, text, "json")
    bind_arguments(tool, text.replace(bad, "aaa"), "json")


def test_a_pattern_that_only_python_takes_long_for() -> None:
    tool = Tool(name="t", description="d", parameters={"properties": {"x": {"type": "string", "pattern": "^(a+)+$"}}})
    with pytest.raises(ArgumentError, match="x"):
        bind_arguments(tool, f'{{"x": "{"a" * 40}b"}}', "json")


def test_patterns_are_searched_as_jsonschema_does() -> None:
    schema = {"patternProperties": {"^n": {"type": "integer"}}, "properties": {"b": TEXT}, "additionalProperties": TEXT}
    tool = Tool(name="t", description="d", parameters={"properties": {"x": schema, "y": {"pattern": "b+"}}})
    assert bind_arguments(tool, '{"x": {"no": 1, "b": "x", "other": "x"}, "y": "abbc"}', "json")
    for wrong in ('{"x": {"no": "x"}}', '{"x": {"other": 1}}', '{"y": "ac"}'):
        with pytest.raises(ArgumentError):
            bind_arguments(tool, wrong, "json")


NODE = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}, "required": ["next"]}


@pytest.mark.parametrize(
    ("schema", "definitions"),
    [
        ({"$ref": "#/$defs/node"}, {"node": NODE}),
        ({"$ref": "#/$defs/node"}, {"node": {"$ref": "#/$defs/node"}}),
        ({"type": "array", "items": {"$ref": "#/$defs/node"}, "minItems": 1}, {"node": NODE}),
        ({"anyOf": [{"$ref": "#/$defs/node"}, {"$ref": "#/$defs/node"}]}, {"node": {"allOf": [TEXT, NODE]}}),
        (
            {"$ref": "#/$defs/a"},
            {"a": {"type": "object", "properties": {"b": {"$ref": "#/$defs/b"}}, "required": ["b"]},
             "b": {"type": "array", "items": {"$ref": "#/$defs/a"}, "minItems": 2}},
        ),
    ],
)  # fmt: skip
def test_endless_recursion_is_refused(schema: dict[str, Any], definitions: dict[str, Any]) -> None:
    parameters = {"properties": {"fine": TEXT, "x": schema}, "$defs": definitions}
    with pytest.raises(RegistryError, match=r"tool 't': the argument 'x' has no value that ends"):
        Tool(name="t", description="d", parameters=parameters)


@pytest.mark.parametrize(
    "node",
    [
        {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}},
        {"anyOf": [NODE, {"type": "null"}]},
        {"type": ["object", "null"], "properties": {"next": {"$ref": "#/$defs/node"}}, "required": ["next"]},
        {"type": "array", "items": {"$ref": "#/$defs/node"}},
    ],
)
def test_recursion_that_can_end_is_fine(node: dict[str, Any]) -> None:
    Tool(name="t", description="d", parameters={"properties": {"x": {"$ref": "#/$defs/node"}}, "$defs": {"node": node}})


def test_half_characters() -> None:
    with pytest.raises(RegistryError, match=r"tool 't': the description holds '\\ud83d', half of a character"):
        Tool(name="t", description="a \ud83d b")
    for schema in ({"description": "\ud83d"}, {"enum": ["\ud83d"]}, {"properties": {"\ud83d": TEXT}}):
        with pytest.raises(RegistryError, match=r"tool 't': the schema of its parameters holds '\\ud83d'"):
            Tool(name="t", description="d", parameters={"properties": {"x": schema}})


def test_choices_that_csv_cannot_hold() -> None:
    tool = Tool(name="t", description="d", parameters={"properties": {"x": {"enum": ["a, b", "", " c"]}}})
    ToolRegistry([tool])
    with pytest.raises(RegistryError, match=r"tool 't': csv can hold none of the values of the argument 'x'"):
        ToolRegistry([tool], input_format="csv")
