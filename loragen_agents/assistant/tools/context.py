"""What the tools work on: one folder, one store and a clock. Holds the folder's border.

Every path that a model gives goes through `Folder.path`: nothing outside the folder is read or written, whatever the
path looks like and wherever a symbolic link leads.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from langchain_core.tools import ToolException

if TYPE_CHECKING:
    from loragen_agents.assistant.tools.store import Store


class ToolError(ToolException):
    """A tool can't do what it was asked to do; the text says why, to the model and to the user.

    Args:
        outside: whether the text names what is there (files, columns, notes), in words that anybody may have chosen.
    """

    def __init__(self, text: str, *, outside: bool = False) -> None:
        super().__init__(text)
        self.outside = outside


@dataclass(frozen=True)
class Context:
    """What tools are given. `now` tells the time here, with its time zone."""

    folder: "Folder"
    store: "Store"
    now: Callable[[], datetime]


class Folder:
    """The one folder that tools may touch."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()

    def path(self, given: str) -> Path:
        """The real path that `given` means, links followed.

        Raises:
            ToolError: it lies outside the folder, or can't be a path.
        """
        text = given.strip().strip("\"'`").removeprefix("@") or "."
        if "\0" in text or any(ord(character) < 32 for character in text):
            raise ToolError(f"{given!r} is not a file name: it holds control characters")
        try:
            # `~` has no meaning here: a file may be called that, and the home folder is outside.
            path = (self.root / text).resolve()
        except (OSError, RuntimeError) as error:
            raise ToolError(f"{given!r} can't be followed: {error}") from error
        if not path.is_relative_to(self.root):
            raise ToolError(f"{given!r} is outside the folder {self.root}; only files inside it can be used")
        return path

    def file(self, given: str) -> Path:
        """The path of a file that is there. A name without its folder or ending is found where only one file has it.

        Raises:
            ToolError: there is no such file, or it is a folder.
        """
        path = self.path(given)
        if path.is_dir():
            raise ToolError(f"{self.name(path)} is a folder, not a file")
        if not path.is_file():
            near = self._near(path)
            hint = f"; there is {', '.join(near)}" if near else ""
            raise ToolError(f"there is no file {self.name(path)}{hint}", outside=bool(near))
        return path

    def directory(self, given: str) -> Path:
        """The path of a folder that is there; words for the current folder mean the root.

        Raises:
            ToolError: there is no such folder.
        """
        path = self.path("." if given.strip().lower() in ("", "here", "current", "this folder", "/", "./") else given)
        if not path.is_dir():
            raise ToolError(f"there is no folder {self.name(path)}")
        return path

    def new(self, given: str) -> Path:
        """The path of a file to be written; its folder must be there.

        Raises:
            ToolError: it is a folder, or its folder is missing.
        """
        path = self.path(given)
        if path.is_dir():
            raise ToolError(f"{self.name(path)} is a folder; give the name of a file")
        if not path.parent.is_dir():
            raise ToolError(f"there is no folder {self.name(path.parent)}")
        return path

    def free(self, path: Path) -> Path:
        """`path`, or the first of `name-2`, `name-3`, ... that nothing has yet."""
        candidate, number = path, 2
        while candidate.exists() or candidate.is_symlink():
            candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
            number += 1
        return candidate

    def name(self, path: Path) -> str:
        """How a path is shown: relative to the root, with forward slashes."""
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else path.name

    def walk(self, start: Path, limit: int = 20_000) -> Iterator[Path]:
        """Files below `start`, sorted, hidden ones and links left out; at most `limit` entries are looked at."""
        seen, folders = 0, [start]
        while folders:
            try:
                entries = sorted(folders.pop().iterdir())
            except OSError:
                continue  # a folder that may not be read holds nothing for us
            below = []
            for entry in entries:
                seen += 1
                if seen > limit:
                    return
                if entry.name.startswith(".") or entry.is_symlink():
                    continue
                if entry.is_dir():
                    below.append(entry)
                elif entry.is_file():
                    yield entry
            folders.extend(reversed(below))

    def _near(self, path: Path) -> list[str]:
        """Up to three files that may be meant: the same name in another folder, or without its ending."""
        wanted = path.name.casefold()
        found = [
            self.name(entry)
            for entry in self.walk(self.root)
            if entry.name.casefold() == wanted or entry.stem.casefold() == wanted
        ]
        return found[:3]
