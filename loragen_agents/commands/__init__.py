"""The subcommands of `loragen-agents`, one module each.

A command has NAME, HELP, `add_arguments(parser)` and `run(arguments) -> int` (the exit code), and stands in `COMMANDS`.
Modules import nothing slow (torch, transformers) before `run`. Every command has `--json`
(`arguments.json`): its result is then one JSON value on stdout.
"""

import argparse
from importlib import import_module
from typing import Protocol, cast


class Command(Protocol):
    """What a command module has to have."""

    NAME: str
    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, arguments: argparse.Namespace) -> int: ...


COMMANDS = ("ask", "bench", "chat", "data", "doctor", "models", "serve", "specialize", "train")


def all_commands() -> list[Command]:
    """The command modules, in the order of `COMMANDS`."""
    return [cast(Command, import_module(f"{__name__}.{name}")) for name in COMMANDS]
