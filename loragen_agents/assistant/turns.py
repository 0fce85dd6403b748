"""A conversation as plain values: turns, the calls made in them, and what both look like as JSON and as messages.

Knows nothing of how a turn is run or shown.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage

from loragen_agents.assistant.results import Document, Result, Table

Ending = Literal["answered", "stopped", "failed", "interrupted"]


@dataclass
class ToolCall:
    """One call of a tool in a turn.

    Attributes:
        text: what the model was told: the result, cut where it is long, or the error.
        refused: it was not run, because the user did not want it or could not be asked.
        shown: the whole result, for the screen only; it is not kept with the session.
    """

    tool: str
    arguments: dict[str, Any]
    text: str = ""
    failed: bool = False
    milliseconds: float = 0.0
    refused: bool = False
    outside: bool = False
    shown: Table | Document | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "tool": self.tool,
            "arguments": self.arguments,
            "text": self.text,
            "failed": self.failed,
            "milliseconds": self.milliseconds,
            "refused": self.refused,
            "outside": self.outside,
        }


@dataclass
class Figures:
    """What a turn took. Prompt and first token are those of its first step.

    Attributes:
        choices: for each step of the model that scored its tools, the probability of calling one and of the likeliest
            ones.
    """

    prompt_tokens: int = 0
    definition_tokens: int = 0
    first_token_ms: float = 0.0
    turn_ms: float = 0.0
    choices: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Turn:
    """One request of the user and what came of it.

    Attributes:
        reason: in words, why a turn was stopped or failed.
    """

    request: str
    calls: list[ToolCall] = field(default_factory=list)
    answer: str = ""
    ending: Ending = "answered"
    reason: str = ""
    figures: Figures = field(default_factory=Figures)

    @property
    def succeeded(self) -> bool:
        """Whether the user has got something: an answer, or results without an error at the end."""
        if self.ending == "answered":
            return bool(self.answer or self.calls) and not (self.calls and self.calls[-1].failed)
        return self.ending == "stopped" and bool(self.calls) and not self.calls[-1].failed

    def messages(self) -> list[BaseMessage]:
        """The turn as LangChain messages, as later turns see it."""
        made: list[BaseMessage] = [HumanMessage(self.request)]
        for number, call in enumerate(self.calls):
            identifier = f"call_{number}"
            made.append(AIMessage("", tool_calls=[{"name": call.tool, "args": call.arguments, "id": identifier}]))
            made.append(
                ToolMessage(
                    call.text, tool_call_id=identifier, name=call.tool, status="error" if call.failed else "success"
                )
            )
        if self.answer or not self.calls:
            made.append(AIMessage(self.answer or self.reason or "(no answer)"))
        return made

    def to_json(self) -> dict[str, Any]:
        return {
            "request": self.request,
            "calls": [call.to_json() for call in self.calls],
            "answer": self.answer,
            "ending": self.ending,
            "reason": self.reason,
            "figures": asdict(self.figures),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Turn":
        """The inverse of `to_json`.

        Raises:
            KeyError, TypeError: `value` is not what `to_json` gives.
        """
        return cls(
            value["request"],
            [ToolCall(**call) for call in value["calls"]],
            value["answer"],
            value["ending"],
            value["reason"],
            Figures(**value["figures"]),
        )


def remembered(turns: Sequence[Turn], limit: int) -> list[Turn]:
    """The last `limit` turns that succeeded.

    Errors and refusals are left out: a small model repeats them in later answers.
    """
    return [turn for turn in turns if turn.succeeded][-limit:] if limit else []


def history(turns: Sequence[Turn], limit: int) -> list[BaseMessage]:
    """The messages of the `remembered` turns, each turn whole."""
    return [message for turn in remembered(turns, limit) for message in turn.messages()]


def shown_of(artifact: Any) -> Table | Document | None:
    """What there is to show of a tool message's artifact; None where it is not the assistant's own."""
    return artifact.shown if isinstance(artifact, Result) else None
