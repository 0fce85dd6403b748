"""The ordered set of tools that a small model is specialised on.

A `ToolRegistry` is a plain value: what the tools are called, what they do and which arguments they take, in which
order. It deliberately knows nothing of models, prompts or how a tool is run; importing it loads neither torch nor
LangChain, which is asked only when a LangChain tool or an MCP server is to be read.
"""

import hashlib
import inspect
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from loragen_agents.errors import RegistryError
from loragen_agents.registry import json_schema
from loragen_agents.registry.csv_values import fits_csv
from loragen_agents.registry.tool import InputFormat, Tool
from loragen_agents.registry.yaml_files import read_registry_file, write_registry_file

_SCALARS = frozenset({"null", "boolean", "integer", "number", "string"})


class ToolRegistry:
    """An ordered, immutable set of tools with unique names, and the form in which their inputs are written.

    An empty registry stands for a model that only answers.

    Args:
        tools: the tools, in the order in which prompts list them.
        input_format: "json" (an object on one line) or "csv" (values in schema order, as in GPT4Tools).

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

        Arguments that LangChain injects at run time (tool runtime, state, store) are left out: the model doesn't give
        them.

        Args:
            tools: the tools, in any of these forms.
            input_format: how their inputs are written, "json" or "csv".

        Raises:
            RegistryError: a tool that can't be read or used, by name.
        """
        return cls([_read_tool(tool) for tool in tools], input_format=input_format)

    @classmethod
    async def from_mcp(
        cls, connections: Mapping[str, Mapping[str, Any]], *, input_format: InputFormat = "json"
    ) -> "ToolRegistry":
        """Read the tools of MCP servers (needs the extra `mcp`).

        To run the tools too, call `MultiServerMCPClient(connections).get_tools()` and hand those to `from_tools`.

        Args:
            connections: server name to connection, as `langchain_mcp_adapters.client.MultiServerMCPClient` takes them,
                for instance `{"files": {"transport": "stdio", "command": "python", "args": ["server.py"]}}`.
            input_format: how the tools' inputs are written, "json" or "csv".

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
        content = read_registry_file(Path(path))
        registry = cls([], input_format=content.input_format)
        for tool, line in content.tools:
            try:
                registry = registry.with_tool(tool)
            except RegistryError as error:
                raise RegistryError(f"{path}, line {line}: {error}") from error
        return registry

    def to_yaml(self, path: str | os.PathLike[str]) -> None:
        """Write the registry as a file that `from_yaml` reads back with the same fingerprint."""
        write_registry_file(self._tools, self._input_format, Path(path))


def _check_csv(tool: Tool) -> None:
    for argument in tool.argument_names:
        if not tool.types_of(argument) & _SCALARS:
            raise RegistryError(
                f"tool {tool.name!r}: the argument {argument!r} is an object or a list, which a csv input can't hold; "
                "use input_format 'json'"
            )
        values = json_schema.constants(tool.parameters["properties"][argument])
        if values is not None and not any(map(fits_csv, values)):
            raise RegistryError(
                f"tool {tool.name!r}: csv can hold none of the values of the argument {argument!r} (they are empty, "
                "begin or end with a space, or have a comma or a line break); use input_format 'json'"
            )


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
