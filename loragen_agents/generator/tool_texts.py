"""A tool in words: texts that stand in the place of a user's request, so that requests can be compared with the tool.

Knows tools as words and schemas only. The texts are used by `tool_head`, `argument_head` and `tool_reading`.
"""

import re
from collections.abc import Mapping
from enum import IntEnum
from typing import Any

from loragen_agents.registry import Tool

# Descriptions may be long instructions. Text behind the first lines says little about when a tool is wanted, and every
# token takes time at specialisation.
_MAX_DESCRIPTION, _MAX_PURPOSE, _MAX_ARGUMENTS = 300, 160, 200
_MOST_ARGUMENTS, _MOST_VALUES, _MAX_NOTE = 10, 8, 60
# For the argument head, several arguments share a text, which is read at once.
_MAX_AIM, _ARGUMENTS_A_TEXT = 120, 8


class TextKind(IntEnum):
    """What a text says of a tool: its description, its name, or the description with its arguments."""

    DESCRIPTION = 0
    NAME = 1
    ARGUMENTS = 2


def in_words(name: str) -> str:
    """A name in any style as lower-case words: `getHTTPStatus_code` is "get http status code"."""
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]
    return " ".join(words) or name


def as_request(text: str, most: int = _MAX_DESCRIPTION) -> str:
    """A description in the place of a user's request: `Please find flights to a city.`"""
    return f"Please {_opened(text)[:most].rstrip('. ')}."


def request_texts(tool: Tool) -> dict[TextKind, str]:
    """The texts of a tool, by kind; a tool without arguments has no text of them."""
    texts = {
        TextKind.DESCRIPTION: as_request(tool.description),
        TextKind.NAME: as_request(in_words(tool.name)),
    }
    notes = [_note(name, schema) for name, schema in tool.parameters["properties"].items()][:_MOST_ARGUMENTS]
    if notes:
        listed = f"With {', '.join(notes)}."[:_MAX_ARGUMENTS]
        texts[TextKind.ARGUMENTS] = f"{as_request(tool.description, _MAX_PURPOSE)} {listed}"
    return texts


def argument_texts(tool: Tool) -> list[tuple[str, list[tuple[int, int]]]]:
    """What a tool's arguments are read by: texts, and the begin and end in them of each argument in order.

    Each text begins with what the tool does, since `name` means something else in each tool.
    """
    texts = []
    properties = list(tool.parameters["properties"].items())
    for first in range(0, len(properties), _ARGUMENTS_A_TEXT):
        text, places = f"{as_request(tool.description, _MAX_AIM)} With", []
        for number, (name, schema) in enumerate(properties[first : first + _ARGUMENTS_A_TEXT]):
            text += ", " if number else " "
            begin = len(text)
            text += _note(name, schema)
            places.append((begin, len(text)))
        texts.append((f"{text}.", places))
    return texts


def _note(name: str, schema: Any) -> str:
    """An argument in words: its name, and the values it can have or else its description."""
    words = in_words(name)
    if not isinstance(schema, Mapping):
        return words
    items = schema.get("items")
    values = schema.get("enum") or (items.get("enum") if isinstance(items, Mapping) else None)
    if values:
        return f"{words} ({', '.join(map(str, values[:_MOST_VALUES]))})"
    described = " ".join(str(schema.get("description") or "").split())[:_MAX_NOTE].rstrip(".")
    return f"{words} ({described})" if described else words


def _opened(text: str) -> str:
    text = " ".join(text.split())
    return text[0].lower() + text[1:] if text[:1].isupper() and not text[1:2].isupper() else text
