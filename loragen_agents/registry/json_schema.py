"""What the package asks of a JSON Schema beyond validating against it.

Schemas come from LangChain, pydantic, MCP servers and people. The functions here put local references in place, so that
prompt, grammar and parser need no resolver; bring a schema into a canonical form to hash; and tell which JSON types it
admits. Knows nothing of tools; a caller turns `SchemaError` into an error that names one.
"""

import copy
import json
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from typing import Any

JSON_TYPES = frozenset({"null", "boolean", "integer", "number", "string", "array", "object"})

# Keywords whose value maps a name that the author chose to a schema; there a key such as "enum" is no keyword.
_SCHEMA_MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
# Keywords whose value is plain data, in which something that looks like a reference is none.
_DATA = frozenset({"enum", "const", "default", "examples", "example", "required", "dependentRequired"})
# References nested into each other can make a small schema unfold without end; no honest tool comes near this.
MAX_NODES = 20_000
# Longest search for a pattern in one text. Patterns such as `^(a+)+$` take time that doubles with each character.
PATTERN_SECONDS = 0.2


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
        # Checking is the slowest part of reading a tool. Without descriptions, the same few schemas come up over and
        # over, so results are cached.
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


def endless_arguments(schema: Mapping[str, Any]) -> list[str]:
    """The properties of an object's schema that no finite value fits: each requires another value of its own kind.

    Works on a schema that `inline_references` has been over.
    """
    references = {node["$ref"] for node in _nodes(schema) if isinstance(node.get("$ref"), str)}
    finite: set[str] = set()
    # A reference is finite if it is so with the references found before; repeat until none is added.
    while more := {one for one in references - finite if _is_finite(resolve(one, schema), finite)}:
        finite |= more
    return [name for name, value in schema["properties"].items() if not _is_finite(value, finite)]


def _nodes(node: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(node, Mapping):
        yield node
    for inner in node.values() if isinstance(node, Mapping) else node if isinstance(node, list) else ():
        yield from _nodes(inner)


def _is_finite(schema: Any, finite: Collection[str]) -> bool:
    """Whether a value of finite size may fit, given that the references in `finite` have one."""
    if not isinstance(schema, Mapping) or "const" in schema or "enum" in schema:
        return True
    if isinstance(schema.get("$ref"), str) and schema["$ref"] not in finite:
        return False
    if not all(_is_finite(option, finite) for option in schema.get("allOf", ())):
        return False
    for keyword in ("anyOf", "oneOf"):
        if keyword in schema and not any(_is_finite(option, finite) for option in schema[keyword]):
            return False
    types = schema.get("type", "string")
    for kind in types if isinstance(types, list) else [types]:
        needed: list[Any] = []
        if kind == "object":
            properties = schema.get("properties", {})
            needed = [properties.get(name, True) for name in schema.get("required", ())]
        elif kind == "array" and schema.get("minItems", 0) > 0:
            first = list(schema.get("prefixItems", ()))[: schema["minItems"]]
            needed = [*first, schema.get("items", True)] if len(first) < schema["minItems"] else first
        if all(_is_finite(one, finite) for one in needed):
            return True
    return False


def validator(schema: Mapping[str, Any]) -> Any:
    """jsonschema's validator for values of `schema`, in which the search for a pattern is bounded in time.

    Its methods raise TimeoutError, which names the pattern, where a search takes longer than `PATTERN_SECONDS`.
    """
    dialect = schema.get("$schema")
    # A dialect that is named further down would bring jsonschema's own search back.
    plain = {key: _without_dialects(value) for key, value in schema.items()}
    return _validator_class(dialect if isinstance(dialect, str) else None)(plain)


def _without_dialects(node: Any) -> Any:
    if isinstance(node, list):
        return [_without_dialects(item) for item in node]
    if not isinstance(node, Mapping):
        return node
    result: dict[str, Any] = {}
    for key, value in node.items():
        if key in _SCHEMA_MAPS and isinstance(value, Mapping):
            result[key] = {name: _without_dialects(inner) for name, inner in value.items()}
        elif key in _DATA:
            result[key] = value
        elif key != "$schema":
            result[key] = _without_dialects(value)
    return result


@lru_cache(maxsize=16)
def _validator_class(dialect: str | None) -> Any:
    # Half a second of imports, which the command line's --help must not pay for.
    from jsonschema import validators
    from jsonschema.exceptions import ValidationError

    def pattern(validator: Any, wanted: str, instance: Any, schema: Any) -> Iterator[ValidationError]:
        if validator.is_type(instance, "string") and not _found(wanted, instance):
            yield ValidationError(f"{instance!r} does not match {wanted!r}")

    def pattern_properties(validator: Any, wanted: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
        for name, value in instance.items() if validator.is_type(instance, "object") else ():
            for one, inner in wanted.items():
                if _found(one, name):
                    yield from validator.descend(value, inner, path=name, schema_path=one)

    def additional_properties(validator: Any, wanted: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
        patterns = schema.get("patternProperties", {})
        for name, value in instance.items() if validator.is_type(instance, "object") else ():
            if name in schema.get("properties", {}) or any(_found(one, name) for one in patterns):
                continue
            if wanted is False:
                yield ValidationError(f"{name!r} is none of the object's properties")
            else:
                yield from validator.descend(value, wanted, path=name)

    default = validators.Draft202012Validator
    base = validators.validator_for({"$schema": dialect}, default=default) if dialect else default
    keywords = {
        "pattern": pattern,
        "patternProperties": pattern_properties,
        "additionalProperties": additional_properties,
    }
    return validators.extend(base, keywords)  # type: ignore[arg-type]


def _found(pattern: str, text: str) -> bool:
    import regex

    try:
        return regex.search(pattern, text, timeout=PATTERN_SECONDS) is not None
    except TimeoutError as error:
        shown = text if len(text) <= 40 else f"{text[:37]}..."
        raise TimeoutError(f"the search for the pattern {pattern!r} in {shown!r} takes too long") from error
