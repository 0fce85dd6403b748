"""What the assistant keeps between sessions: notes, tasks, reminders and timers, in one SQLite file.

Rows are found by their number or by words from them. Knows nothing of how they are shown. A connection is opened for
each operation, so that tools may run in any thread and two assistants may be open at once.
"""

import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from loragen_agents.assistant.tools.context import ToolError

EntryKind = Literal["note", "task", "reminder", "timer"]

_TABLE = """
CREATE TABLE IF NOT EXISTS entries (
    id INTEGER PRIMARY KEY,
    kind TEXT NOT NULL,
    number INTEGER NOT NULL,
    text TEXT NOT NULL,
    created TEXT NOT NULL,
    due TEXT,
    closed TEXT
)
"""
# Text that names no entry: "the note about milk" means the one that says milk.
_FILLERS = re.compile(r"\b(?:the|my|a|an|note|task|reminder|timer|about|number|no|to|of|for)\b|#", re.IGNORECASE)


@dataclass(frozen=True)
class Entry:
    """One note, task, reminder or timer.

    Attributes:
        number: what the user calls it by; counts up within its kind.
        due: when it is to ring (reminders, timers); None for notes and tasks.
    """

    id: int
    kind: EntryKind
    number: int
    text: str
    created: datetime
    due: datetime | None


class Store:
    """Entries by kind. Closed entries (done, rung) are kept but no longer listed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._open() as connection:
            connection.execute(_TABLE)

    def add(self, kind: EntryKind, text: str, created: datetime, due: datetime | None = None) -> Entry:
        text = " ".join(text.split())
        if not text:
            raise ToolError(f"the {kind} is empty; say what it is about")
        with self._open() as connection:
            (number,) = connection.execute(
                "SELECT COALESCE(MAX(number), 0) + 1 FROM entries WHERE kind = ? AND closed IS NULL", (kind,)
            ).fetchone()
            cursor = connection.execute(
                "INSERT INTO entries (kind, number, text, created, due) VALUES (?, ?, ?, ?, ?)",
                (kind, number, text, created.isoformat(), due.isoformat() if due else None),
            )
        return Entry(int(cursor.lastrowid or 0), kind, number, text, created, due)

    def open_entries(self, kind: EntryKind) -> list[Entry]:
        """What is neither done nor deleted, the next due first, else in the order in which it was added."""
        with self._open() as connection:
            rows = connection.execute(
                "SELECT id, kind, number, text, created, due FROM entries WHERE kind = ? AND closed IS NULL "
                "ORDER BY due IS NULL, due, id",
                (kind,),
            ).fetchall()
        return [_entry(row) for row in rows]

    def find(self, kind: EntryKind, words: str) -> Entry:
        """The one entry that a number, or words, mean.

        Raises:
            ToolError: none or several match; says which there are.
        """
        entries = self.open_entries(kind)
        if not entries:
            raise ToolError(f"there are no {kind}s")
        found = _matching(entries, words)
        if len(found) == 1:
            return found[0]
        listed = "; ".join(f"{entry.number}. {entry.text}" for entry in (found or entries)[:8])
        raise ToolError(f"{'several' if found else 'no'} {kind}s match {words!r}: {listed}", outside=True)

    def search(self, kind: EntryKind, words: str) -> list[Entry]:
        """Entries that hold the words; those that hold all of them if there are any."""
        entries = self.open_entries(kind)
        wanted = _words(words)
        scored = [(sum(word in entry.text.casefold() for word in wanted), entry) for entry in entries]
        best = max((score for score, _ in scored), default=0)
        return [entry for score, entry in scored if score == best and best]

    def close(self, entry: Entry, at: datetime) -> bool:
        """Mark an entry as done or rung; False where that had been done already (by another assistant)."""
        with self._open() as connection:
            cursor = connection.execute(
                "UPDATE entries SET closed = ? WHERE id = ? AND closed IS NULL", (at.isoformat(), entry.id)
            )
        return cursor.rowcount == 1

    def delete(self, entry: Entry) -> None:
        with self._open() as connection:
            connection.execute("DELETE FROM entries WHERE id = ?", (entry.id,))

    def due(self, now: datetime) -> list[Entry]:
        """Reminders and timers whose time has come, closed by this call so that each rings once."""
        waiting = [*self.open_entries("timer"), *self.open_entries("reminder")]
        return [entry for entry in waiting if entry.due and entry.due <= now and self.close(entry, now)]

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            connection = sqlite3.connect(self.path, timeout=5)
        except sqlite3.Error as error:
            raise ToolError(f"{self.path} can't be opened: {error}") from error
        try:
            with connection:  # commits, or rolls back on an error
                yield connection
        except sqlite3.Error as error:
            raise ToolError(f"{self.path} can't be used: {error}") from error
        finally:
            connection.close()


def _entry(row: Sequence[str | int | None]) -> Entry:
    identifier, kind, number, text, created, due = row
    return Entry(
        int(identifier or 0),
        kind,  # type: ignore[arg-type]
        int(number or 0),
        str(text),
        datetime.fromisoformat(str(created)),
        datetime.fromisoformat(str(due)) if due else None,
    )


def _words(text: str) -> list[str]:
    plain = _FILLERS.sub(" ", text).casefold()
    return re.findall(r"\w+", plain) or re.findall(r"\w+", text.casefold())


def _matching(entries: list[Entry], words: str) -> list[Entry]:
    wanted = _words(words)
    if not wanted:
        return entries
    if len(wanted) == 1 and wanted[0].isdigit():
        numbered = [entry for entry in entries if entry.number == int(wanted[0])]
        if numbered:
            return numbered
    return [entry for entry in entries if all(word in entry.text.casefold() for word in wanted)]
