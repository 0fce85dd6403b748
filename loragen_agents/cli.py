"""`loragen-agents`: reads the command line, runs a command, turns errors into one paragraph and an exit code.

Exit codes: 0 done; 1 an error of the user's input, files, network or machine; 2 wrong usage; 130 interrupted. What the
commands do is in `loragen_agents/commands/`.
"""

import argparse
import io
import logging
import os
import sys
from collections.abc import Sequence

from loragen_agents import __version__
from loragen_agents.commands import all_commands
from loragen_agents.errors import LoRAGenError

FAILURE, INTERRUPTED = 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (without the program's name; sys.argv by default) and return the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal or pipe that can't show a character gets an escape, not a traceback.
            stream.reconfigure(errors="backslashreplace")
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO if arguments.verbose else logging.WARNING, format="%(message)s")
    try:
        code = int(arguments.run(arguments))
        sys.stdout.flush()  # so that a broken pipe shows here
        return code
    except KeyboardInterrupt:
        return _fail(arguments, "interrupted", "Interrupted", INTERRUPTED)
    except BrokenPipeError:
        # The reader of the pipe has gone (`| head`). Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except (LoRAGenError, OSError) as error:
        if arguments.verbose:
            logging.getLogger(__name__).info("", exc_info=error)
        return _fail(arguments, str(error), type(error).__name__, FAILURE)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each parsed command line carries its command's `run`."""
    parser = argparse.ArgumentParser(
        prog="loragen-agents", description="Write a tool registry into LoRA weights and ask the specialised model."
    )
    parser.add_argument("--version", action="version", version=f"loragen-agents {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in all_commands():
        subparser = commands.add_parser(command.NAME, help=command.HELP, description=command.HELP)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
        for leaf in _leaves(subparser):
            leaf.add_argument("--json", action="store_true", help="print the result, or the error, as JSON")
            leaf.add_argument("--verbose", action="store_true", help="say what is done, and show tracebacks")
    return parser


def _leaves(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """The parser itself, or those of its subcommands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return [leaf for subparser in action.choices.values() for leaf in _leaves(subparser)]
    return [parser]


def _fail(arguments: argparse.Namespace, message: str, kind: str, code: int) -> int:
    from loragen_agents.support.console import complain, print_json

    if arguments.json:
        print_json({"error": {"type": kind, "message": message}})
    else:
        complain(message)
    return code


if __name__ == "__main__":
    sys.exit(main())
