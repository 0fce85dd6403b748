"""The whole program in a pseudo-terminal, from the command line to the exit code, on a scripted model."""

import os
import sys
from pathlib import Path

import pytest

pexpect = pytest.importorskip("pexpect", reason="needs a pseudo-terminal")

ROOT = Path(__file__).parents[2]
PROMPT = r">(?: |\x08)"
SLOW = '''
import time

def slow() -> str:
    """Takes its time."""
    time.sleep(60)
    return "late"

slow.read_only = True
'''


@pytest.mark.parametrize("width", [80, 120])
def test_a_dialogue_from_the_first_prompt_to_the_exit(tmp_path, width):
    (tmp_path / "slow.py").write_text(SLOW)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "LORAGEN_AGENTS_DATA": str(tmp_path / "data"),
        "TERM": "xterm",
        "PROMPT_TOOLKIT_NO_CPR": "1",  # this terminal does not answer where its cursor is
    }
    arguments = ["-m", "tests.scripted_terminal", "--tools", f"maths,{tmp_path / 'slow.py'}", "--root", str(tmp_path)]
    child = pexpect.spawn(sys.executable, arguments, env=environment, dimensions=(24, width), timeout=120, cwd=ROOT)
    try:
        child.expect("3 tools, files in")
        child.expect("Ctrl-D leaves")
        child.expect(PROMPT)
        child.send("What is 15% of 240?\r")
        child.expect("15% of 240 = 36")
        child.expect("It is 36.")
        child.expect("31 prompt tokens, not 931")
        child.expect(PROMPT)
        child.send("Be slow\r")
        child.expect(rb"(?:\xe2\x97\x8f|\*) [^\r\n]*slow")  # the call, not the echo of the request
        child.sendintr()
        child.expect("Interrupted.")
        child.expect(PROMPT)
        child.send("/why\r")
        child.expect("calculator")
        child.expect(PROMPT)
        child.sendeof()
        child.expect(pexpect.EOF)
        child.wait()
        assert child.exitstatus == 0
    finally:
        child.close(force=True)
