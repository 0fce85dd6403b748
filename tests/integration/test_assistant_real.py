"""The assistant on the embedded model. What the model chooses is the benchmark's question (`bench calls --tools
assistant --calls everyday`); the pseudo-terminal is the unit tests'."""

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
