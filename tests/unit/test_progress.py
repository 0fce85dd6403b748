import logging
import os
import pty
import subprocess
import sys

import pytest

from loragen_agents.support.progress import lines, shown

SCRIPT = """
import time
from loragen_agents.support.progress import lines, shown
with shown(None) as report:
    with shown(None) as nested:
        nested("inner", 0.5)
    report("First [red]step \\x1b[2J", 0.25)
    time.sleep(2.1)
    report("Second step", None)
    time.sleep(0.3)
"""


def on_a_terminal(script: str) -> str:
    """What `script` writes to a terminal on stderr."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen([sys.executable, "-c", script], stderr=follower, env=environment) as process:
        os.close(follower)
        written = b""
        try:
            while chunk := os.read(leader, 4096):
                written += chunk
        except OSError:  # Linux' word for the end of a terminal
            pass
        os.close(leader)
    assert process.returncode == 0, written.decode()
    return written.decode()


def test_steps_are_drawn_on_a_terminal_and_long_ones_stay() -> None:
    text = on_a_terminal(SCRIPT)
    assert "25%" in text and "Second step" in text
    assert "First [red]step \\x1b[2J (2 s)" in text
    assert "Second step (" not in text
    assert "\x1b[2J" not in text


def test_without_a_terminal_they_go_to_the_log_once_each(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO), shown(None) as report:
        for fraction in (0.1, 0.2):
            report("Fetching", fraction)
        report("Loading", None)
    assert caplog.messages == ["Fetching", "Loading"]
    assert capsys.readouterr() == ("", "")


def test_lines_are_written_once_for_each_text(capsys: pytest.CaptureFixture[str]) -> None:
    with shown(lines()) as report:
        for fraction in (0.1, 0.2):
            report("Step 10 of 50 (loss 1.25)", fraction)
        report("Step 20 of 50 (loss [1.00])", 0.4)
    assert capsys.readouterr().err.splitlines() == ["Step 10 of 50 (loss 1.25)", "Step 20 of 50 (loss [1.00])"]


def test_a_callback_is_told_every_part() -> None:
    told: list[tuple[str, float | None]] = []
    with shown(lambda *step: told.append(step)) as report:
        report("Fetching", 0.1)
        report("Fetching", 0.2)
    assert told == [("Fetching", 0.1), ("Fetching", 0.2)]
