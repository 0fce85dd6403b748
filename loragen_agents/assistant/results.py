"""What a tool gives back: a short text for the model, and the same thing in full as it is shown to the user.

Plain values. Knows neither tools nor terminals.
"""

from dataclasses import dataclass
from typing import Any

# Characters of a result that the model reads. Its context is short, and the user sees the whole result anyway.
MODEL_CHARACTERS = 1200


@dataclass(frozen=True)
class Table:
    """Rows under column headings. Values are shown with `str`."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Document:
    """A text as it stands in a file. `markdown`: whether it is shown as Markdown."""

    text: str
    markdown: bool = False


@dataclass(frozen=True)
class Result:
    """What a tool found or did.

    Attributes:
        text: for the model: one or few sentences, or the words that were asked for.
        shown: the whole of it for the user, where that is more than `text`.
        outside: whether it holds words from outside (in files, their names, notes, servers), which may try to give
            orders.
    """

    text: str
    shown: Table | Document | None = None
    outside: bool = False

    @property
    def for_model(self) -> str:
        """The text as the model reads it, cut where it is too long."""
        if len(self.text) <= MODEL_CHARACTERS:
            return self.text
        return f"{self.text[:MODEL_CHARACTERS].rstrip()} ... ({len(self.text)} characters in all)"


def table_result(
    summary: str, columns: tuple[str, ...], rows: list[tuple[Any, ...]], *, outside: bool = False
) -> Result:
    """A result that is a table: the model reads the summary and the rows as lines."""
    lines = [", ".join(str(value) for value in row if str(value)) for row in rows]
    return Result("\n".join([summary, *lines]), Table(columns, tuple(rows)), outside)
