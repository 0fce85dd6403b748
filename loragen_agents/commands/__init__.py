"""The subcommands of `loragen-agents`, one module each.

A module here is a command when it has NAME, HELP, `add_arguments(parser)` and `run(arguments) -> int` (the exit code);
`cli.py` finds it by itself. Modules import nothing slow (torch, transformers) before `run`. Every command has `--json`
(`arguments.json`): its result is then one JSON value on stdout.
"""

import argparse
from importlib import import_module
from pkgutil import iter_modules
from typing import Protocol, cast


class Command(Protocol):
    """What a command module has to have."""

    NAME: str
    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, arguments: argparse.Namespace) -> int: ...


def all_commands() -> list[Command]:
    """The command modules of this folder, by name."""
    modules = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
    return sorted((cast(Command, module) for module in modules), key=lambda command: command.NAME)
