"""Which calls may run: those that change something ask first.

The rule, whatever the model was talked into: a tool that changes or deletes runs only when the user says so. In a turn
in which text from outside (a file or its name, a note, a server) has been read, tools that add something (notes,
timers, pictures) ask as well, and an earlier "always" does not count: what such a text asks for is asked about. Tools
that were not made for the assistant ask unless they say that they only read.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from langchain_core.tools import BaseTool

from loragen_agents.assistant.tools.catalog import AssistantTool

Reply = Literal["yes", "no", "always"]
Decision = Literal["run", "refuse", "pretend"]
# Asks the user about a call; the last argument says why an "always" does not count, or is empty.
Ask = Callable[[BaseTool, dict[str, Any], str], Awaitable[Reply]]


@dataclass
class Permissions:
    """What the user allows.

    Attributes:
        ask: puts the question; None where nobody can be asked (scripts), which means no.
        yes: every call runs without a question.
        dry_run: calls that would ask are not run; the user sees what they would do.
    """

    ask: Ask | None = None
    yes: bool = False
    dry_run: bool = False
    always: set[str] = field(default_factory=set)

    async def decide(self, tool: BaseTool, arguments: dict[str, Any], *, outside_text: bool) -> Decision:
        """Whether a call runs. `outside_text`: text from outside was read in this turn or the last."""
        if not asks_first(tool) and not (outside_text and isinstance(tool, AssistantTool) and tool.adds):
            return "run"
        if self.dry_run:
            return "pretend"
        if self.yes or (tool.name in self.always and not outside_text):
            return "run"
        if self.ask is None:
            return "refuse"
        again = tool.name in self.always or not asks_first(tool)
        why = "text that others may have written was read in this turn or the last" if again else ""
        reply = await self.ask(tool, arguments, why)
        if reply == "always":
            self.always.add(tool.name)
        return "refuse" if reply == "no" else "run"


def asks_first(tool: BaseTool) -> bool:
    """Whether calls of `tool` need the user's yes.

    Tools of others ask unless they are marked as reading only: `metadata={"read_only": True}`, or MCP's `readOnlyHint`,
    which is the word of a server that the user has chosen.
    """
    if isinstance(tool, AssistantTool):
        return tool.asks
    metadata = tool.metadata or {}
    return not (metadata.get("read_only") is True or metadata.get("readOnlyHint") is True)


def brings_outside_text(tool: BaseTool) -> bool:
    """Whether everything that `tool` says comes from outside, as with tools that are not the assistant's own."""
    return not isinstance(tool, AssistantTool)
