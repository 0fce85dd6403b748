"""References put in place, admitted types, canonical form."""

from typing import Any

import pytest

from loragen_agents.registry.json_schema import (
    SchemaError,
    admitted_types,
    canonical,
    check,
    constants,
    inline_references,
    resolve,
)

TREE = {
    "type": "object",
    "properties": {"root": {"$ref": "#/$defs/Node"}},
    "$defs": {
        "Node": {"type": "object", "properties": {"kids": {"type": "array", "items": {"$ref": "#/$defs/Node"}}}},
        "Unused": {"type": "string"},
    },
}


class TestInlineReferences:
    def test_chain_of_references(self):
        schema = {
            "properties": {"a": {"$ref": "#/$defs/A"}},
            "$defs": {"A": {"items": {"$ref": "#/$defs/B"}}, "B": {"type": "integer"}},
        }
        assert inline_references(schema) == {"properties": {"a": {"items": {"type": "integer"}}}}

    def test_what_stands_beside_a_reference_wins(self):
        schema = {
            "properties": {"a": {"$ref": "#/definitions/A", "description": "this one"}},
            "definitions": {"A": {"type": "string", "description": "any"}},
        }
        assert inline_references(schema)["properties"]["a"] == {"type": "string", "description": "this one"}

    def test_a_tree_keeps_its_inner_reference_and_the_definitions(self):
        result = inline_references(TREE)
        kids = result["properties"]["root"]["properties"]["kids"]
        assert kids == {"type": "array", "items": {"$ref": "#/$defs/Node"}}
        assert resolve("#/$defs/Node", result) == TREE["$defs"]["Node"]  # type: ignore[index]

    def test_a_tree_can_be_inlined_again(self):
        once = inline_references(TREE)
        assert inline_references(once)["properties"]["root"]["type"] == "object"

    def test_names_and_data_that_look_like_references_are_none(self):
        schema = {
            "properties": {"$ref": {"type": "string"}, "enum": {"type": "integer"}},
            "default": {"$ref": "#/nowhere"},
            "enum": [{"$ref": "#/nowhere"}],
        }
        assert inline_references(schema) == schema

    def test_escaped_pointer(self):
        schema = {"properties": {"a": {"$ref": "#/$defs/x~1y~0z"}}, "$defs": {"x/y~z": {"type": "null"}}}
        assert inline_references(schema)["properties"]["a"] == {"type": "null"}

    @pytest.mark.parametrize("reference", ["#/$defs/B", "https://example.org/a.json", "#anchor", "other.json#/a"])
    def test_references_that_cant_be_followed(self, reference: str):
        with pytest.raises(SchemaError, match="refers to"):
            inline_references({"properties": {"a": {"$ref": reference}}, "$defs": {"A": {}}})

    def test_a_schema_that_unfolds_without_end_is_refused(self):
        definitions: dict[str, Any] = {"d0": {"type": "string"}}
        for level in range(1, 40):
            twice = {"$ref": f"#/$defs/d{level - 1}"}
            definitions[f"d{level}"] = {"properties": {"a": twice, "b": twice}}
        with pytest.raises(SchemaError, match="unfolds"):
            inline_references({"properties": {"a": {"$ref": "#/$defs/d39"}}, "$defs": definitions})

    def test_the_original_is_not_touched_or_shared(self):
        schema = {"properties": {"a": {"enum": [["x"]]}}}
        inline_references(schema)["properties"]["a"]["enum"][0].append("y")
        assert schema == {"properties": {"a": {"enum": [["x"]]}}}


@pytest.mark.parametrize(
    ("schema", "types"),
    [
        ({"type": "string"}, {"string"}),
        ({"type": "number"}, {"number", "integer"}),
        ({"type": ["integer", "null"]}, {"integer", "null"}),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, {"integer", "null"}),
        ({"enum": ["a", 1, None, True]}, {"string", "integer", "number", "null", "boolean"}),
        ({"type": "string", "enum": ["a", 1]}, {"string"}),
        ({"const": 1.5}, {"number"}),
        ({"allOf": [{"type": ["string", "null"]}, {"type": ["string", "integer"]}]}, {"string"}),
        (True, {"null", "boolean", "integer", "number", "string", "array", "object"}),
        (False, set()),
        ({"$ref": "#/$defs/A"}, {"array"}),
        ({"$ref": "#/$defs/Loop"}, {"null", "boolean", "integer", "number", "string", "array", "object"}),
    ],
)
def test_admitted_types(schema: Any, types: set[str]):
    root = {"$defs": {"A": {"type": "array"}, "Loop": {"$ref": "#/$defs/Loop"}}}
    assert admitted_types(schema, root) == types


@pytest.mark.parametrize(
    ("schema", "values"),
    [
        ({"enum": ["a", 1]}, ["a", 1]),
        ({"const": None}, [None]),
        ({"anyOf": [{"enum": ["a"]}, {"type": "null"}]}, ["a", None]),
        ({"anyOf": [{"enum": ["a"]}, {"type": "string"}]}, None),
        ({"type": "string"}, None),
        (True, None),
    ],
    ids=repr,
)
def test_constants(schema: Any, values: list[Any] | None):
    assert constants(schema) == values


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"properties": {"a": {"type": "txt"}}}, "at properties/a/type, 'txt' is not"),
        ({"properties": {"a": {"items": {"description": 3}}}}, "at properties/a/items/description, 3 is not"),
        ({"properties": {"a": {"description": 3}}}, "at properties/a/description, 3 is not"),
        ({"properties": {"a": 3}}, "at properties/a, 3 is not"),
        ({"properties": {"a": {"pattern": "["}}}, r"at properties/a/pattern, '\[' is not a 'regex'"),
        ({"properties": []}, "'properties' must be an object"),
        ({"properties": {}, "required": "a"}, "at required, 'a' is not"),
        ({"properties": {}, "required": ["a", "a"]}, "at required, .* non-unique"),
        ({"properties": {}, "required": [3]}, "at required/0, 3 is not"),
        ({"properties": {}, "minProperties": -1}, "at minProperties, -1 is less"),
    ],
    ids=repr,
)
def test_check_says_where(schema: dict[str, Any], message: str):
    with pytest.raises(SchemaError, match=message):
        check(schema)


def test_check_goes_by_the_dialect_that_the_schema_names():
    schema = {"properties": {"a": {"items": [{"type": "string"}]}}}  # a tuple: prefixItems since 2020-12
    with pytest.raises(SchemaError, match="properties/a/items"):
        check(schema)
    check({**schema, "$schema": "http://json-schema.org/draft-07/schema#"})


def test_canonical_keeps_the_order_of_properties_alone():
    one = {"type": "object", "properties": {"b": {"type": "string", "title": "B"}, "a": {}}}
    other = {"properties": {"b": {"title": "B", "type": "string"}, "a": {}}, "type": "object"}
    third = {"type": "object", "properties": {"a": {}, "b": {"type": "string", "title": "B"}}}
    assert canonical(one) == canonical(other)
    assert canonical(one) != canonical(third)
