"""One tool as the model knows it: its name, what it does and the JSON Schema of its arguments.

Says what makes a tool usable. Knows nothing of sets of tools, files, models or how a tool is run.
"""

import copy
import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from loragen_agents.errors import RegistryError
from loragen_agents.registry import json_schema

InputFormat = Literal["csv", "json"]
# Parts of a schema, values of choices included. What stands in several places, as by YAML's aliases, counts each time.
_MAX_NODES = 100_000


class Tool(BaseModel):
    """One tool as the model knows it.

    Args:
        name: stands alone on a line after `Action: ` and in a comma-separated list, which rules out some characters.
        description: what the tool does and when to use it; may span lines, prompts fold it into one.
        parameters: JSON Schema of the arguments, always with `type: object` and `properties`, local references put in
            place. Treat it as read-only: fingerprints are taken once.

    Raises:
        RegistryError: a field that can't be used, named with the tool.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True)

    name: str
    description: str
    parameters: dict[str, Any] = {}

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "tool"
            message = str(first["ctx"]["error"]) if "error" in first.get("ctx", {}) else f"{where}: {first['msg']}"
            raise RegistryError(f"tool {fields.get('name')!r}: {message}") from error

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not name:
            raise ValueError("the name is empty; give the tool a name")
        if name != name.strip():
            raise ValueError("the name begins or ends with a space; remove it")
        for mark in ",:[]":
            if mark in name:
                raise ValueError(f"the name contains {mark!r}, which separates names in prompts; leave it out")
        if not name.isprintable():
            raise ValueError("the name contains a line break or another unprintable character; it must fit on one line")
        return name

    @field_validator("description")
    @classmethod
    def _check_description(cls, description: str) -> str:
        if not description.strip():
            raise ValueError("the description is empty; say what the tool does, the model learns it from there")
        try:
            _check_characters(description)
        except json_schema.SchemaError as error:
            raise ValueError(f"the description {error}") from error
        return description.strip()

    @field_validator("parameters")
    @classmethod
    def _check_parameters(cls, parameters: dict[str, Any]) -> dict[str, Any]:
        try:
            _check_plain_json(parameters)
            schema = json_schema.inline_references(parameters)
        except json_schema.SchemaError as error:
            raise ValueError(f"the schema of its parameters {error}") from error
        if schema.get("type", "object") != "object":
            raise ValueError(f"its parameters are of type {schema['type']!r}; expected a JSON Schema of type 'object'")
        schema = {"type": "object", "properties": {}, **schema}
        try:
            json_schema.check(schema)
        except json_schema.SchemaError as error:
            raise ValueError(f"the schema of its parameters {error}") from error
        for argument in json_schema.endless_arguments(schema):
            raise ValueError(
                f"the argument {argument!r} has no value that ends: what its schema requires asks for the same again; "
                "make the inner one optional"
            )
        for argument in schema.get("required", ()):
            if argument not in schema["properties"]:
                raise ValueError(f"the argument {argument!r} is required but not a property; describe it there")
        return schema

    @property
    def argument_names(self) -> tuple[str, ...]:
        """Names of the arguments, in the order of the schema's properties."""
        return tuple(self.parameters["properties"])

    @property
    def required(self) -> frozenset[str]:
        """Names of the arguments that every call must give."""
        return frozenset(self.parameters.get("required", ()))

    def types_of(self, argument: str) -> frozenset[str]:
        """JSON types that the argument's schema admits."""
        return json_schema.admitted_types(self.parameters["properties"][argument], self.parameters)

    def to_openai(self) -> dict[str, Any]:
        """The tool as OpenAI writes it: `{"type": "function", "function": {...}}`."""
        return {"type": "function", "function": copy.deepcopy(self.model_dump())}


def _check_plain_json(value: Any) -> None:
    """Raise SchemaError unless `value` is made of JSON's types alone, and of bounded size."""
    nodes = 0

    def check(value: Any, depth: int) -> None:
        nonlocal nodes
        nodes += 1
        if nodes > _MAX_NODES:
            raise json_schema.SchemaError(f"has more than {_MAX_NODES} parts; make it smaller")
        if depth > 100:
            raise json_schema.SchemaError("is nested deeper than 100 levels, or holds itself; make it flatter")
        if isinstance(value, Mapping):
            for key, inner in value.items():
                if not isinstance(key, str):
                    raise json_schema.SchemaError(
                        f"has the key {key!r} of type {type(key).__name__}; keys must be strings"
                    )
                _check_characters(key)
                check(inner, depth + 1)
        elif isinstance(value, list):
            for inner in value:
                check(inner, depth + 1)
        elif isinstance(value, float) and not math.isfinite(value):
            raise json_schema.SchemaError(f"holds {value}, which JSON does not have")
        elif isinstance(value, str):
            _check_characters(value)
        else:
            json_schema.types_of_value(value)

    check(value, 0)


def _check_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise json_schema.SchemaError(
            f"holds {text[error.start]!r}, half of a character (a lone surrogate); remove it"
        ) from error
