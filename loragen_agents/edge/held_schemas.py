"""A tool's JSON Schema in the form to which a grammar can hold a model.

llguidance knows most of JSON Schema, but not all. What it doesn't know is widened: the schema here admits everything
that the tool's own schema admits, and perhaps more. The parser then checks the finished call against the tool's own
schema, so a call that the wider one lets through becomes an invalid step with the reason, never a wrong call.

Knows llguidance's JSON Schema; nothing of steps, tokens and csv.
"""

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import llguidance

from loragen_agents.registry import json_schema

# Written the way `json.dumps(..., ensure_ascii=False)` writes: a model learns one spelling, and the parser's inverse is
# exact. Without \u escapes no half of a surrogate pair can be written.
# `lenient` passes over keywords and formats that llguidance doesn't know; `coerce_one_of` reads oneOf as anyOf.
_OPTIONS = {
    "item_separator": ", ",
    "key_separator": ": ",
    "whitespace_flexible": False,
    "json_allowed_escapes": '"\\bfnrt',
    "lenient": True,
    "coerce_one_of": True,
}
NUMBER_KEYWORDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
# Whole numbers past this are not exact as floats, which is what llguidance's bounds are.
_EXACT = 2**53
_UNSATISFIABLE = "Unsatisfiable"
_COMBINING = ("allOf", "anyOf", "oneOf", "not", "if", "then", "else", "$ref", "dependentSchemas")


def json_rule(schema: Mapping[str, Any]) -> str:
    """The Lark expression for a JSON value of `schema`."""
    return "%json " + json.dumps({**schema, "x-guidance": _OPTIONS})


def held_parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """A schema that llguidance takes and that admits every call of a tool with these `parameters`.

    Objects that list properties are held to these, unless they set `additionalProperties`. An argument whose schema
    can't be held at all is held to its JSON types.

    Args:
        parameters: the tool's JSON Schema, as in `Tool.parameters`.

    Raises:
        SchemaError: no value is right for an argument that every call must give, or llguidance can't take the schema
            for a reason that lies in no single argument.
    """
    held: dict[str, Any] = _held(parameters)
    if not _complaint(json_rule(held)):
        return held
    definitions: dict[str, Any] = {key: held[key] for key in ("$defs", "definitions") if key in held}
    for name, schema in held["properties"].items():
        if not isinstance(schema, dict):
            continue
        complaint = _complaint(json_rule({**schema, **definitions}))
        if _UNSATISFIABLE in complaint and name in parameters.get("required", ()):
            raise json_schema.SchemaError(f"no value is right for the argument {name!r}: {complaint}")
        if complaint:
            types = json_schema.admitted_types(parameters["properties"][name], parameters)
            held["properties"][name] = {"type": sorted(types)}
    if complaint := _complaint(json_rule(held)):
        raise json_schema.SchemaError(complaint)
    return held


def held_numbers(schema: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """A schema of the type `kind` ("integer" or "number") with the bounds of `schema` that can be held."""
    bounds = {key: schema[key] for key in NUMBER_KEYWORDS if key in schema}
    near = {key: value for key, value in bounds.items() if abs(value) <= _EXACT}
    for kept in (bounds, near):
        complaint = _complaint(json_rule({"type": kind, **kept}))
        # A range without a number in it stays: that is the schema's own flaw.
        if not complaint or _UNSATISFIABLE in complaint:
            return {"type": kind, **kept}
    return {"type": kind}


def _held(schema: Any, *, combined: bool = False) -> Any:
    """`schema` without what llguidance can't take, its objects closed.

    Args:
        schema: any JSON Schema.
        combined: the schema is one of several that speak of the same object, none of which lists all its properties.
    """
    if not isinstance(schema, Mapping):
        return schema
    result: dict[str, Any] = {}
    for key, value in schema.items():
        if key in ("properties", "patternProperties", "$defs", "definitions") and isinstance(value, Mapping):
            result[key] = {name: _held(inner) for name, inner in value.items()}
        elif key in ("items", "additionalProperties"):
            result[key] = _held(value)
        elif key == "prefixItems":
            result[key] = [_held(inner) for inner in value]
        elif key in ("allOf", "anyOf", "oneOf"):
            shared = combined or key == "allOf" or "properties" in schema
            result[key] = [_held(inner, combined=shared) for inner in value]
        elif key != "pattern" or _is_regular(value):
            result[key] = value
    combined = combined or any(key in schema for key in _COMBINING)
    if not combined:
        _name_properties(result)
    _drop_irregular_names(result)
    _drop_far_bounds(result)
    if "properties" in result and "patternProperties" not in schema and not combined:
        result.setdefault("additionalProperties", False)
    return result


def _name_properties(schema: dict[str, Any]) -> None:
    """Write an object whose names come from a list (`dict[Enum, ...]` in Python) as one with these properties."""
    names = json_schema.constants(schema.get("propertyNames"))
    if names is None or "properties" in schema or "patternProperties" in schema:
        return
    value = schema.get("additionalProperties", True)
    schema["properties"] = {name: value for name in names if isinstance(name, str)}
    schema["additionalProperties"] = False
    del schema["propertyNames"]


def _drop_irregular_names(schema: dict[str, Any]) -> None:
    """Leave properties free whose names go by a pattern that is no regular expression."""
    patterns = schema.get("patternProperties")
    if isinstance(patterns, Mapping) and not all(map(_is_regular, patterns)):
        del schema["patternProperties"]
        schema.pop("additionalProperties", None)


def _drop_far_bounds(schema: dict[str, Any]) -> None:
    """Leave out the bounds of a number (those of an int64, say) for which llguidance finds no regular expression."""
    if not any(key in schema for key in NUMBER_KEYWORDS):
        return
    kept: Mapping[str, Any] = schema
    for kind in ("integer", "number"):
        if schema.get("type", kind) == kind or kind in schema.get("type", ()):
            kept = held_numbers(kept, kind)
    for key in NUMBER_KEYWORDS:
        if key not in kept:
            schema.pop(key, None)


def _is_regular(pattern: str) -> bool:
    """Whether llguidance can hold text to `pattern`: look-around and back-references are beyond it."""
    return not _complaint(json_rule({"type": "string", "pattern": pattern}))


@lru_cache(maxsize=4096)
def _complaint(rule: str) -> str:
    """What llguidance has against a rule, on one line; empty if nothing."""
    grammar = llguidance.LLMatcher.grammar_from_lark(f"%llguidance {{}}\nstart: {rule}")
    return brief(llguidance.LLMatcher.validate_grammar(grammar)).rpartition("JSON schema: ")[2]


def brief(message: str) -> str:
    """llguidance's message on one line, without its listing of the grammar and its inner state."""
    lines = [line.strip() for line in message.partition("<state>")[0].splitlines()]
    return " ".join(line for line in lines if line and not re.match(r"\d+ \||\^+$", line))
