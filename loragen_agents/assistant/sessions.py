"""Where the assistant keeps what outlives a session: conversations, the line history, and the store of its tools.

One folder, the user's data folder for this program (`LORAGEN_AGENTS_DATA` names another one). Conversations are JSON
files, written whole after each turn. Knows nothing of models and terminals.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from loragen_agents.assistant.turns import Turn
from loragen_agents.errors import DataError
from loragen_agents.support.files import replacing

_FORMAT = 1
# The newest ones are kept; those that a user has saved under a name are never removed.
KEPT_SESSIONS = 50


def data_folder() -> Path:
    """The folder for the user's data."""
    given = os.environ.get("LORAGEN_AGENTS_DATA")
    if given:
        return Path(given).expanduser()
    from platformdirs import user_data_path

    return user_data_path("loragen-agents")


@dataclass
class Session:
    """A conversation and the file that it is kept in."""

    path: Path
    system: str
    turns: list[Turn]

    def save(self) -> None:
        """Write the file.

        Raises:
            OSError: the folder can't be written.
        """
        content = {"format": _FORMAT, "system": self.system, "turns": [turn.to_json() for turn in self.turns]}
        with replacing(self.path) as temporary:
            temporary.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


class Sessions:
    """The conversations in a folder: one file a session, and the user's named ones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "sessions"

    def new(self, system: str = "") -> Session:
        """A session of its own file, named after the time."""
        stamp = f"{datetime.now():%Y-%m-%d-%H%M%S}-{os.getpid()}"
        return Session(self.folder / f"{stamp}.json", system, [])

    def last(self) -> Session | None:
        """The session that was written last; None where there is none that can be read."""
        for path in self._by_age():
            try:
                return self.read(path)
            except DataError:
                continue
        return None

    def save_as(self, name: str, system: str, turns: Sequence[Turn]) -> Path:
        """Keep a conversation under a name.

        Raises:
            DataError: the name is no plain file name.
            OSError: the folder can't be written.
        """
        session = Session(self._named(name), system, list(turns))
        session.save()
        return session.path

    def load(self, name: str) -> Session:
        """The conversation that was kept under a name.

        Raises:
            DataError: there is none, or its file is damaged.
        """
        path = self._named(name)
        if not path.is_file():
            raise DataError(f"there is no saved conversation {name!r}; there is {', '.join(self.names()) or 'none'}")
        return self.read(path)

    def names(self) -> list[str]:
        """The names of saved conversations."""
        return sorted(path.stem for path in (self.folder / "saved").glob("*.json"))

    def read(self, path: Path) -> Session:
        """Read a session's file.

        Raises:
            DataError: it can't be read or is damaged.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != _FORMAT:
                raise ValueError(f"format {content['format']}, expected {_FORMAT}")
            return Session(path, str(content["system"]), [Turn.from_json(turn) for turn in content["turns"]])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} can't be read as a conversation: {error}") from error

    def prune(self) -> None:
        """Remove the oldest sessions beyond `KEPT_SESSIONS`."""
        for path in self._by_age()[KEPT_SESSIONS:]:
            path.unlink(missing_ok=True)

    def _by_age(self) -> list[Path]:
        paths = [path for path in self.folder.glob("*.json") if not path.name.startswith(".")]
        return sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True)

    def _named(self, name: str) -> Path:
        if not re.fullmatch(r"[\w][\w .-]{0,80}", name):
            raise DataError(f"{name!r} can't be the name of a conversation; use letters, digits, dots and dashes")
        return self.folder / "saved" / f"{name}.json"
