"""`loragen-agents chat`: the assistant, as a dialogue in the terminal or for one request in a script."""

import argparse
import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loragen_agents.commands.options import add_device_options

if TYPE_CHECKING:
    from loragen_agents.assistant.agent import Assistant
    from loragen_agents.assistant.loading import ModelChoice
    from loragen_agents.assistant.screen import Screen
    from loragen_agents.assistant.sessions import Session, Sessions

NAME = "chat"
HELP = "talk to an assistant that uses tools on your files, notes, dates and more"

USAGE = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("request", nargs="?", help="one request; without it, a dialogue, or the words on stdin")
    parser.add_argument(
        "--tools",
        action="append",
        default=[],
        metavar="NAMES",
        help="what is switched on, with commas: tools, groups (files,notes), .py files with your functions, .yaml "
        "files (default: all of the assistant's own)",
    )
    parser.add_argument("--mcp", type=Path, metavar="FILE", help='MCP servers to add: {"mcpServers": {...}}')
    parser.add_argument("--root", type=Path, default=Path("."), metavar="FOLDER", help="the folder for files (here)")
    parser.add_argument("--yes", action="store_true", help="run tools that change something without asking")
    parser.add_argument("--dry-run", action="store_true", help="only say what such tools would do")
    parser.add_argument("--continue", dest="go_on", action="store_true", help="go on with the last conversation")
    parser.add_argument("--stay", action="store_true", help="go on as a dialogue after the request")
    parser.add_argument("--lines", action="store_true", help="take each line on stdin as a request")
    parser.add_argument("--system", default=None, metavar="TEXT", help="system text, compressed with the tools")
    parser.add_argument("--max-steps", type=int, default=6, metavar="N", help="most steps in a turn (6)")
    parser.add_argument("--tool-seconds", type=float, default=30.0, metavar="S", help="time limit of a tool (30)")
    parser.add_argument("--edge", metavar="MODEL", help="the small LM (name, Hub id, folder, GGUF file)")
    parser.add_argument(
        "--cloud", metavar="MODEL", help="the LM that reads the definitions (the edge LM), or a service's URL"
    )
    parser.add_argument("--generator", default="default", metavar="FOLDER", help="generator checkpoint")
    add_device_options(parser)


def run(arguments: argparse.Namespace) -> int:
    requests = _requests(arguments)
    wrong = _wrong_usage(arguments, requests)
    if wrong:
        return _fail(arguments, wrong)
    from loragen_agents.assistant.loading import ModelChoice, fetch_models

    choice = ModelChoice(arguments.edge, arguments.cloud, arguments.generator, arguments.device, arguments.dtype)
    if not arguments.json:
        fetch_models(choice)
    return asyncio.run(_run(arguments, requests, choice))


def _requests(arguments: argparse.Namespace) -> list[str] | None:
    """The requests of a script; None for a dialogue."""
    if arguments.request is not None:
        return None if arguments.stay else [arguments.request.strip()]
    if sys.stdin is None or (sys.stdin.isatty() and not arguments.lines):
        return None
    text = sys.stdin.read()
    return [line.strip() for line in text.splitlines() if line.strip()] if arguments.lines else [text.strip()]


def _wrong_usage(arguments: argparse.Namespace, requests: list[str] | None) -> str:
    if requests is not None and not all(requests or [""]):
        return "the request is empty; give it as an argument or on stdin"
    if requests is None and arguments.json:
        return "--json needs a request, as an argument or on stdin"
    if requests is None and not (sys.stdin and sys.stdin.isatty() and sys.stdout.isatty()):
        return "a dialogue needs a terminal; give a request, or several with --lines on stdin"
    if not arguments.root.is_dir():
        return f"--root {arguments.root} is not a folder"
    if arguments.max_steps < 1 or arguments.tool_seconds <= 0:
        return "--max-steps and --tool-seconds must be larger than 0"
    return ""


def _fail(arguments: argparse.Namespace, message: str) -> int:
    from loragen_agents.support.console import complain, print_json

    if arguments.json:
        print_json({"error": {"type": "usage", "message": message}})
    else:
        complain(message)
    return USAGE


async def _run(arguments: argparse.Namespace, requests: list[str] | None, choice: "ModelChoice") -> int:
    from datetime import datetime

    from loragen_agents.assistant.own_tools import check_names, named_tools, read_servers, server_tools
    from loragen_agents.assistant.sessions import data_folder
    from loragen_agents.assistant.tools.context import Context, Folder
    from loragen_agents.assistant.tools.store import Store
    from loragen_agents.errors import RegistryError

    context = Context(
        Folder(arguments.root), Store(data_folder() / "assistant.sqlite"), lambda: datetime.now().astimezone()
    )
    words = [word.strip() for given in arguments.tools for word in given.split(",") if word.strip()]
    try:
        tools = named_tools(words, context)
        connections = read_servers(arguments.mcp) if arguments.mcp else {}
    except RegistryError as error:
        return _fail(arguments, str(error))
    async with server_tools(connections) as served:
        tools += served
        check_names(tools)
        return await _talk(arguments, requests, choice, context, tools)


async def _talk(
    arguments: argparse.Namespace, requests: list[str] | None, choice: "ModelChoice", context: Any, tools: list[Any]
) -> int:
    from loragen_agents.assistant.agent import Assistant
    from loragen_agents.assistant.loading import Loading, load_chat_model, warm_up
    from loragen_agents.assistant.permission import Permissions
    from loragen_agents.assistant.screen import Screen
    from loragen_agents.assistant.sessions import Sessions, data_folder
    from loragen_agents.support.console import results

    sessions = Sessions(data_folder())
    kept = sessions.last() if arguments.go_on else None
    system = arguments.system if arguments.system is not None else kept.system if kept else ""
    session = kept or sessions.new(system)

    def make() -> Any:
        model = load_chat_model(choice)
        if requests is None:
            warm_up(model, tools, system)
        return model

    loading = Loading(make)
    permissions = Permissions(yes=arguments.yes, dry_run=arguments.dry_run)
    assistant = Assistant(
        None,
        tools,
        context,
        permissions,
        system,
        arguments.max_steps,
        arguments.tool_seconds,
        session.turns,
    )
    screen = Screen(results)
    if requests is None:
        return await _dialogue(arguments, assistant, loading, screen, sessions, session)
    from loragen_agents.assistant.scripts import run_requests

    assistant.model = await loading.model()
    code = await run_requests(assistant, requests, None if arguments.json else screen)
    session.system, session.turns = assistant.system, assistant.turns
    session.save()
    sessions.prune()
    return code


async def _dialogue(
    arguments: argparse.Namespace,
    assistant: "Assistant",
    loading: Any,
    screen: "Screen",
    sessions: "Sessions",
    session: "Session",
) -> int:
    from loragen_agents.assistant.compare import compare
    from loragen_agents.assistant.dialogue import Dialogue
    from loragen_agents.assistant.sessions import data_folder

    dialogue = Dialogue(
        assistant, list(assistant.tools), loading, screen, sessions, session, compare, data_folder() / "history"
    )
    sessions.prune()
    return await dialogue.run(arguments.request)
