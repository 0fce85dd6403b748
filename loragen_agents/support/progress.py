"""Progress of long work: a callback that is told the current step and the part of it that is done.

A caller passes its own callback. Without one the steps are drawn on the terminal, if there is one, and go to the log in
any case. Knows nothing of what the work is.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

# Called with the step in words and the part of it that is done (0 to 1, None where that is not known). An exception
# that it raises ends the work, which then leaves nothing half-done behind.
Progress = Callable[[str, float | None], None]


def silent(text: str, fraction: float | None) -> None:
    """A progress callback that shows nothing."""


def lines() -> Progress:
    """A progress callback that writes each step as a line to stderr: for the log of an unattended run."""
    from loragen_agents.support.console import messages, visible

    last = ""

    def write(text: str, fraction: float | None) -> None:
        nonlocal last
        if text != last:
            last = text
            messages.print(visible(text), markup=False, highlight=False, soft_wrap=True)

    return write


@contextmanager
def shown(progress: Progress | None) -> Iterator[Progress]:
    """Give the callback to report to: `progress` itself, or one that draws on the terminal; both also write the log."""
    if progress is not None:
        yield _logged(progress)
    elif sys.stderr.isatty():
        with _terminal() as draw:
            yield _logged(draw)
    else:
        yield _logged(silent)


def _logged(progress: Progress) -> Progress:
    last = ""

    def report(text: str, fraction: float | None) -> None:
        nonlocal last
        if text != last:
            last = text
            logger.info("%s", text)
        progress(text, fraction)

    return report


@contextmanager
def _terminal() -> Iterator[Progress]:
    from rich import progress as rich_progress
    from rich.errors import LiveError

    from loragen_agents.support.console import messages, visible

    display = rich_progress.Progress(
        rich_progress.SpinnerColumn(),
        rich_progress.TextColumn("{task.description}", markup=False),
        rich_progress.BarColumn(bar_width=24),
        rich_progress.TaskProgressColumn(),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TimeRemainingColumn(),
        console=messages,
        transient=True,
    )
    try:
        display.start()
    except LiveError:  # somebody else draws on this terminal already
        yield silent
        return
    try:
        task: rich_progress.TaskID | None = None
        current, started = "", time.monotonic()

        def finish() -> None:
            # Steps that took a while stay readable above the bar; the short ones leave no trace.
            seconds = time.monotonic() - started
            if current and seconds >= 2:
                display.console.print(f"{visible(current)} ({seconds:.0f} s)", markup=False, highlight=False)

        def draw(text: str, fraction: float | None) -> None:
            nonlocal task, current, started
            if task is None or text != current:
                finish()
                current, started = text, time.monotonic()
                if task is not None:
                    display.remove_task(task)
                task = display.add_task(visible(text), total=None)  # without a total the bar pulses
            if fraction is not None:
                display.update(task, total=1.0, completed=fraction)

        yield draw
        finish()
    finally:
        display.stop()
