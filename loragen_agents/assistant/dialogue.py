"""The dialogue: a line editor, turns, slash commands, and timers that ring in between.

Ctrl-C stops a turn or empties the line, Ctrl-D leaves. What is shown goes through the `Screen`.
"""

import asyncio
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from langchain_core.tools import BaseTool
from prompt_toolkit import PromptSession
from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.patch_stdout import patch_stdout

from loragen_agents.assistant.agent import Assistant
from loragen_agents.assistant.compare import Compare
from loragen_agents.assistant.completion import AssistantCompleter
from loragen_agents.assistant.loading import Loading
from loragen_agents.assistant.permission import Reply
from loragen_agents.assistant.preview import preview
from loragen_agents.assistant.screen import Screen
from loragen_agents.assistant.scripts import interruptible, on_interrupt
from loragen_agents.assistant.sessions import Session, Sessions
from loragen_agents.assistant.slash import SlashCommands
from loragen_agents.assistant.tools.store import Entry
from loragen_agents.assistant.turns import Turn
from loragen_agents.errors import LoRAGenError

_SECONDS_BETWEEN_LOOKS = 1.0


@dataclass
class Dialogue:
    """A conversation at the terminal.

    Attributes:
        assistant: its tools are those that are switched on; the model comes from `loading`.
        all_tools: every tool that can be switched on.
    """

    assistant: Assistant
    all_tools: list[BaseTool]
    loading: Loading
    screen: Screen
    sessions: Sessions
    session: Session
    compare: Compare
    history_file: Path | None = None

    def __post_init__(self) -> None:
        self.commands = SlashCommands(self)
        history: History = InMemoryHistory()
        if self.history_file is not None:
            self.history_file.parent.mkdir(parents=True, exist_ok=True)
            history = FileHistory(str(self.history_file))
        self._editor: PromptSession[str] = PromptSession(
            history=history,
            auto_suggest=AutoSuggestFromHistory(),
            completer=AssistantCompleter(
                self.commands.meanings(), self.commands.words(), self.assistant.context.folder
            ),
            complete_while_typing=False,
        )
        self._question: PromptSession[str] = PromptSession()
        self.assistant.permissions.ask = self.ask

    async def run(self, first: str | None = None) -> int:
        """Talk until the user leaves. `first`: a request that is run before the first prompt."""
        self._greet()
        ringing = asyncio.ensure_future(self._ring())
        try:
            if first is not None:
                self.screen.line(f"> {first}", "bold")
                await self.request(first)
            while (line := await self._line()) is not None:
                if line.startswith("/"):
                    if not await self.commands.run(line):
                        break
                elif line:
                    await self.request(line)
        finally:
            ringing.cancel()
        return 0

    async def request(self, text: str) -> None:
        """One turn, from the user's words to the kept session."""
        try:
            if not await self.ready():
                return
        except (LoRAGenError, OSError) as error:
            self.screen.line(f"The model can't be loaded: {error}", "red")
            return
        with quiet_keyboard():
            turn = await interruptible(self.assistant, self.assistant.turn(self._without_marks(text), self.screen.show))
        self.screen.turn_ends(turn)
        self.screen.console.print()
        self.keep()

    async def ready(self) -> bool:
        """Wait for the model; False where the user did not want to."""
        if not self.loading.done:
            waiting = asyncio.ensure_future(self.loading.model())
            with (
                self.screen.console.status("Getting the model ready for these tools ..."),
                quiet_keyboard(),
                on_interrupt(waiting.cancel),
            ):
                try:
                    await waiting
                except asyncio.CancelledError:
                    self.screen.line("Interrupted; the model goes on loading.", "yellow")
                    return False
        self.assistant.model = await self.loading.model()
        return True

    def keep(self) -> None:
        """Write the session's file."""
        self.session.system, self.session.turns = self.assistant.system, self.assistant.turns
        try:
            self.session.save()
        except OSError as error:
            self.screen.line(f"This conversation can't be kept: {error}", "yellow")

    async def ask(self, tool: BaseTool, arguments: dict[str, Any], why: str) -> Reply:
        """Ask about a call that changes something; anything but a clear yes is a no."""
        if why:
            self.screen.line(f"Asked because {why}.", "yellow")
        question = self.screen.question(f"Run {tool.name}? [y]es, [n]o, [a]lways, [s]how what it would do:")
        while True:
            try:
                reply = await self._question.prompt_async(question)
            except (EOFError, KeyboardInterrupt):
                return "no"
            word = reply.strip().lower()
            if word in ("s", "show"):
                self.screen.line(preview(self.assistant.context, tool.name, arguments), "magenta")
            elif word in ("y", "yes"):
                return "yes"
            elif word in ("a", "always"):
                return "always"
            elif word in ("n", "no", ""):
                return "no"

    async def _line(self) -> str | None:
        """The user's next line; None when they leave."""
        while True:
            try:
                with patch_stdout(raw=True):
                    return (await self._editor.prompt_async("> ")).strip()
            except KeyboardInterrupt:
                continue
            except EOFError:
                return None

    async def _ring(self) -> None:
        """Say so when a timer or reminder is due."""
        context = self.assistant.context
        while True:
            for entry in context.store.due(context.now()):
                self._say_due(entry)
            await asyncio.sleep(_SECONDS_BETWEEN_LOOKS)

    def _say_due(self, entry: Entry) -> None:
        what = "Timer" if entry.kind == "timer" else "Reminder"
        self.screen.line(f"{what}: {entry.text}", "bold magenta")

    def _greet(self) -> None:
        count, root = len(self.assistant.tools), self.assistant.context.folder.root
        self.screen.line(f"{count} tools, files in {_shortened(root)}", "dim")
        self.screen.line("/help says more, Ctrl-D leaves", "dim")
        if self.assistant.turns:
            self.screen.line(f"Going on with a conversation of {_turns(self.assistant.turns)}.", "dim")

    def _without_marks(self, text: str) -> str:
        """The request without the `@` in front of files, which only help the line editor."""
        folder = self.assistant.context.folder

        def plain(match: re.Match[str]) -> str:
            return match[1] if (folder.root / match[1]).exists() else match[0]

        return re.sub(r"(?<!\S)@(\S+)", plain, text)


@contextmanager
def quiet_keyboard() -> Iterator[None]:
    """Hide what is typed while a turn runs; it is there for the next line. Without a terminal, nothing changes."""
    try:
        import termios
    except ImportError:  # Windows
        yield
        return
    if sys.stdin is None or not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    quiet = list(before)
    quiet[3] = before[3] & ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _turns(turns: list[Turn]) -> str:
    return "1 turn" if len(turns) == 1 else f"{len(turns)} turns"


def _shortened(path: Path) -> str:
    home = Path.home()
    return f"~/{path.relative_to(home).as_posix()}" if path != home and path.is_relative_to(home) else str(path)
