"""The assistant on the embedded model and in a real pseudo-terminal. Few and quick: what the model chooses is the
benchmark's question (`bench calls --tools assistant --calls everyday`)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHAT = [sys.executable, "-m", "loragen_agents", "chat"]


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "LORAGEN_AGENTS_DATA": str(tmp_path / "data")}


def test_a_script_in_the_c_locale(tmp_path, environment):
    """Three groups, so that specialising takes a moment only."""
    made = subprocess.run(
        [*CHAT, "--tools", "maths,dates", "--root", str(tmp_path), "What is 15% of 240?"],
        env={**environment, "LC_ALL": "C", "NO_COLOR": "1"},
        capture_output=True,
        timeout=300,
    )
    assert made.returncode == 0, made.stderr
    assert made.stdout.isascii() and b"15% of 240 = 36" in made.stdout and b"\x1b" not in made.stdout
    assert all(len(line) <= 80 for line in made.stdout.decode().splitlines())


@pytest.mark.skipif(sys.platform == "win32", reason="pexpect needs a pseudo-terminal")
def test_a_dialogue_in_a_terminal(tmp_path, environment):
    import pexpect

    (tmp_path / "old.txt").write_text("old\n")
    arguments = ["--tools", "maths,dates", "--root", str(tmp_path)]
    child = pexpect.spawn(
        CHAT[0], [*CHAT[1:], *arguments], env={**environment, "TERM": "xterm"}, dimensions=(24, 80), timeout=240
    )
    try:
        child.expect("Ctrl-D leaves")
        child.expect("> ")
        child.send("What is 15% of 240?\r")
        child.expect("15% of 240 = 36")
        child.expect("prompt tokens, not ")
        child.expect("> ")
        child.send("/why\r")
        child.expect("calculator")
        child.expect("> ")
        child.send("never sent\x03")
        child.send("\x04")
        child.expect(pexpect.EOF)
        child.wait()
        assert child.exitstatus == 0
    finally:
        child.close(force=True)
