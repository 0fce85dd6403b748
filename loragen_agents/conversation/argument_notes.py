"""What a model may read of a chosen tool before it writes the arguments: their names, types and meaning in one line.

`(city: the city's name; unit?: celsius|fahrenheit; days?: integer)`: a question mark marks what may be left out. The
line stands behind the tool's name, so that it costs tokens only where a tool is called, and for that tool alone.
"""

from typing import Any

from loragen_agents.registry import Tool, json_schema

MAX_CHARACTERS = 240
_WORDS = (8, 5, 3, 0)  # of each description; the first length with which the line fits
_MAX_VALUES = 60  # characters of an enum's values


def argument_notes(tool: Tool) -> str:
    """The line on a tool's arguments, with a space in front; empty for a tool without arguments."""
    if not tool.argument_names:
        return ""
    lines = (_line(tool, words) for words in _WORDS)
    fitting = next((line for line in lines if len(line) <= MAX_CHARACTERS), None)
    return f" ({fitting or _line(tool, 0)[:MAX_CHARACTERS]})"


def _line(tool: Tool, words: int) -> str:
    return "; ".join(_note(tool, name, words) for name in tool.argument_names)


def _note(tool: Tool, name: str, words: int) -> str:
    schema = tool.parameters["properties"][name]
    schema = schema if isinstance(schema, dict) else {}
    parts = [part for part in (_kind(schema), _shortened(schema.get("description"), words)) if part]
    head = name if name in tool.required else f"{name}?"
    return f"{head}: {', '.join(parts)}" if parts else head


def _kind(schema: dict[str, Any]) -> str:
    """The schema's values or its type; nothing for text, which most arguments are."""
    values = json_schema.constants(schema)
    if values is not None:
        shown = "|".join(str(value) for value in values if value is not None)
        return shown if len(shown) <= _MAX_VALUES else f"{shown[:_MAX_VALUES]}..."
    named = schema.get("type")
    return "" if named in (None, "string") else str(named if isinstance(named, str) else "|".join(named))


def _shortened(description: Any, words: int) -> str:
    return " ".join(str(description or "").split()[:words]).rstrip(".,;:")
