"""The whole program in a pseudo-terminal, from the command line to the exit code, on a scripted model."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pexpect", reason="needs a pseudo-terminal")


def test_a_dialogue_from_the_first_prompt_to_the_exit(tmp_path):
    """In a narrow terminal; what other widths change is seen in test_assistant_dialogue.py, without a process."""
    command = [sys.executable, "-m", "tests.terminal_dialogue", str(tmp_path), "60"]
    talk = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=400)
    assert talk.returncode == 0, talk.stderr[-4000:]
