"""The one place that writes to the terminal. Nothing that came from outside can steer it.

Text from tools, models, files and errors may hold escape sequences or Rich markup: it goes through `visible`, and both
consoles have markup and emoji codes switched off.
"""

import json
import sys
import unicodedata
from typing import Any

from rich.console import Console
from rich.text import Text

# Results go to stdout, so that they can be piped; what is said about the work goes to stderr.
results = Console(markup=False, emoji=False, highlight=False)
messages = Console(stderr=True, markup=False, emoji=False, highlight=False)

# Characters without a glyph that reorder or hide what stands beside them; Cc are the control characters.
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
# Joiners that emoji and several scripts need.
_KEPT = {"\n", "\t", "\u200c", "\u200d"}


def visible(text: str) -> str:
    """Write control characters, direction marks and lone surrogates as escapes (`\\x1b`); line ends and tabs stay."""
    if text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode("ascii")
        if character not in _KEPT and unicodedata.category(character) in _HIDDEN
        else character
        for character in text
    )


def say(text: str = "", *, style: str = "") -> None:
    """Print a line of the result to stdout, never broken into several."""
    results.print(Text(visible(text), style=style), soft_wrap=True)


def complain(text: str) -> None:
    """Print one paragraph about what went wrong to stderr."""
    paragraph = Text("Error: ", style="bold red")
    paragraph.append(visible(" ".join(text.split())), style="none")
    messages.print(paragraph, soft_wrap=not messages.is_terminal)


def print_json(value: Any) -> None:
    """Print `value` as JSON to stdout. ASCII, so that no terminal takes a part of it for an escape sequence."""
    json.dump(value, sys.stdout, indent=2, ensure_ascii=True)
    sys.stdout.write("\n")
