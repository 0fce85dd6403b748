"""What the assistant shows: the one place that turns calls, results and answers into lines on a terminal.

Everything from models, tools and files goes through `visible` before Rich sees it, so no text can move the cursor, set
colours or stand for markup. Without a terminal the same lines come out plain.
"""

import json
import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.markdown import Markdown
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from loragen_agents.assistant.agent import AnswerPiece, CallBegins, CallEnds, Event
from loragen_agents.assistant.results import Document, Table
from loragen_agents.assistant.turns import ToolCall, Turn
from loragen_agents.support.console import visible

MAX_LINES = 60
_INDENT = 2


def plain_characters(console: Console) -> bool:
    """Whether the terminal should get ASCII alone: its encoding has no more, or its locale is C."""
    locale = os.environ.get("LC_ALL") or os.environ.get("LC_CTYPE") or os.environ.get("LANG") or ""
    return locale in ("C", "POSIX") or not console.encoding.lower().startswith("utf")


class Screen:
    """Shows one conversation on a console."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.ascii = plain_characters(console)
        self.mark, self.dot = ("*", "-") if self.ascii else ("\u25cf", "\u00b7")
        self._answer = _Wrapper(self)

    # A turn, as it happens

    def show(self, event: Event) -> None:
        if isinstance(event, AnswerPiece):
            self._answer.feed(event.text)
        elif isinstance(event, CallBegins):
            self._answer.close()
            self._call(event.call)
        elif isinstance(event, CallEnds):
            self._result(event.call)

    def turn_ends(self, turn: Turn, *, figures: bool = True) -> None:
        self._answer.close()
        if turn.reason:
            self.line(turn.reason, "yellow" if turn.ending in ("stopped", "interrupted") else "red")
        elif not turn.answer and not turn.calls:
            self.line("The model had nothing to say.", "yellow")
        if figures and turn.figures.prompt_tokens:
            self.line(self.figures_line(turn), "dim")

    def figures_line(self, turn: Turn) -> str:
        facts = turn.figures
        full = facts.prompt_tokens + facts.definition_tokens
        parts = (
            f"{facts.prompt_tokens} prompt tokens, not {full:,}",
            f"first token {facts.first_token_ms:.0f} ms",
            f"turn {_milliseconds(facts.turn_ms)}",
        )
        # A number and its unit stay on one line.
        whole = (part.replace(" ", "\u00a0") for part in parts)
        return _wrapped(f" {self.dot} ".join(whole), self.console.width - _INDENT).replace("\u00a0", " ")

    # Anything else

    def line(self, text: str, style: str = "") -> None:
        """A line of our own or of anybody's, wrapped at words."""
        self.put(Text(visible(text), style=style))

    def question(self, text: str) -> str:
        """A question for the line editor, which would break it inside words; there is room for a short reply."""
        indent = " " * (_INDENT + 2)
        return _wrapped(visible(text), self.console.width - 8, indent) + " "

    def put(self, renderable: RenderableType, indent: int = _INDENT) -> None:
        self.console.print(Padding(renderable, (0, 0, 0, indent), expand=False))

    def rows(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, ratio: int | None = None) -> None:
        """A table; numbers stand at the right. `ratio`: the column that takes the room that is left."""
        table = RichTable(box=box.ASCII if self.ascii else box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for place, column in enumerate(columns):
            numbers = all(isinstance(row[place], int | float) for row in rows if row[place] is not None)
            table.add_column(
                Text(visible(column)), justify="right" if numbers else "left", overflow="fold",
                ratio=1 if place == ratio else None,
            )  # fmt: skip
        for row in rows:
            table.add_row(*(Text(visible("" if value is None else str(value))) for value in row))
        self.put(table, _INDENT + 2)

    def _call(self, call: ToolCall) -> None:
        text = Text(f"{self.mark} ", style="cyan")
        text.append(visible(call.tool), style="bold cyan")
        for name, value in call.arguments.items():
            shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            text.append(f"  {visible(name)}: ", style="dim")
            text.append(visible(_shortened(shown, max(20, min(60, self.console.width - 24)))), style="cyan")
        self.put(text)

    def _result(self, call: ToolCall) -> None:
        took = f"{_milliseconds(call.milliseconds)}"
        if call.refused:
            return  # the turn's end says so
        if call.failed:
            self._aside(Text(f"Error: {visible(call.text)}", style="red"), took)
        elif isinstance(call.shown, Table):
            self.rows(call.shown.columns, call.shown.rows)
            self._counted(len(call.shown.rows), "row", took)
        elif isinstance(call.shown, Document):
            self._document(call.shown, took)
        else:
            self._aside(Text(visible(_cut(call.text))), took)

    def _aside(self, text: Text, took: str) -> None:
        """A short result with its time behind it."""
        text.append(f"  {took}", style="dim")
        self.put(text, _INDENT + 2)

    def _document(self, document: Document, took: str) -> None:
        text = visible(_cut(document.text))
        # Rich would make links of Markdown's into terminal sequences; their targets come from outside.
        shown = Markdown(text, hyperlinks=False) if document.markdown and not self.ascii else Text(text)
        self.put(shown, _INDENT + 2)
        lines = document.text.count("\n") + 1 if document.text else 0
        self._counted(lines, "line", took)

    def _counted(self, number: int, word: str, took: str) -> None:
        self.put(Text(f"{number} {word if number == 1 else f'{word}s'}, {took}", style="dim"), _INDENT + 2)


class _Wrapper:
    """Writes an answer as it comes, broken at words: a word is written once it is whole."""

    def __init__(self, screen: Screen) -> None:
        self.screen = screen
        self.column, self.held = 0, ""

    def feed(self, text: str) -> None:
        self.held += visible(text)
        *whole, self.held = _split_after_space(self.held)
        for word in whole:
            self._write(word)

    def close(self) -> None:
        if self.held:
            self._write(self.held)
        if self.column:
            self.screen.console.print()
        self.column, self.held = 0, ""

    def _write(self, word: str) -> None:
        console = self.screen.console
        width = len(word.rstrip())
        if self.column and self.column + width > console.width - 1:
            console.print()
            self.column = 0
        if not self.column:
            console.print(" " * _INDENT, end="")
            self.column = _INDENT
            word = word if "\n" in word else word.lstrip(" ")
        console.print(Text(word.rstrip("\n")), end="", soft_wrap=True)
        self.column += len(word)
        for _ in range(word.count("\n")):
            console.print()
            self.column = 0


def _split_after_space(text: str) -> list[str]:
    """Words with the space behind them; the last item is the word that has not ended yet (maybe empty)."""
    words, start = [], 0
    for place, character in enumerate(text):
        if character in " \n":
            words.append(text[start : place + 1])
            start = place + 1
    return [*words, text[start:]]


def call_json(call: ToolCall) -> dict[str, Any]:
    """A call as `--json` prints it."""
    whole: Mapping[str, Any] = {}
    if isinstance(call.shown, Table):
        whole = {"columns": list(call.shown.columns), "rows": [list(row) for row in call.shown.rows]}
    elif isinstance(call.shown, Document):
        whole = {"document": call.shown.text}
    return {"kind": "call", **call.to_json(), **whole}


def turn_json(turn: Turn) -> dict[str, Any]:
    """The end of a turn as `--json` prints it."""
    whole = turn.to_json()
    return {"kind": "answer", **{name: whole[name] for name in ("answer", "ending", "reason", "figures")}}


def _wrapped(text: str, width: int, indent: str = "") -> str:
    return textwrap.fill(text, max(20, width), initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _shortened(text: str, length: int) -> str:
    folded = " ".join(text.split())
    return folded if len(folded) <= length else f"{folded[: length - 3]}..."


def _cut(text: str) -> str:
    lines = text.split("\n")
    if len(lines) <= MAX_LINES:
        return text
    return "\n".join([*lines[:MAX_LINES], f"... and {len(lines) - MAX_LINES} lines more"])


def _milliseconds(value: float) -> str:
    return f"{value:.1f} ms" if value < 10 else f"{value:.0f} ms" if value < 10_000 else f"{value / 1000:.1f} s"
