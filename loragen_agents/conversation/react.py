"""Reads and writes the lines of a step: a tool call, an answer, or neither.

After `THOUGHT_QUESTION` a model writes one of

     Yes                                  No
    Action: NAME                         AI: ANSWER
    Action Input: INPUT
    Observation:

The only place that spells these lines. Text is read whole or while it streams in; what does not fit becomes an
`InvalidStep` with the reason, never an exception or a guess. Pass only what the model itself wrote: users and tools can
write the same lines. Knows neither tokens nor how a tool is run.
"""

import difflib
import re
from dataclasses import dataclass
from typing import Any

from loragen_agents.conversation.stop_texts import cut_at_first, held_back
from loragen_agents.errors import ArgumentError
from loragen_agents.registry import ToolRegistry
from loragen_agents.registry.arguments import bind_arguments, format_action_input

__all__ = [
    "ACTION",
    "ACTION_INPUT",
    "ANSWER",
    "LINE_LABELS",
    "NO_TOOL",
    "OBSERVATION_STOP",
    "THOUGHT_QUESTION",
    "USE_TOOL",
    "ActionKnown",
    "Answer",
    "AnswerDelta",
    "ArgumentError",
    "InputDelta",
    "InvalidStep",
    "Step",
    "StepEvent",
    "StepStream",
    "ToolStep",
    "answer_text",
    "bind_arguments",
    "format_action_input",
    "observation_text",
    "parse_step",
    "tool_step_head",
    "tool_step_text",
]

THOUGHT_QUESTION = "Thought: Do I need to use a tool?"
USE_TOOL, NO_TOOL = " Yes", " No"
ACTION, ACTION_INPUT, ANSWER = "\nAction:", "\nAction Input:", "\nAI:"
OBSERVATION_STOP = "\nObservation:"
# Labels at the beginning of a line; `Human:` opens a user's turn where a model has no chat template.
LINE_LABELS = ("Thought:", "Action:", "Action Input:", "Observation:", "AI:", "Human:")

_TOOL_HEAD = re.compile(r"\s*yes[ \t]*[.!]?\s+action:", re.IGNORECASE)
_INPUT_HEAD = re.compile(r"([^\n]*)\n\s*action input:", re.IGNORECASE)
_ANSWER_HEAD = re.compile(r"\s*no[ \t]*[.!]?\s+ai:", re.IGNORECASE)
# Where an input or an answer ends although the model wrote on: it must not write the tool's report or the next thought.
# An answer may have a line that begins with "Observation:", so of a thought only the whole question ends it. It is also
# over where another answer begins: small models repeat the first one.
_INPUT_ENDS = (OBSERVATION_STOP, "\nThought:")
_ANSWER_ENDS = (f"\n{THOUGHT_QUESTION}", ANSWER)


@dataclass(frozen=True)
class ToolStep:
    """A call of the registry's tool `action`; `arguments` is `action_input` bound to its schema."""

    action: str
    action_input: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """An answer to the user."""

    text: str


@dataclass(frozen=True)
class InvalidStep:
    """Text that is neither, with `action` and `action_input` as far as they could be made out; `error` says why."""

    text: str
    action: str | None
    action_input: str | None
    error: str


Step = ToolStep | Answer | InvalidStep


@dataclass(frozen=True)
class ActionKnown:
    """The model has named a tool of the registry. The step may still turn out invalid by its input."""

    action: str


@dataclass(frozen=True)
class InputDelta:
    """The next piece of the Action Input as it is written."""

    text: str


@dataclass(frozen=True)
class AnswerDelta:
    """The next piece of the answer."""

    text: str


StepEvent = ActionKnown | InputDelta | AnswerDelta


def tool_step_head(action: str) -> str:
    """What follows `THOUGHT_QUESTION` where a tool is called, up to its input."""
    return f"{USE_TOOL}{ACTION} {action}{ACTION_INPUT}"


def tool_step_text(action: str, action_input: str) -> str:
    """What follows `THOUGHT_QUESTION` where a tool is called, up to the tool's report."""
    return f"{tool_step_head(action)} {action_input}{OBSERVATION_STOP}"


def observation_text(observation: str) -> str:
    """What follows a tool call: the tool's report, and the question that opens the next step."""
    return f" {observation}\n{THOUGHT_QUESTION}"


def answer_text(answer: str) -> str:
    """What follows `THOUGHT_QUESTION` where the user is answered."""
    return f"{NO_TOOL}{ANSWER} {answer}"


def parse_step(generated: str, registry: ToolRegistry, *, cut_off: bool = False) -> Step:
    """Read what a model wrote after `THOUGHT_QUESTION`. Never raises.

    Args:
        generated: the model's text.
        registry: the tools that may be called.
        cut_off: whether generation ran out of tokens. A csv input without `Observation:` behind it may then lack its
            end, which the text doesn't show, so it is invalid.
    """
    head = _TOOL_HEAD.match(generated)
    if head:
        return _parse_tool_step(generated, head.end(), registry, cut_off)
    head = _ANSWER_HEAD.match(generated)
    if head:
        return Answer(cut_at_first(generated[head.end() :], _ANSWER_ENDS)[0].strip())
    return InvalidStep(
        generated, None, None, "expected 'Yes' with an 'Action:' line, or 'No' with an 'AI:' line, after the thought"
    )


def _parse_tool_step(generated: str, start: int, registry: ToolRegistry, cut_off: bool) -> ToolStep | InvalidStep:
    head = _INPUT_HEAD.match(generated, start)
    if not head:
        action = generated[start:].partition("\n")[0].strip() or None
        return InvalidStep(generated, action, None, "no 'Action Input:' line follows the action")
    action = head.group(1).strip()
    body, closed = cut_at_first(generated[head.end() :], _INPUT_ENDS)
    if not closed:
        body = body[: len(body) - held_back(body, _INPUT_ENDS)]
    action_input = body.strip()
    if action not in registry:
        return InvalidStep(generated, action or None, action_input, _unknown(action, registry))
    if cut_off and not closed and registry.input_format == "csv":
        return InvalidStep(generated, action, action_input, "the Action Input was cut off before its end")
    try:
        arguments = bind_arguments(registry[action], action_input, registry.input_format)
    except ArgumentError as error:
        return InvalidStep(generated, action, action_input, str(error))
    return ToolStep(action, action_input, arguments)


def _unknown(action: str, registry: ToolRegistry) -> str:
    near = difflib.get_close_matches(action, registry.names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"there is no tool {action[:80]!r} among the {len(registry)} tools{hint}"


class StepStream:
    """Reads a step while it is generated.

    Feed it the model's text in pieces of any size; it returns what has become certain. The `AnswerDelta`s of `feed` and
    `flush` join to the answer's text, the `InputDelta`s to the Action Input, and `close` gives the `Step` that
    `parse_step` gives for the whole text.
    """

    def __init__(self, registry: ToolRegistry) -> None:
        self.registry = registry
        self.text = ""
        # True once the step is complete and whatever follows is no part of it: generation can stop.
        self.finished = False
        self._delta: type[InputDelta] | type[AnswerDelta] | None = None
        self._ends: tuple[str, ...] = ()
        self._sent = 0
        self._begun_part = False

    def feed(self, delta: str) -> list[StepEvent]:
        """Take the next piece of text; return the events it completes."""
        self.text += delta
        if self.finished:
            return []
        events: list[StepEvent] = []
        if self._delta is None:
            self._read_head(events)
        if self._delta is not None:
            self._read_part(events, final=False)
        return events

    def flush(self) -> list[StepEvent]:
        """Return what was held back as the possible beginning of a closing line; call it when generation has ended."""
        events: list[StepEvent] = []
        if self._delta is not None and not self.finished:
            self._read_part(events, final=True)
        return events

    def close(self, *, cut_off: bool = False) -> Step:
        """The step that the whole text is; `cut_off` as in `parse_step`."""
        return parse_step(self.text, self.registry, cut_off=cut_off)

    def _read_head(self, events: list[StepEvent]) -> None:
        answer = _ANSWER_HEAD.match(self.text)
        if answer:
            self._delta, self._ends, self._sent = AnswerDelta, _ANSWER_ENDS, answer.end()
            return
        tool = _TOOL_HEAD.match(self.text)
        head = _INPUT_HEAD.match(self.text, tool.end()) if tool else None
        if head and head.group(1).strip() in self.registry:
            self._delta, self._ends, self._sent = InputDelta, _INPUT_ENDS, head.end()
            events.append(ActionKnown(head.group(1).strip()))

    def _read_part(self, events: list[StepEvent], final: bool) -> None:
        assert self._delta is not None
        rest = self.text[self._sent :]
        ready, self.finished = cut_at_first(rest, self._ends)
        # Held back: what may be the beginning of a closing line. At the end of an answer it was not; an input loses it.
        if not self.finished and not (final and self._delta is AnswerDelta):
            ready = ready[: len(ready) - held_back(ready, self._ends)]
        if not self._begun_part:
            stripped = ready.lstrip()
            self._sent += len(ready) - len(stripped)
            ready = stripped
        ready = ready.rstrip()
        if ready:
            self._begun_part = True
            self._sent += len(ready)
            events.append(self._delta(ready))
