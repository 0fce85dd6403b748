"""`loragen-agents bench ACTION`: how well and how fast models use tools. One module an action, as with commands."""

import argparse
from importlib import import_module
from typing import cast

from loragen_agents.commands import Command

NAME = "bench"
HELP = "measure how well and how fast specialised models use tools, beside what one would use instead"

ACTIONS = ("gpt4tools", "calls", "bfcl", "latency", "compare", "mini")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name in ACTIONS:
        action = _action(name)
        action.add_arguments(actions.add_parser(action.NAME, help=action.HELP))


def run(arguments: argparse.Namespace) -> int:
    return _action(arguments.action).run(arguments)


def _action(name: str) -> Command:
    return cast(Command, import_module(f"{__name__}.{name}"))
