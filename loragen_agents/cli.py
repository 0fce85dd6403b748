"""`loragen-agents`: reads the command line, runs a command, turns errors into one paragraph and an exit code.

Exit codes: 0 done; 1 an error of the user's input, files, network or machine; 2 wrong usage; 130 interrupted. What the
commands do is in `loragen_agents/commands/`.
"""

import _thread
import argparse
import io
import logging
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from loragen_agents import __version__
from loragen_agents.commands import all_commands
from loragen_agents.errors import LoRAGenError

FAILURE, INTERRUPTED = 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (without the program's name; sys.argv by default) and return the exit code."""
    if sys.stderr is None:  # closed by the caller (2>&-): what is said about the work goes nowhere
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stdout is None:
        # Before any work: a file opened now would get the number of the standard output.
        sys.stderr.write("Error: standard output is closed; redirect it (> /dev/null) if the result is not wanted\n")
        return FAILURE
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal or pipe that can't show a character gets an escape, not a traceback.
            stream.reconfigure(errors="backslashreplace")
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO if arguments.verbose else logging.WARNING, format="%(message)s")
    with _swallowed_interrupts_again():
        try:
            try:
                code = int(arguments.run(arguments))
            except KeyboardInterrupt:
                code = _fail(arguments, "interrupted", "Interrupted", INTERRUPTED)
            except BrokenPipeError:
                raise
            except (LoRAGenError, OSError) as error:
                if arguments.verbose:
                    logging.getLogger(__name__).info("", exc_info=error)
                code = _fail(arguments, str(error), type(error).__name__, FAILURE)
            sys.stdout.flush()  # so that a broken pipe or a full disk shows here
            return code
        except BrokenPipeError:  # the reader of the pipe has gone (`| head`)
            _abandon_stdout()
            return FAILURE
        except OSError as error:
            _abandon_stdout()
            arguments.json = False  # there is no stdout to write it to
            return _fail(arguments, f"the result can't be written: {error}", type(error).__name__, FAILURE)


@contextmanager
def _swallowed_interrupts_again() -> Iterator[None]:
    """Interrupt once more where Ctrl-C came while Python can't raise a KeyboardInterrupt.

    In a finaliser or a weak reference's callback, as the import system has them, a KeyboardInterrupt is printed and
    dropped, and the command would go on.
    """
    before = sys.unraisablehook
    later: list[threading.Timer] = []

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            # From another thread: interrupted here and now, the hook itself would swallow it.
            timer = threading.Timer(0.05, _thread.interrupt_main)
            timer.daemon = True
            timer.start()
            later.append(timer)
        else:
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
        for timer in later:
            timer.cancel()


def _abandon_stdout() -> None:
    """Point stdout at the null device: Python flushes it at exit and would report the same error again."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
