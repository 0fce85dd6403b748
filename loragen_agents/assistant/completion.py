"""What the line editor offers: slash commands, the names that go with them, and files behind an `@`."""

from collections.abc import Callable, Iterable, Mapping

from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document

from loragen_agents.assistant.tools.context import Folder, ToolError

MAX_FILES = 200


class AssistantCompleter(Completer):
    """Completes the line before the cursor.

    Args:
        commands: command (with its slash) to what it does.
        words: what can follow a command, asked anew each time: saved conversations, tool names.
    """

    def __init__(
        self, commands: Mapping[str, str], words: Mapping[str, Callable[[], Iterable[str]]], folder: Folder
    ) -> None:
        self.commands, self.words, self.folder = commands, words, folder

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        line = document.text_before_cursor
        word = line.rsplit(maxsplit=1)[-1] if line and not line[-1].isspace() else ""
        if word.startswith("@"):
            yield from self._files(word[1:])
        elif line.startswith("/") and " " not in line:
            for command, meaning in self.commands.items():
                if command.startswith(line):
                    yield Completion(command, start_position=-len(line), display_meta=meaning)
        elif line.startswith("/"):
            command = line.split(maxsplit=1)[0]
            for name in self.words.get(command, list)():
                if name.casefold().startswith(word.casefold()):
                    yield Completion(name, start_position=-len(word))

    def _files(self, start: str) -> Iterable[Completion]:
        """Files and folders in the folder that `start` names so far; hidden ones and links out of the root left out."""
        folder, _, name = start.rpartition("/")
        try:
            entries = sorted(self.folder.directory(folder).iterdir())[:MAX_FILES]
        except (ToolError, OSError):
            return
        for entry in entries:
            if entry.name.startswith(".") or not entry.name.casefold().startswith(name.casefold()):
                continue
            if entry.resolve().is_relative_to(self.folder.root):
                shown = f"{entry.name}/" if entry.is_dir() else entry.name
                yield Completion(shown, start_position=-len(name))
