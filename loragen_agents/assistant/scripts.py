"""The assistant without a dialogue: requests in, lines or JSON out, an exit code at the end."""

import asyncio
import json
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any

from loragen_agents.assistant.agent import Assistant, CallEnds, Event
from loragen_agents.assistant.screen import Screen, call_json, turn_json
from loragen_agents.assistant.turns import Turn

ANSWERED, FAILED = 0, 1


async def run_requests(assistant: Assistant, requests: Sequence[str], screen: Screen | None) -> int:
    """Run the requests as turns of one conversation; stop at the first that fails.

    Args:
        screen: where the turns are shown; None prints one JSON object a line: each call, then how the turn ended.

    Returns:
        0 when all were answered, else 1.
    """
    for number, request in enumerate(requests):
        if screen is not None and len(requests) > 1:
            screen.console.print(*([] if number == 0 else [""]), f"> {request}", style="bold", sep="\n")
        turn = await interruptible(assistant, assistant.turn(request, screen.show if screen else print_event))
        if screen is not None:
            screen.turn_ends(turn, figures=screen.console.is_terminal)
        else:
            print_line(turn_json(turn))
        if not turn.succeeded:
            return FAILED
    return ANSWERED


async def interruptible(assistant: Assistant, running: Coroutine[Any, Any, Turn]) -> Turn:
    """Run a turn that Ctrl-C ends: the turn is then kept as interrupted."""
    task = asyncio.ensure_future(running)
    before = len(assistant.turns)
    with on_interrupt(task.cancel):
        try:
            return await task
        except asyncio.CancelledError:
            if len(assistant.turns) == before:  # it was cancelled before it began
                raise
            return assistant.turns[-1]


class on_interrupt:
    """Calls `handler` at Ctrl-C while the block runs. Where the platform has no signals in loops, nothing changes."""

    def __init__(self, handler: Callable[[], Any]) -> None:
        self.handler = handler

    def __enter__(self) -> None:
        with suppress(NotImplementedError, RuntimeError, ValueError):
            asyncio.get_running_loop().add_signal_handler(signal.SIGINT, self.handler)

    def __exit__(self, *_: Any) -> None:
        with suppress(NotImplementedError, RuntimeError, ValueError):
            asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)


def print_event(event: Event) -> None:
    if isinstance(event, CallEnds):
        print_line(call_json(event.call))


def print_line(value: dict[str, Any]) -> None:
    """One JSON object on a line of stdout. ASCII, so that no terminal takes a part of it for an escape sequence."""
    sys.stdout.write(json.dumps(value, ensure_ascii=True, default=str) + "\n")
    sys.stdout.flush()
