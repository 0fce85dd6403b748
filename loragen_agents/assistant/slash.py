"""The slash commands of the dialogue; `/help` lists them from their docstrings."""

import asyncio
import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from loragen_agents.assistant.agent import HISTORY_TURNS
from loragen_agents.assistant.loading import Loading, warm_up
from loragen_agents.assistant.permission import asks_first
from loragen_agents.assistant.scripts import on_interrupt
from loragen_agents.assistant.tools.catalog import AssistantTool
from loragen_agents.errors import LoRAGenError

if TYPE_CHECKING:
    from loragen_agents.assistant.dialogue import Dialogue


class SlashCommands:
    """Runs `/command words`. Each public method is a command; its docstring's first line is its help."""

    def __init__(self, dialogue: "Dialogue") -> None:
        self._dialogue = dialogue
        names = [name for name, _ in inspect.getmembers(type(self), inspect.isfunction)]
        hidden = {"run", "meanings", "words"}
        self._names = [name for name in names if not name.startswith("_") and name not in hidden]
        self._names.sort(key=_ORDER.index)

    def meanings(self) -> dict[str, str]:
        """Each command and what it does."""
        return {f"/{name}": (inspect.getdoc(getattr(self, name)) or "").split("\n")[0] for name in self._names}

    def words(self) -> dict[str, Callable[[], Iterable[str]]]:
        """What can follow a command."""
        return {"/tools": lambda: ["on", "off", *self._groups(), *self._tool_names()], "/load": self._saved}

    async def run(self, line: str) -> bool:
        """Run a command line; False when the user leaves."""
        name, _, words = line[1:].partition(" ")
        if name not in self._names:
            self._dialogue.screen.line(f"There is no command /{name}; /help lists them.", "red")
            return True
        try:
            return await getattr(self, name)(words.strip()) is not False
        except (LoRAGenError, OSError) as error:
            self._dialogue.screen.line(str(error), "red")
            return True

    async def help(self, words: str) -> None:
        """list the commands"""
        self._dialogue.screen.rows(("Command", "What it does"), list(self.meanings().items()))
        self._dialogue.screen.line("Tab completes commands, and files behind an @. Ctrl-R searches the history.", "dim")

    async def tools(self, words: str) -> None:
        """show the tools, or switch them: /tools off images, /tools on battery"""
        dialogue = self._dialogue
        switch, *names = words.split() or [""]
        if switch in ("on", "off"):
            self._switch(switch == "on", names)
            return
        on = {tool.name for tool in dialogue.assistant.tools}
        rows = [
            (_group(tool), tool.name, "on" if tool.name in on else "off", "asks" if asks_first(tool) else "")
            for tool in dialogue.all_tools
        ]
        dialogue.screen.rows(("Group", "Tool", "", ""), rows)

    async def system(self, words: str) -> None:
        """set a system text (compressed with the tools); without one, show it"""
        dialogue = self._dialogue
        if not words:
            dialogue.screen.line(dialogue.assistant.system or "There is no system text.")
            return
        dialogue.assistant.system = "" if words == "off" else words
        self._specialize_again()

    async def why(self, words: str) -> None:
        """how likely each tool was in the last turn"""
        turn = self._last()
        if turn is None:
            return
        if not turn.figures.choices:
            self._dialogue.screen.line("No tool was scored in the last turn.")
        for number, choice in enumerate(turn.figures.choices, 1):
            called = choice["tool_call_probability"]
            self._dialogue.screen.line(f"Step {number}: some tool {called:.0%}, an answer {1 - called:.0%}")
            mark = "#" if self._dialogue.screen.ascii else "\u2588"
            rows = [
                (name, f"{share:.0%}", mark * round(20 * share)) for name, share in choice["tool_probabilities"].items()
            ]
            self._dialogue.screen.rows(("Tool", "Share", ""), rows)

    async def compare(self, words: str) -> None:
        """the last turn's first step again, with the definitions in the prompt"""
        dialogue = self._dialogue
        if self._last() is None or not await dialogue.ready():
            return
        assistant = dialogue.assistant
        arguments = (assistant.model, list(assistant.tools), assistant.system, assistant.turns, HISTORY_TURNS)
        work = asyncio.ensure_future(asyncio.to_thread(dialogue.compare, *arguments))
        with dialogue.screen.console.status("Decoding both ..."), on_interrupt(work.cancel):
            try:
                ours, theirs = await work
            except asyncio.CancelledError:
                dialogue.screen.line("Interrupted.", "yellow")
                return
        rows = [
            ("step", ours.step, theirs.step),
            ("prompt tokens", f"{ours.prompt_tokens:,}", f"{theirs.prompt_tokens:,}"),
            ("first token", f"{ours.first_token_ms:.0f} ms", f"{theirs.first_token_ms:.0f} ms"),
            ("whole step", f"{ours.step_ms:.0f} ms", f"{theirs.step_ms:.0f} ms"),
        ]
        dialogue.screen.rows(("", ours.title, theirs.title), rows)

    async def undo(self, words: str) -> None:
        """take the last turn out of the conversation (what tools did stays done)"""
        if self._last() is not None:
            turn = self._dialogue.assistant.turns.pop()
            self._dialogue.keep()
            self._dialogue.screen.line(f"Taken back: {turn.request}")

    async def retry(self, words: str) -> None:
        """run the last request again"""
        if self._last() is not None:
            turn = self._dialogue.assistant.turns.pop()
            await self._dialogue.request(turn.request)

    async def save(self, words: str) -> None:
        """keep the conversation under a name: /save trip"""
        dialogue = self._dialogue
        path = dialogue.sessions.save_as(words or "conversation", dialogue.assistant.system, dialogue.assistant.turns)
        dialogue.screen.line(f"Kept in {path}")

    async def load(self, words: str) -> None:
        """go on with a conversation that was kept: /load trip"""
        dialogue = self._dialogue
        if not words:
            dialogue.screen.line(f"Kept are: {', '.join(self._saved()) or 'none'}")
            return
        kept = dialogue.sessions.load(words)
        changed = kept.system != dialogue.assistant.system
        dialogue.assistant.system = kept.system
        dialogue.assistant.turns[:] = kept.turns
        dialogue.screen.line(f"Loaded {words}, {len(kept.turns)} turns.")
        if changed:
            self._specialize_again()

    async def reset(self, words: str) -> None:
        """forget the conversation (notes and files stay)"""
        self._dialogue.assistant.turns.clear()
        self._dialogue.session = self._dialogue.sessions.new(self._dialogue.assistant.system)
        self._dialogue.screen.line("A new conversation.")

    async def quit(self, words: str) -> bool:
        """leave"""
        return False

    def _last(self) -> Any:
        turns = self._dialogue.assistant.turns
        if not turns:
            self._dialogue.screen.line("There is no turn yet.")
        return turns[-1] if turns else None

    def _switch(self, on: bool, names: list[str]) -> None:
        dialogue = self._dialogue
        wanted = {tool.name for tool in dialogue.all_tools if tool.name in names or _group(tool) in names}
        unknown = [name for name in names if name not in self._tool_names() and name not in self._groups()]
        if unknown or not names:
            given = ", ".join(unknown) or "nothing"
            dialogue.screen.line(f"{given} is no tool or group; the groups are {', '.join(self._groups())}.", "red")
            return
        now = {tool.name for tool in dialogue.assistant.tools}
        kept = now | wanted if on else now - wanted
        if not kept:
            dialogue.screen.line("One tool at least has to stay on.", "red")
            return
        dialogue.assistant.tools = [tool for tool in dialogue.all_tools if tool.name in kept]
        dialogue.screen.line(f"{len(kept)} of {len(dialogue.all_tools)} tools are on.")
        self._specialize_again()

    def _specialize_again(self) -> None:
        """Make the model ready for other tools or another system text, behind the prompt."""
        dialogue = self._dialogue
        before, tools, system = dialogue.loading, list(dialogue.assistant.tools), dialogue.assistant.system
        loop = asyncio.get_running_loop()

        def make() -> Any:
            model = asyncio.run_coroutine_threadsafe(before.model(), loop).result()
            warm_up(model, tools, system)
            return model

        dialogue.loading = Loading(make)

    def _groups(self) -> list[str]:
        return list(dict.fromkeys(_group(tool) for tool in self._dialogue.all_tools))

    def _tool_names(self) -> list[str]:
        return [tool.name for tool in self._dialogue.all_tools]

    def _saved(self) -> list[str]:
        return self._dialogue.sessions.names()


_ORDER = ["help", "tools", "system", "why", "compare", "undo", "retry", "save", "load", "reset", "quit"]


def _group(tool: Any) -> str:
    return tool.group if isinstance(tool, AssistantTool) else "yours"
