"""Tools that users bring: Python and YAML files, and a real MCP server over stdio."""

import asyncio
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from loragen_agents import cli
from loragen_agents.assistant import loading
from loragen_agents.assistant.agent import Assistant
from loragen_agents.assistant.own_tools import named_tools, python_tools, read_servers, server_tools
from loragen_agents.assistant.permission import Permissions, asks_first
from loragen_agents.assistant.turns import Turn
from loragen_agents.errors import RegistryError
from tests.scripted_chat import call, scripted, tool_context

MY_TOOLS = '''
from langchain_core.tools import tool

_hidden = 3

def shout(text: str) -> str:
    """Write a text in capitals."""
    return text.upper()

shout.read_only = True

@tool
def whisper(text: str) -> str:
    """Write a text in small letters."""
    return text.lower()

def helper(text):
    return text

def _private() -> str:
    """Not a tool."""
    return ""
'''
ROOT = Path(__file__).parents[2]


@pytest.fixture
def context(tmp_path):
    return tool_context(tmp_path)


@pytest.fixture
def my_tools(tmp_path) -> Path:
    (tmp_path / "my_tools.py").write_text(MY_TOOLS)
    return tmp_path / "my_tools.py"


def run(context: Any, tools: Any, *script: Any, permissions: Permissions | None = None) -> Turn:
    assistant = Assistant(scripted(*script), tools, context, permissions or Permissions())
    return asyncio.run(assistant.turn("Go.", lambda event: None))


def test_functions_and_langchain_tools_of_a_file(context, my_tools):
    tools = named_tools([str(my_tools)], context)
    assert {tool.name: asks_first(tool) for tool in tools} == {"shout": False, "whisper": True}
    turn = run(context, tools, call("shout", text="hi"), "HI!")
    assert turn.calls[0].text == "HI" and turn.answer == "HI!"
    assert run(context, tools, call("whisper", text="HI")).ending == "failed"


def test_files_go_with_groups(context, my_tools):
    names = {tool.name for tool in named_tools(["timers", str(my_tools)], context)}
    assert names == {"start_timer", "list_timers", "cancel_timer", "shout", "whisper"}


def test_a_yaml_file_describes_anew_or_only_shows(context, my_tools, tmp_path):
    (tmp_path / "my_tools.yaml").write_text(
        "tools:\n- name: shout\n  description: Makes a text loud.\n"
        "  parameters: {properties: {text: {type: string, description: what to say}}, required: [text]}\n"
        "- name: open_door\n  description: Opens a door.\n"
    )
    tools = {tool.name: tool for tool in named_tools([str(my_tools), str(tmp_path / "my_tools.yaml")], context)}
    assert tools["shout"].description == "Makes a text loud."
    turn = run(context, list(tools.values()), call("shout", text="hi"), call("open_door"), "Open.")
    assert [one.text for one in turn.calls] == [
        "HI",
        "open_door is only described in my_tools.yaml, so nothing was run.",
    ]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1", "defines no tool"),
        ("def broken(:", "SyntaxError"),
        ("import nothing_like_this", "nothing_like_this"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
def test_files_that_can_not_be_used_are_named(tmp_path, source, message):
    (tmp_path / "bad.py").write_text(source)
    with pytest.raises(RegistryError, match=message) as raised:
        python_tools(tmp_path / "bad.py")
    assert "bad.py" in str(raised.value)


def test_two_tools_of_one_name_are_an_error(context, tmp_path):
    (tmp_path / "clash.py").write_text('def today() -> str:\n    """Today."""\n    return ""\n')
    with pytest.raises(RegistryError, match="today"):
        named_tools(["dates", str(tmp_path / "clash.py")], context)
    with pytest.raises(RegistryError, match="no file"):
        named_tools([str(tmp_path / "none.py")], context)


class TestServersFile:
    def read(self, tmp_path: Path, servers: Any, **environment: str) -> dict[str, Any]:
        (tmp_path / "servers.json").write_text(json.dumps({"mcpServers": servers}))
        return read_servers(tmp_path / "servers.json", environment)

    def test_commands_and_addresses(self, tmp_path):
        servers = {
            "files": {"command": "${HOME}/bin/server", "args": ["--key", "${KEY}"], "env": {"TOKEN": "a${KEY}b"}},
            "web": {"url": "https://example.com/${KEY}", "headers": {"Authorization": "Bearer ${KEY}"}},
        }
        assert self.read(tmp_path, servers, HOME="/home/me", KEY="k") == {
            "files": {
                "transport": "stdio",
                "command": "/home/me/bin/server",
                "args": ["--key", "k"],
                "env": {"TOKEN": "akb"},
            },
            "web": {
                "transport": "streamable_http",
                "url": "https://example.com/k",
                "headers": {"Authorization": "Bearer k"},
            },
        }

    @pytest.mark.parametrize(
        ("servers", "message"),
        [
            ({}, "names no server"),
            ({"x": {"args": []}}, "x: expected an object with 'command'"),
            ({"x": {"command": "a", "args": "b"}}, "'args' must be a list"),
            ({"x": {"command": "${NOT_SET}"}}, "NOT_SET is not set"),
            ([], "names no server"),
        ],
    )
    def test_what_is_wrong_is_said(self, tmp_path, servers, message):
        with pytest.raises(RegistryError, match=message):
            self.read(tmp_path, servers)


def test_a_real_server(context, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_USER", "x")
    monkeypatch.setenv("PLACE", "Oslo")
    server = {"command": sys.executable, "args": ["-m", "tests.mcp_server"]}
    environment = {"PYTHONPATH": str(ROOT), "WEATHER_TEXT": "Snow in ${PLACE}."}
    (tmp_path / "servers.json").write_text(json.dumps({"mcpServers": {"weather": {**server, "env": environment}}}))

    async def talk() -> tuple[Turn, Turn, list[bool]]:
        async with server_tools(read_servers(tmp_path / "servers.json")) as tools:
            model = scripted(
                call("weather", city="Oslo"), call("variables"), "Snow.", call("move_house", city="Oslo"), "Moved."
            )
            assistant = Assistant(model, tools, context, Permissions())
            first = await assistant.turn("How is the weather in Oslo?", lambda event: None)
            second = await assistant.turn("Move there.", lambda event: None)
            return first, second, [asks_first(tool) for tool in tools]

    first, second, asks = asyncio.run(talk())
    assert asks == [False, False, True]
    assert first.calls[0].text == "Snow in Oslo." and first.answer == "Snow."
    assert "SECRET_OF_THE_USER" not in first.calls[1].text and "WEATHER_TEXT" in first.calls[1].text
    assert "SECRET_OF_THE_USER" in os.environ
    assert second.ending == "failed" and "asks first" in second.reason


def test_a_server_that_can_not_be_started_is_named(tmp_path):
    async def start() -> None:
        async with server_tools({"gone": {"transport": "stdio", "command": str(tmp_path / "none"), "args": []}}):
            pass

    with pytest.raises(RegistryError, match="MCP server 'gone' can't be used"):
        asyncio.run(start())


def test_the_readmes_line_with_a_server(tmp_path, monkeypatch, capsys):
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines if line.startswith("loragen-agents chat") and "--mcp" in line]
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("LORAGEN_AGENTS_DATA", str(tmp_path))
    monkeypatch.setattr(loading, "fetch_models", lambda choice: None)
    monkeypatch.setattr(loading, "load_chat_model", lambda choice: scripted(call("count_notes"), "None yet."))
    assert cli.main(shlex.split(line)[1:]) == 0
    said = capsys.readouterr().out
    assert "There are 0 notes." in said and "None yet." in said


def test_the_readmes_example(context, tmp_path):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    source = readme.split("# my_tools.py\n", 1)[1].split("```", 1)[0]
    (tmp_path / "my_tools.py").write_text(source)
    tools = named_tools([str(tmp_path / "my_tools.py")], context)
    assert run(context, tools, call("shout", text="hello"), "HELLO").calls[0].text == "HELLO"
