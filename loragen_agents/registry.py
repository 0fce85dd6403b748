"""Tools and the ordered set of them that a small model is specialised on.

A `ToolRegistry` is a plain value: what the tools are called, what they do and which arguments they take, in which
order. It deliberately knows nothing of models, prompts or how a tool is run; importing it loads neither torch nor
LangChain, which is asked only when a LangChain tool or an MCP server is to be read.
"""

import copy
import hashlib
import inspect
import json
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from loragen_agents import json_schema
from loragen_agents.errors import RegistryError

InputFormat = Literal["csv", "json"]
_NOTES = ("title", "description", "$schema", "$id", "$comment", "examples")
_SCALARS = frozenset({"null", "boolean", "integer", "number", "string"})


class Tool(BaseModel):
    """One tool as the model knows it.

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

    def with_arguments(self, needed: Collection[str], left_out: Collection[str]) -> "Tool":
        """This tool with `needed` among the required arguments and without those of `left_out`.

        The tool itself where nothing changes, and where its schema says more of its arguments than one by one.
        """
        plain = self.parameters.keys() <= {"type", "properties", "required", "additionalProperties", *_NOTES}
        if not plain or not (set(needed) | set(left_out)) - self.required:
            return self
        properties = self.parameters["properties"]
        kept = {name: schema for name, schema in properties.items() if name not in left_out or name in self.required}
        required = [name for name in kept if name in self.required or name in needed]
        parameters = {**self.parameters, "properties": kept, "required": required}
        return Tool(name=self.name, description=self.description, parameters=parameters)

    def types_of(self, argument: str) -> frozenset[str]:
        """JSON types that the argument's schema admits."""
        return json_schema.admitted_types(self.parameters["properties"][argument], self.parameters)

    def to_openai(self) -> dict[str, Any]:
        """The tool as OpenAI writes it: `{"type": "function", "function": {...}}`."""
        return {"type": "function", "function": copy.deepcopy(self.model_dump())}


class ToolRegistry:
    """An ordered, immutable set of tools with unique names, and the form in which their inputs are written.

    tools: the tools, in the order in which prompts list them.
    input_format: "json" (an object on one line) or "csv" (values in schema order, as in GPT4Tools).

    An empty registry stands for a model that only answers.

    Raises:
        RegistryError: two tools of one name, or one whose arguments csv can't write.
    """

    def __init__(self, tools: Iterable[Tool], *, input_format: InputFormat = "json") -> None:
        if input_format not in get_args(InputFormat):
            raise RegistryError(f"unknown input format {input_format!r}: expected 'csv' or 'json'")
        self._tools = tuple(tools)
        self._input_format: InputFormat = input_format
        self._by_name: dict[str, Tool] = {}
        for tool in self._tools:
            if not isinstance(tool, Tool):
                raise RegistryError(
                    f"{tool!r} is a {type(tool).__name__}, not a Tool; use ToolRegistry.from_tools for LangChain "
                    "tools, functions, pydantic classes and OpenAI dicts"
                )
            if tool.name in self._by_name:
                raise RegistryError(f"tool {tool.name!r}: the registry has two tools of this name; rename one")
            if input_format == "csv":
                _check_csv(tool)
            self._by_name[tool.name] = tool

    @property
    def tools(self) -> tuple[Tool, ...]:
        return self._tools

    @property
    def input_format(self) -> InputFormat:
        return self._input_format

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._by_name)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the registry's canonical JSON: format, and the tools with their arguments, in order."""
        content = {
            "input_format": self._input_format,
            "tools": [[tool.name, tool.description, json_schema.canonical(tool.parameters)] for tool in self._tools],
        }
        text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._tools)

    def __iter__(self) -> Iterator[Tool]:
        return iter(self._tools)

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __getitem__(self, name: str) -> Tool:
        try:
            return self._by_name[name]
        except KeyError:
            raise KeyError(f"no tool {name!r} in the registry; it has {', '.join(self.names) or 'none'}") from None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ToolRegistry) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return f"ToolRegistry({list(self.names)}, input_format={self._input_format!r})"

    def with_tool(self, tool: Any) -> "ToolRegistry":
        """A registry with `tool` (anything that `from_tools` takes) added at the end."""
        return ToolRegistry((*self._tools, _read_tool(tool)), input_format=self._input_format)

    def without(self, name: str) -> "ToolRegistry":
        """A registry without the tool `name`; KeyError if there is none."""
        removed = self[name]
        return ToolRegistry((tool for tool in self._tools if tool is not removed), input_format=self._input_format)

    def to_openai(self) -> list[dict[str, Any]]:
        """The tools as OpenAI dicts."""
        return [tool.to_openai() for tool in self._tools]

    @classmethod
    def from_tools(cls, tools: Iterable[Any], *, input_format: InputFormat = "json") -> "ToolRegistry":
        """Read tools of any make: `Tool`, LangChain tools, functions, pydantic classes, OpenAI, Anthropic or MCP dicts.

        Arguments that LangChain injects at run time (tool runtime, state, store) are not the model's to give and are
        left out.

        Raises:
            RegistryError: a tool that can't be read or used, by name.
        """
        return cls([_read_tool(tool) for tool in tools], input_format=input_format)

    @classmethod
    async def from_mcp(
        cls, connections: Mapping[str, Mapping[str, Any]], *, input_format: InputFormat = "json"
    ) -> "ToolRegistry":
        """Read the tools of MCP servers (needs the extra `mcp`).

        connections: server name to connection, as `langchain_mcp_adapters.client.MultiServerMCPClient` takes them, for
            instance `{"files": {"transport": "stdio", "command": "python", "args": ["server.py"]}}`.

        To run the tools too, call `MultiServerMCPClient(connections).get_tools()` and hand those to `from_tools`.

        Raises:
            RegistryError: the extra is missing, or a tool can't be used. Errors of the connection pass through.
        """
        try:
            from langchain_mcp_adapters.client import MultiServerMCPClient
        except ImportError as error:
            raise RegistryError(
                "reading MCP tools needs langchain-mcp-adapters: pip install 'loragen-agents[mcp]'"
            ) from error
        client = MultiServerMCPClient({name: dict(connection) for name, connection in connections.items()})  # type: ignore[misc]
        return cls.from_tools(await client.get_tools(), input_format=input_format)

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> "ToolRegistry":
        """Read a registry file: `input_format` and a list `tools` of `name`, `description` and `parameters`.

        Raises:
            RegistryError: what is wrong, with file, line and what was expected there.
        """
        from loragen_agents.registry_files import read_registry

        return read_registry(Path(path))

    def to_yaml(self, path: str | os.PathLike[str]) -> None:
        """Write the registry as a file that `from_yaml` reads back with the same fingerprint."""
        from loragen_agents.registry_files import write_registry

        write_registry(self, Path(path))


def _check_csv(tool: Tool) -> None:
    for argument in tool.argument_names:
        if not tool.types_of(argument) & _SCALARS:
            raise RegistryError(
                f"tool {tool.name!r}: the argument {argument!r} is an object or a list, which a csv input can't hold; "
                "use input_format 'json'"
            )


def _check_plain_json(value: Any, depth: int = 0) -> None:
    """Raise SchemaError unless `value` is made of JSON's types alone."""
    if depth > 100:
        raise json_schema.SchemaError("is nested deeper than 100 levels, or holds itself; make it flatter")
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise json_schema.SchemaError(f"has the key {key!r} of type {type(key).__name__}; keys must be strings")
            _check_plain_json(inner, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            _check_plain_json(inner, depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise json_schema.SchemaError(f"holds {value}, which JSON does not have")
    else:
        json_schema.types_of_value(value)


def _read_tool(source: Any) -> Tool:
    if isinstance(source, Tool):
        return source
    if isinstance(source, Mapping):
        return _read_mapping(source)
    label = getattr(source, "name", None) or getattr(source, "__name__", None) or repr(source)
    if not (callable(source) or hasattr(source, "args_schema")):
        raise RegistryError(
            f"{label!r} is a {type(source).__name__}, not a tool; expected a LangChain tool, a function, a pydantic "
            "class, an OpenAI dict or a Tool"
        )
    from langchain_core.tools import StructuredTool
    from langchain_core.utils.function_calling import convert_to_openai_tool

    try:
        definition = convert_to_openai_tool(source)
        if inspect.isclass(source) and issubclass(source, BaseModel):
            # A class converted as it stands keeps its injected arguments; as the schema of a tool it loses them.
            carrier = StructuredTool(
                name=definition["function"]["name"], description="-", args_schema=source, func=lambda **_: None
            )
            definition["function"]["parameters"] = convert_to_openai_tool(carrier)["function"].get("parameters", {})
    except Exception as error:
        raise RegistryError(f"tool {label!r}: LangChain can't describe it: {error}") from error
    return _read_mapping(definition)


def _read_mapping(source: Mapping[str, Any]) -> Tool:
    if isinstance(source.get("function"), Mapping):  # OpenAI, chat completions
        return _read_mapping(source["function"])
    if isinstance(source.get("toolSpec"), Mapping):  # Amazon Bedrock
        spec = source["toolSpec"]
        return _read_mapping({**spec, "inputSchema": spec.get("inputSchema", {}).get("json", {})})
    if "name" in source:
        if source.get("type", "function") not in ("function", "custom"):
            raise RegistryError(
                f"tool {source['name']!r}: of type {source['type']!r}, so its provider runs it; only tools that are "
                "described by name, description and parameters can be used"
            )
        # OpenAI and LangChain say parameters, Anthropic input_schema, MCP inputSchema.
        schema: Any = next(
            (source[key] for key in ("parameters", "input_schema", "inputSchema") if source.get(key)), {}
        )
        return Tool(name=source["name"], description=source.get("description") or "", parameters=schema)
    if "title" in source and "properties" in source:  # a JSON Schema that names itself
        schema = {key: value for key, value in source.items() if key not in ("title", "description")}
        return Tool(name=source["title"], description=source.get("description") or "", parameters=schema)
    raise RegistryError(
        f"a dict with the keys {', '.join(map(repr, source)) or '(none)'} is no tool definition; expected 'name', "
        "'description' and 'parameters', with or without {'type': 'function', 'function': ...} around them"
    )
