"""Action Inputs and arguments: one line of text to typed values by a tool's schema, and back.

`bind_arguments` reads what a model wrote, `format_action_input` writes what it would have to write; each is the other's
exact inverse, and both refuse with an `ArgumentError` rather than guess. Two notations:

json: an object, written on one line with its keys in schema order.
csv: the values in schema order with ", " between them, as in GPT4Tools. Each value is a scalar, typed by its schema.
    Optional arguments can be left out from the end only. Extra commas belong to the last argument that is free text.
    There is no quoting, so csv can't hold an empty text, a line break or, elsewhere, a comma.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from loragen_agents.errors import ArgumentError
from loragen_agents.registry import json_schema
from loragen_agents.registry.csv_values import is_scalar, scalar_text
from loragen_agents.registry.tool import InputFormat, Tool

_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")


def bind_arguments(tool: Tool, action_input: str, input_format: InputFormat) -> dict[str, Any]:
    """Read an Action Input as the arguments of `tool`, with the types that its schema asks for.

    Arguments that the schema does not describe are refused unless it sets `additionalProperties`. Arguments that are
    left out get no defaults; the tool has its own.

    Args:
        tool: the tool that is called.
        action_input: what the model wrote behind `Action Input:`.
        input_format: the notation, "csv" or "json".

    Raises:
        ArgumentError: what does not fit, by tool and argument.
    """
    text = action_input.strip()
    arguments = _read_csv(tool, text) if input_format == "csv" else _read_json(tool, text)
    _validate(tool, arguments)
    for name, value in arguments.items():
        # JSON Schema counts 5.0 as an integer; a Python tool that asked for an int should get one.
        if isinstance(value, float) and value.is_integer() and "number" not in _kinds(tool, name):
            arguments[name] = int(value)
    return arguments


def format_action_input(tool: Tool, arguments: Mapping[str, Any], input_format: InputFormat) -> str:
    """Write `arguments` as the Action Input that `bind_arguments` reads back as the same values.

    Raises:
        ArgumentError: the arguments don't fit the schema, or the notation can't express them.
    """
    if input_format == "csv":
        text = _write_csv(tool, arguments)
    else:
        try:
            ordered = _in_schema_order(dict(arguments), tool.parameters, tool)
            text = json.dumps(ordered, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ArgumentError(f"tool {tool.name!r}: its arguments can't be written as JSON: {error}") from error
    if not _same(bind_arguments(tool, text, input_format), arguments):
        _fail(tool, None, f"{input_format} can't express these values: {_short(text)} would be read as others")
    return text


def _fail(tool: Tool, argument: str | None, message: str) -> NoReturn:
    where = f"tool {tool.name!r}" + (f", argument {argument!r}" if argument is not None else "")
    raise ArgumentError(f"{where}: {message}")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return repr(text if len(text) <= 80 else f"{text[:77]}...")


def _schema(tool: Tool, argument: str) -> Any:
    return tool.parameters["properties"][argument]


def _kinds(tool: Tool, argument: str) -> frozenset[str]:
    return tool.types_of(argument) if argument in tool.parameters["properties"] else json_schema.JSON_TYPES


def _validator(tool: Tool) -> Any:
    return json_schema.validator(tool.parameters)


def _validate(tool: Tool, arguments: dict[str, Any]) -> None:
    for name in tool.argument_names:
        if name in tool.required and name not in arguments:
            _fail(tool, name, "is required but missing")
    open_ended = (
        "patternProperties" in tool.parameters or tool.parameters.get("additionalProperties", False) is not False
    )
    known = frozenset(tool.argument_names)
    for name in arguments:
        if name not in known and not open_ended:
            _fail(tool, name, f"is unknown; the tool takes {', '.join(tool.argument_names) or 'none'}")
    try:
        error = next(_validator(tool).iter_errors(arguments), None)
    except TimeoutError as failure:
        _fail(tool, None, f"one of its values can't be checked: {failure}")
    except Exception as failure:  # a schema that is formally right but can't be applied
        raise ArgumentError(f"tool {tool.name!r}: its schema can't be applied: {failure}") from failure
    if error is not None:
        where = str(error.absolute_path[0]) if error.absolute_path else None
        _fail(tool, where, error.message if len(error.message) <= 200 else f"{error.message[:197]}...")


def _read_json(tool: Tool, text: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise ValueError(f"the key {name!r} stands in it twice")
            found[name] = value
        return found

    def finite(number: str) -> float:
        value = float(number)
        if not math.isfinite(value):
            raise ValueError(f"the number {number} is out of range")
        return value

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_float=finite, parse_constant=refuse)
        text.encode()
        json.dumps(value, ensure_ascii=False).encode()  # an escape such as \ud800 is half a character
    except (ValueError, RecursionError) as error:
        _fail(tool, None, f"expected a JSON object on one line, got {_short(text)}: {error}")
    if not isinstance(value, dict):
        _fail(tool, None, f"expected a JSON object, got {_short(text)}")
    return value


def _read_csv(tool: Tool, text: str) -> dict[str, Any]:
    if "\n" in text:
        _fail(tool, None, f"a csv input is one line, got {_short(text)}")
    names = tool.argument_names
    parts = text.split(",") if text else []
    extra = len(parts) - len(names)
    if extra > 0:
        free = [place for place, name in enumerate(names) if is_free_text(tool, name)]
        if not free:
            _fail(
                tool,
                None,
                f"takes {len(names)} values ({', '.join(names) or 'none'}), got {len(parts)}: {_short(text)}",
            )
        last = free[-1]
        parts[last : last + extra + 1] = [",".join(parts[last : last + extra + 1])]
    arguments = {}
    for name, part in zip(names, parts, strict=False):
        if not part.strip():
            _fail(tool, name, "its value is empty")
        arguments[name] = _read_scalar(tool, name, part.strip())
    return arguments


def is_free_text(tool: Tool, argument: str) -> bool:
    return "string" in _kinds(tool, argument) and json_schema.constants(_schema(tool, argument)) is None


def _read_scalar(tool: Tool, argument: str, text: str) -> Any:
    schema = _schema(tool, argument)
    values = json_schema.constants(schema)
    if values is not None:
        for value in values:
            if is_scalar(value) and scalar_text(value) == text:
                return value
        shown = ", ".join(scalar_text(value) for value in values if is_scalar(value))
        _fail(tool, argument, f"expected one of {shown}, got {_short(text)}")
    kinds = _kinds(tool, argument)
    # From the narrowest reading to the widest, so that "5" is a number wherever the schema admits one.
    readings: list[Any] = []
    if "null" in kinds and text == "null":
        readings.append(None)
    if "boolean" in kinds and text.lower() in ("true", "false"):
        readings.append(text.lower() == "true")
    if "integer" in kinds and _NUMBER.fullmatch(text):
        try:
            number = json.loads(text)
        except ValueError as error:  # Python reads integers of some thousand digits only when asked to
            _fail(tool, argument, str(error))
        whole = isinstance(number, int) or number.is_integer()  # neither holds for infinity
        if whole or ("number" in kinds and math.isfinite(number)):
            readings.append(number)
    if "string" in kinds:
        readings.append(text)
    if not readings:
        expected = " or ".join(sorted(kinds - {"array", "object"})) or "no value"
        _fail(tool, argument, f"expected {expected}, got {_short(text)}")
    if len(readings) == 1:
        return readings[0]
    validator = _validator(tool).evolve(schema=schema)
    return next((reading for reading in readings if validator.is_valid(reading)), readings[0])


def _write_csv(tool: Tool, arguments: Mapping[str, Any]) -> str:
    names = tool.argument_names
    for name in arguments:
        if name not in names:
            _fail(tool, str(name), f"is unknown; the tool takes {', '.join(names) or 'none'}")
    parts = []
    for name in names[: max((names.index(name) + 1 for name in arguments), default=0)]:
        if name not in arguments:
            _fail(tool, name, "csv can leave out arguments at the end only; give this one too, or use json inputs")
        value = arguments[name]
        if not is_scalar(value):
            _fail(tool, name, f"csv holds text, numbers, true, false and null, not {type(value).__name__}")
        parts.append(scalar_text(value))
    return ", ".join(parts)


def _in_schema_order(value: Any, schema: Any, tool: Tool) -> Any:
    """`value` with the keys of every object in the order of its schema's properties, others behind them."""
    if not isinstance(schema, Mapping):
        return value
    if isinstance(schema.get("$ref"), str):
        return _in_schema_order(value, json_schema.resolve(schema["$ref"], tool.parameters), tool)
    if isinstance(value, dict):
        for keyword in ("anyOf", "oneOf"):
            for option in schema.get(keyword, ()):
                if _validator(tool).evolve(schema=option).is_valid(value):
                    return _in_schema_order(value, option, tool)
        properties = schema.get("properties", {})
        names = [name for name in properties if name in value] + [name for name in value if name not in properties]
        return {name: _in_schema_order(value[name], properties.get(name), tool) for name in names}
    if isinstance(value, list | tuple):
        return [_in_schema_order(item, schema.get("items"), tool) for item in value]
    return value


def _same(one: Any, other: Any) -> bool:
    """Whether two values are the same JSON: a tuple is a list, and 1 is 1.0."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)
