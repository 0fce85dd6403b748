"""Tools that users bring: functions in a Python file, descriptions in a YAML file, and MCP servers.

Python files are run, so they are the user's own code by definition; a server is a program that the user has named. What
either says is text from outside (see `permission`).
"""

import importlib.util
import inspect
import json
import os
import re
import sys
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from langchain_core.tools import BaseTool, StructuredTool

from loragen_agents.assistant.results import Result
from loragen_agents.assistant.tools.catalog import chosen_tools
from loragen_agents.assistant.tools.context import Context
from loragen_agents.errors import RegistryError
from loragen_agents.registry import Tool, ToolRegistry


def named_tools(words: Sequence[str], context: Context) -> list[BaseTool]:
    """The tools that `--tools` names: the assistant's own by name or group, and those of `.py` and `.yaml` files.

    A YAML file describes functions of the same name among the others anew; a tool that only it knows is shown but not
    run.

    Raises:
        RegistryError: a name, file or tool that can't be used, by name.
    """
    own = [word for word in words if not word.endswith((".py", ".yaml", ".yml"))]
    files = [Path(word) for word in words if word not in own]
    tools: list[BaseTool] = list(chosen_tools(context, own)) if own or not files else []
    for file in files:
        if not file.is_file():
            raise RegistryError(f"there is no file {file} to read tools from")
        if file.suffix == ".py":
            tools += python_tools(file)
    for file in files:
        if file.suffix != ".py":
            tools = _described(tools, ToolRegistry.from_yaml(file), file)
    check_names(tools)
    return tools


def check_names(tools: Iterable[BaseTool]) -> None:
    """Raise RegistryError where two tools have one name, or one can't be used."""
    ToolRegistry.from_tools(tools)


def python_tools(file: Path) -> list[BaseTool]:
    """LangChain tools and functions with a docstring that a Python file defines; names with `_` in front are left out.

    A function or tool that only reads is marked by `read_only = True` (an attribute, or in a tool's metadata): it runs
    without asking.

    Raises:
        RegistryError: the file can't be run or defines no tool.
    """
    name = f"loragen_agents_tools_{re.sub(r'[^0-9a-zA-Z]', '_', file.stem)}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise RegistryError(f"{file} can't be read as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pydantic looks types up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise RegistryError(f"{file} can't be run: {type(error).__name__}: {error}") from error
    found: list[BaseTool] = []
    for label, value in vars(module).items():
        if label.startswith("_"):
            continue
        if isinstance(value, BaseTool):
            found.append(value)
        elif inspect.isfunction(value) and value.__module__ == name and value.__doc__:
            found.append(_function_tool(value, file))
    if not found:
        raise RegistryError(f"{file} defines no tool; expected functions with a docstring, or LangChain tools")
    return found


def _function_tool(function: Any, file: Path) -> BaseTool:
    metadata = {"read_only": getattr(function, "read_only", False) is True}
    try:
        if inspect.iscoroutinefunction(function):
            return StructuredTool.from_function(coroutine=function, metadata=metadata)
        return StructuredTool.from_function(function, metadata=metadata)
    except Exception as error:  # LangChain and pydantic refuse signatures in many ways
        raise RegistryError(f"{file}: {function.__name__} can't be a tool: {error}") from error


def _described(tools: list[BaseTool], registry: ToolRegistry, file: Path) -> list[BaseTool]:
    by_name = {tool.name: tool for tool in tools}
    for described in registry:
        tool = by_name.get(described.name)
        if tool is None:
            by_name[described.name] = _shown_only(described, file)
        else:
            update = {"description": described.description, "args_schema": described.parameters}
            by_name[described.name] = tool.model_copy(update=update)
    return list(by_name.values())


def _shown_only(tool: Tool, file: Path) -> BaseTool:
    def run(**_: Any) -> tuple[str, Result]:
        result = Result(f"{tool.name} is only described in {file.name}, so nothing was run.")
        return result.text, result

    return StructuredTool(
        name=tool.name,
        description=tool.description,
        args_schema=tool.parameters,
        func=run,
        response_format="content_and_artifact",
        metadata={"read_only": True},
    )


def read_servers(file: Path, environment: Mapping[str, str] | None = None) -> dict[str, dict[str, Any]]:
    """The connections of a `{"mcpServers": {...}}` file, as langchain-mcp-adapters takes them.

    `${VAR}` is filled in from the environment, which the servers do not inherit otherwise.

    Raises:
        RegistryError: what is wrong with the file, by server.
    """
    values = os.environ if environment is None else environment
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RegistryError(f"{file} can't be read as JSON: {error}") from error
    servers = content.get("mcpServers") if isinstance(content, dict) else None
    if not isinstance(servers, dict) or not servers:
        raise RegistryError(f'{file} names no server; expected {{"mcpServers": {{"name": {{"command": ...}}}}}}')
    return {
        name: _connection(_filled(server, values, f"{file}, {name}"), f"{file}, {name}")
        for name, server in servers.items()
    }


def _connection(server: Any, where: str) -> dict[str, Any]:
    if not isinstance(server, dict) or not isinstance(server.get("command", server.get("url")), str):
        raise RegistryError(f"{where}: expected an object with 'command' (and 'args', 'env') or 'url' (and 'headers')")
    if "command" in server:
        arguments, variables = server.get("args", []), server.get("env", {})
        if not isinstance(arguments, list) or not isinstance(variables, dict):
            raise RegistryError(f"{where}: 'args' must be a list and 'env' an object")
        made = {"transport": "stdio", "command": server["command"], "args": [str(one) for one in arguments]}
        return {**made, "env": {str(name): str(value) for name, value in variables.items()}, **_kept(server, "cwd")}
    kind = "sse" if server.get("type") == "sse" else "streamable_http"
    return {"transport": kind, "url": server["url"], **_kept(server, "headers")}


def _kept(server: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {key: server[key]} if key in server else {}


def _filled(value: Any, values: Mapping[str, str], where: str) -> Any:
    if isinstance(value, dict):
        return {key: _filled(inner, values, where) for key, inner in value.items()}
    if isinstance(value, list):
        return [_filled(inner, values, where) for inner in value]
    if not isinstance(value, str):
        return value

    def fill(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise RegistryError(f"{where}: the environment variable {match[1]} is not set")
        return values[match[1]]

    return re.sub(r"\$\{(\w+)\}", fill, value)


@asynccontextmanager
async def server_tools(connections: Mapping[str, dict[str, Any]]) -> AsyncIterator[list[BaseTool]]:
    """The tools of MCP servers, which run as long as the context is open.

    Raises:
        RegistryError: the extra is missing, or a server can't be started or reached, by name.
    """
    if not connections:
        yield []
        return
    try:
        from langchain_mcp_adapters.client import MultiServerMCPClient
        from langchain_mcp_adapters.tools import load_mcp_tools
    except ImportError as error:
        raise RegistryError("--mcp needs langchain-mcp-adapters: pip install 'loragen-agents[mcp]'") from error
    client = MultiServerMCPClient(dict(connections))  # type: ignore[arg-type]
    async with AsyncExitStack() as stack:
        tools: list[BaseTool] = []
        for name in connections:
            try:
                session = await stack.enter_async_context(client.session(name))
                tools += await load_mcp_tools(session, server_name=name)
            except Exception as error:
                raise RegistryError(f"the MCP server {name!r} can't be used: {_innermost(error)}") from error
        yield tools


def _innermost(error: BaseException) -> str:
    """What went wrong, without the groups that task groups put around it."""
    while isinstance(getattr(error, "exceptions", None), tuple) and error.exceptions:  # type: ignore[attr-defined]
        error = error.exceptions[0]  # type: ignore[attr-defined]
    return f"{type(error).__name__}: {error}"
