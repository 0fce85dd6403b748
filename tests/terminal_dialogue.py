"""Talks to the scripted assistant through a pseudo-terminal: python -m tests.terminal_dialogue FOLDER WIDTH.

A process of its own, since pexpect forks, and a fork of a process with many threads may never reach the new program.
"""

import os
import sys
from pathlib import Path

import pexpect

ROOT = Path(__file__).parents[1]
PROMPT = r">(?: |\x08)"
SLOW = '''
import time

def slow() -> str:
    """Takes its time."""
    time.sleep(60)
    return "late"

slow.read_only = True
'''


def talk(folder: Path, width: int) -> None:
    (folder / "slow.py").write_text(SLOW)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "LORAGEN_AGENTS_DATA": str(folder / "data"),
        "TERM": "xterm",
        "PROMPT_TOOLKIT_NO_CPR": "1",  # this terminal does not answer where its cursor is
    }
    arguments = ["-m", "tests.scripted_terminal", "--tools", f"maths,{folder / 'slow.py'}", "--root", str(folder)]
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


if __name__ == "__main__":
    talk(Path(sys.argv[1]), int(sys.argv[2]))
