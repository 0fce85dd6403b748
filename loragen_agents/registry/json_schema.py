"""What the package asks of a JSON Schema beyond validating against it.

Tool arguments arrive as schemas of many makes. The functions here bring one into a form that the prompt, the grammar
and the parser can each walk without a resolver: local references put in place, a canonical form to hash, and the set
of JSON types that a schema admits. Knows nothing of tools; a caller turns `SchemaError` into an error that names one.
"""

import copy
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

JSON_TYPES = frozenset({"null", "boolean", "integer", "number", "string", "array", "object"})

# Keywords whose value maps a name that the author chose to a schema; there a key such as "enum" is no keyword.
_SCHEMA_MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
# Keywords whose value is plain data, in which something that looks like a reference is none.
_DATA = frozenset({"enum", "const", "default", "examples", "example", "required", "dependentRequired"})
# References nested into each other can make a small schema unfold without end; no honest tool comes near this.
MAX_NODES = 20_000


class SchemaError(ValueError):
    """A schema can't be used; the message says where and why."""


def check(schema: Mapping[str, Any]) -> None:
    """Check the JSON Schema of an object (draft 2020-12 unless it names another in `$schema`), patterns included.

    Raises:
        SchemaError: it is not valid; where, and what was expected.
    """
    dialect = schema.get("$schema")
    properties = schema.get("properties")
    if not isinstance(properties, Mapping):
        raise SchemaError(f"is not a valid JSON Schema: 'properties' must be an object, not {properties!r}")
    parts = [("", {**schema, "properties": {}}), *((f"properties/{name}", value) for name, value in properties.items())]
    for place, part in parts:
        # Checking costs more than all else that reading a tool does, but without names and words for people the same
        # few schemas come up over and over.
        if isinstance(part, Mapping):
            part = {key: value for key, value in part.items() if not _is_sound(key, value)}
        flaw = _flaw(json.dumps(part), dialect if isinstance(dialect, str) else None)
        if flaw is not None:
            where = "/".join(filter(None, (place, flaw[0]))) or "its top"
            raise SchemaError(f"is not a valid JSON Schema: at {where}, {flaw[1]}")


def _is_sound(keyword: str, value: Any) -> bool:
    """Whether a keyword that says nothing about types is as every dialect wants it."""
    if keyword in ("description", "title"):
        return isinstance(value, str)
    if keyword == "required":
        return isinstance(value, list) and all(isinstance(name, str) for name in value) and len({*value}) == len(value)
    return False


@lru_cache(maxsize=4096)
def _flaw(schema_text: str, dialect: str | None) -> tuple[str, str] | None:
    """Where in the schema its first flaw is, and which; None if it is valid."""
    # Half a second of imports, which the command line's --help must not pay for.
    from jsonschema import exceptions, validators

    default = validators.Draft202012Validator
    validator = validators.validator_for({"$schema": dialect}, default=default) if dialect else default
    meta = validator(validator.META_SCHEMA, format_checker=validator.FORMAT_CHECKER)
    error = exceptions.best_match(meta.iter_errors(json.loads(schema_text)))
    return None if error is None else ("/".join(str(part) for part in error.absolute_path), error.message)


def resolve(reference: str, root: Mapping[str, Any]) -> Any:
    """Follow a local reference (`#`, `#/$defs/Name`, any JSON pointer) inside `root`.

    Raises:
        SchemaError: the reference points outside the schema or at nothing.
    """
    if not reference.startswith("#") or (len(reference) > 1 and reference[1] != "/"):
        raise SchemaError(f"refers to {reference!r}; only references within it, such as '#/$defs/Name', are read")
    node: Any = root
    for part in reference[2:].split("/") if len(reference) > 1 else ():
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(node, Mapping) and key in node:
            node = node[key]
        elif isinstance(node, list) and key.isdecimal() and int(key) < len(node):
            node = node[int(key)]
        else:
            raise SchemaError(f"refers to {reference!r}, which is not in the schema")
    return node


def inline_references(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of `schema` with every local reference replaced by what it points at.

    A reference inside its own target (a tree of nodes, say) can't be unfolded: the inner one stays, and with it the
    definitions. So the top of every property is always a plain schema.

    Raises:
        SchemaError: a reference that leads nowhere, or a schema that unfolds past `MAX_NODES` nodes.
    """
    nodes = 0
    kept = False

    def walk(node: Any, trail: tuple[str, ...]) -> Any:
        nonlocal nodes, kept
        nodes += 1
        if nodes > MAX_NODES:
            raise SchemaError(f"unfolds to more than {MAX_NODES} nodes; simplify its references")
        if isinstance(node, list):
            return [walk(item, trail) for item in node]
        if not isinstance(node, Mapping):
            return copy.deepcopy(node)
        reference = node.get("$ref")
        if isinstance(reference, str):
            siblings = {key: value for key, value in node.items() if key != "$ref"}
            if reference in trail:
                kept = True
                return {"$ref": reference, **walk(siblings, trail)}
            target = walk(resolve(reference, schema), (*trail, reference))
            if not isinstance(target, dict):  # true and false are schemas too
                return target
            # What stands beside the reference (a description of this very argument) is nearer than its target.
            return {**target, **walk(siblings, trail)}
        result: dict[str, Any] = {}
        for key, value in node.items():
            if key in _SCHEMA_MAPS and isinstance(value, Mapping):
                result[key] = {name: walk(inner, trail) for name, inner in value.items()}
            elif key in _DATA:
                result[key] = copy.deepcopy(value)
            else:
                result[key] = walk(value, trail)
        return result

    definitions = {key: value for key, value in schema.items() if key in ("$defs", "definitions")}
    body = walk({key: value for key, value in schema.items() if key not in definitions}, ())
    return {**body, **copy.deepcopy(definitions)} if kept else body


def canonical(node: Any) -> Any:
    """Return `node` with the order of its keys made irrelevant, except under `properties`.

    The order of a tool's arguments is part of what it is (csv inputs go by it); that of schema keywords is not.
    """
    if isinstance(node, list):
        return [canonical(item) for item in node]
    if not isinstance(node, Mapping):
        return node
    result: dict[str, Any] = {}
    for key in sorted(node):
        value = node[key]
        if key == "properties" and isinstance(value, Mapping):
            result[key] = [[name, canonical(inner)] for name, inner in value.items()]
        else:
            result[key] = canonical(value)
    return result


def admitted_types(schema: Any, root: Mapping[str, Any]) -> frozenset[str]:
    """Return the JSON types that a value of `schema` may have, as far as its keywords tell.

    "number" is listed with "integer", as every integer is a number.
    """
    return _admitted(schema, root, frozenset())


def _admitted(schema: Any, root: Mapping[str, Any], seen: frozenset[str]) -> frozenset[str]:
    if schema is True:
        return JSON_TYPES
    if not isinstance(schema, Mapping):
        return frozenset()
    types = JSON_TYPES
    if isinstance(schema.get("$ref"), str):
        reference = schema["$ref"]
        if reference in seen:  # a reference that comes back to itself adds nothing
            return JSON_TYPES
        types &= _admitted(resolve(reference, root), root, seen | {reference})
    if "type" in schema:
        named = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        types &= frozenset(named) | ({"integer"} if "number" in named else frozenset())
    if "enum" in schema:
        types &= frozenset().union(*(types_of_value(value) for value in schema["enum"]))
    if "const" in schema:
        types &= types_of_value(schema["const"])
    for keyword in ("anyOf", "oneOf"):
        if isinstance(schema.get(keyword), list):
            types &= frozenset().union(*(_admitted(option, root, seen) for option in schema[keyword]))
    for option in schema.get("allOf", ()):
        types &= _admitted(option, root, seen)
    return types


def types_of_value(value: Any) -> frozenset[str]:
    """Return the JSON types that `value` counts as; an integer is a number too.

    Raises:
        SchemaError: a value that JSON has no type for.
    """
    if value is None:
        return frozenset({"null"})
    if isinstance(value, bool):
        return frozenset({"boolean"})
    if isinstance(value, int):
        return frozenset({"integer", "number"})
    if isinstance(value, float):
        return frozenset({"number"})
    if isinstance(value, str):
        return frozenset({"string"})
    if isinstance(value, list | tuple):
        return frozenset({"array"})
    if isinstance(value, Mapping):
        return frozenset({"object"})
    raise SchemaError(f"holds a value of type {type(value).__name__}, which JSON does not have")


def constants(schema: Any) -> list[Any] | None:
    """Return the values of an `enum` or `const` (through the branches of `anyOf` and `oneOf`), None if it is open.

    Works on a schema that `inline_references` has been over.
    """
    if not isinstance(schema, Mapping):
        return None
    if "const" in schema:
        return [schema["const"]]
    if isinstance(schema.get("enum"), list):
        return list(schema["enum"])
    for keyword in ("anyOf", "oneOf"):
        if isinstance(schema.get(keyword), list):
            values: list[Any] = []
            for option in schema[keyword]:
                inner = [None] if isinstance(option, Mapping) and option.get("type") == "null" else constants(option)
                if inner is None:
                    return None
                values += inner
            return values
    return None
