"""What kind of value each argument of a call has, and where it stands in the Action Input.

Training and evaluation report by kind what is learnt: copying from the request, converting, choosing. Knows tools
and text; no tokens and no models.
"""

import json
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from loragen_agents.registry import Tool, json_schema

ValueKind = Literal["copied", "converted", "boolean", "enum", "number", "list"]


class ValueSpan(NamedTuple):
    """A value in an Action Input: its kind, and the characters that it takes, quotes included."""

    kind: ValueKind
    start: int
    end: int


def value_kind(schema: Any, value: Any, said: str) -> ValueKind:
    """The kind of a value.

    Args:
        schema: the argument's schema.
        said: all that the conversation holds; a text that stands in it as it is was copied, case aside.
    """
    if isinstance(value, bool):
        return "boolean"
    if isinstance(schema, Mapping) and json_schema.constants(dict(schema)) is not None:
        return "enum"
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, list | tuple | dict):
        return "list"
    return "copied" if str(value).casefold() in said.casefold() else "converted"


def value_spans(tool: Tool, arguments: Mapping[str, Any], action_input: str, said: str) -> list[ValueSpan]:
    """The values of a json input in order; empty where the text is no plain object of these arguments, as in csv."""
    spans: list[ValueSpan] = []
    text = "{"
    for name in tool.argument_names:
        if name not in arguments:
            continue
        text += f"{', ' if spans else ''}{json.dumps(name, ensure_ascii=False)}: "
        value = json.dumps(arguments[name], ensure_ascii=False)
        kind = value_kind(tool.parameters["properties"][name], arguments[name], said)
        spans.append(ValueSpan(kind, len(text), len(text) + len(value)))
        text += value
    return spans if text + "}" == action_input else []
