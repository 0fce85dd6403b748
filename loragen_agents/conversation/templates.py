"""Jinja templates for the text of prompts, and what they show of a tool.

Knows the folder of templates and tool definitions; nothing of tokens.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from loragen_agents.conversation.outside_text import one_line
from loragen_agents.errors import PromptError
from loragen_agents.registry import Tool, json_schema

_NAMES = ("definitions.jinja", "user_turn.jinja", "react.jinja")
_TYPE_WORDS = {"string": "text", "boolean": "true or false", "array": "list", "null": "nothing"}


class ShownArgument(NamedTuple):
    """An argument as templates show it; `note` has its type, whether it is optional, and its description."""

    name: str
    note: str


class ShownTool(NamedTuple):
    """A tool as templates show it, each part on one line."""

    name: str
    description: str
    arguments: list[ShownArgument]


class Templates:
    """The templates of one folder, all of which have to be there.

    Args:
        folder: has definitions.jinja, user_turn.jinja and react.jinja.

    Raises:
        PromptError: a template is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._environment = ImmutableSandboxedEnvironment(
            loader=jinja2.FileSystemLoader(folder),
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            autoescape=False,
        )
        for name in _NAMES:
            self._template(name)

    def render(self, name: str, **fields: Any) -> str:
        """The text of a template.

        Raises:
            PromptError: it can't be rendered, for instance because it asks for a field that is not given.
        """
        try:
            return self._template(name).render(**fields)
        except jinja2.TemplateError as error:
            raise PromptError(f"{self.folder / name} can't be rendered: {error}") from error

    def _template(self, name: str) -> jinja2.Template:
        try:
            return self._environment.get_template(name)
        except jinja2.TemplateNotFound as error:
            raise PromptError(f"{self.folder / name} is missing; put the template back") from error
        except jinja2.TemplateSyntaxError as error:
            where = f"{self.folder / (error.name or name)}, line {error.lineno}"
            raise PromptError(f"{where}: not a valid Jinja template: {error.message}") from error


def shown_tool(tool: Tool, csv: bool) -> ShownTool:
    """What the templates show of a tool, each part on one line."""
    arguments = []
    for name, schema in tool.parameters["properties"].items():
        description = schema.get("description", "") if isinstance(schema, dict) else ""
        label = _type_label(schema, name in tool.required)
        parts = [] if csv and label == "text" and description else [label]
        if name not in tool.required:
            parts.append("optional")
        note = ", ".join(parts)
        if description:
            note = f"{note}: {description}" if note else description
        arguments.append(ShownArgument(one_line(name), _folded(note).rstrip(".")))
    return ShownTool(tool.name, _folded(tool.description), arguments)


def _folded(text: str) -> str:
    return " ".join(text.split())


def _type_label(schema: Any, required: bool = True) -> str:
    """A few words for a schema: `text`, `one of "a", "b"`, `list of integer`, `object with "x" (number)`."""
    if not isinstance(schema, dict):
        return "anything"
    values = json_schema.constants(schema)
    if values is not None:
        shown = [json.dumps(value, ensure_ascii=False) for value in values if value is not None or required]
        return ("one of " if len(shown) > 1 else "") + ", ".join(shown)
    if isinstance(schema.get("$ref"), str):
        return str(schema["$ref"].rsplit("/", 1)[-1])
    for keyword in ("anyOf", "oneOf"):
        if isinstance(schema.get(keyword), list):
            options = [option for option in schema[keyword] if required or option != {"type": "null"}]
            return " or ".join(dict.fromkeys(_type_label(option) for option in options))
    named = schema.get("type", "anything")
    if isinstance(named, list):
        return " or ".join(_type_label({**schema, "type": kind}) for kind in named if required or kind != "null")
    if named == "array" and isinstance(schema.get("items"), dict) and schema["items"]:
        return f"list of {_type_label(schema['items'])}"
    if named == "object" and schema.get("properties"):
        inner = (f'"{name}" ({_type_label(value)})' for name, value in schema["properties"].items())
        return f"object with {', '.join(inner)}"
    return str(_TYPE_WORDS.get(named, named))
