"""LangChain's messages to the turns of a prompt, and the model's step back to the parts of an AI message.

System messages become one system text, which is compressed with the tools and never stands in the edge prompt. Human,
AI and tool messages become turns. What the prompt has no place for is named in `Conversation.left_out`; what can't be
read is an error that names the message. Knows nothing of tokens, weights or the chat model class.
"""

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    InvalidToolCall,
    SystemMessage,
    ToolCall,
    ToolMessage,
)
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.utils.json import parse_partial_json

from loragen_agents.conversation.prompts import TakenStep, Turn
from loragen_agents.conversation.react import InvalidStep, Step, ToolStep, format_action_input
from loragen_agents.conversation.stop_texts import cut_at_first, held_back
from loragen_agents.errors import ArgumentError, PromptError
from loragen_agents.registry import ToolRegistry

_ROLES: dict[str, type[BaseMessage]] = {
    "system": SystemMessage,
    "developer": SystemMessage,
    "user": HumanMessage,
    "human": HumanMessage,
    "assistant": AIMessage,
    "ai": AIMessage,
}
_TEXT_BLOCKS = {"text", "text-plain", "input_text", "output_text"}
_REASONING_BLOCKS = {"reasoning", "thinking", "redacted_thinking"}
_CALL_BLOCKS = {"tool_call", "tool_call_chunk", "tool_use", "function_call", "invalid_tool_call"}


@dataclass(frozen=True)
class Conversation:
    """What a list of messages says.

    Attributes:
        system_text: all system messages, in order, a blank line between them; "" without any.
        turns: the last one is open (its `answer` is None): the model's next step continues it.
        left_out: a phrase for each thing that the prompt has no place for (an AI message's reasoning, its words beside
            a tool call).
    """

    system_text: str
    turns: tuple[Turn, ...]
    left_out: tuple[str, ...] = ()


def read_conversation(messages: Sequence[BaseMessage], registry: ToolRegistry) -> Conversation:
    """Read `messages` as a conversation whose next step is the model's.

    Human messages in a row are one request, AI answers in a row one answer (a blank line between them). A human
    message's `name` stands in front of its text; an AI message's name is not part of the prompt, for the model speaks
    with one voice. Each tool call is one step with its tool message as the observation, in the order of the calls; a
    call whose tool is not in `registry`, or whose arguments its input format can't express, is shown with its arguments
    as JSON.

    Raises:
        PromptError: no message to answer, a message of an unknown kind, content that is not text, a tool call without
            its tool message or the other way round, or one whose arguments JSON can't hold.
    """
    reader = _Reader(registry)
    for position, message in enumerate(messages, start=1):
        reader.read(message, f"message {position}")
    return reader.close()


@dataclass
class _Call:
    """A call that waits for its observation. `observation` is preset for calls that were never run."""

    action: str
    action_input: str
    observation: str | None = None
    answered: bool = False


@dataclass
class _Reader:
    registry: ToolRegistry
    system: list[str] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    steps: list[TakenStep] = field(default_factory=list)
    calls: dict[str, _Call] = field(default_factory=dict)

    def read(self, message: BaseMessage, where: str) -> None:
        kind: type[BaseMessage] = type(message)
        if isinstance(message, ChatMessage):
            role = message.role.lower()
            if role not in _ROLES:
                raise PromptError(f"{where} has the role {message.role!r}; expected one of {', '.join(_ROLES)}")
            kind = _ROLES[role]
        if issubclass(kind, SystemMessage):
            text = _text(message, where)
            if text.strip():
                self.system.append(text)
        elif issubclass(kind, HumanMessage):
            self._settle_calls(where)
            if self.answers or self.steps:
                self._close_turn()
            text = _text(message, where)
            self.requests.append(f"{message.name}: {text}" if message.name else text)
        elif issubclass(kind, AIMessage):
            self._settle_calls(where)
            self._read_ai(message, where)
        elif issubclass(kind, ToolMessage) and isinstance(message, ToolMessage):
            self._read_observation(message, where)
        else:
            raise PromptError(
                f"{where} is a {type(message).__name__}; expected system, human, AI and tool messages only"
            )

    def close(self) -> Conversation:
        self._settle_calls("the end of the conversation")
        if self.answers:
            raise PromptError(
                "the conversation ends with an AI message, so there is nothing to answer; end it with a human message "
                "or a tool message"
            )
        if not self.requests and not self.steps:
            raise PromptError(
                "the conversation has no human message; system messages are compressed into the weights, so put what "
                "is to be answered into a human message"
            )
        self.turns.append(Turn("\n\n".join(self.requests), tuple(self.steps)))
        return Conversation("\n\n".join(self.system), tuple(self.turns), tuple(self.left_out))

    def _read_ai(self, message: BaseMessage, where: str) -> None:
        calls = message.tool_calls if isinstance(message, AIMessage) else []
        broken = message.invalid_tool_calls if isinstance(message, AIMessage) else []
        known = {call.get("id") for call in [*calls, *broken]}
        text = _text(message, where, known_calls=known, left_out=self.left_out)
        if not calls and not broken:
            self.answers.append(text)
            return
        # The line format goes from the thought straight to the action: it has no place for words before a call.
        for words in [*self.answers, text]:
            if words.strip():
                self.left_out.append(f"{where}: an AI message's words before its tool call")
        self.answers.clear()
        for call in calls:
            identifier = call.get("id")
            if not identifier:
                raise PromptError(f"{where}: the call of {call['name']!r} has no id, so no tool message can answer it")
            if identifier in self.calls:
                raise PromptError(f"{where}: two tool calls have the id {identifier!r}")
            self.calls[identifier] = _Call(call["name"], self._action_input(call, where))
        for failed in broken:
            if not failed.get("name"):
                self.left_out.append(f"{where}: a tool call that could not be read and has no name")
                continue
            said = " ".join((failed.get("args") or "").split())
            observation = f"Error: {failed.get('error') or 'the call could not be read.'}"
            self.calls[failed.get("id") or uuid.uuid4().hex] = _Call(failed["name"] or "", said, observation)

    def _action_input(self, call: ToolCall, where: str) -> str:
        if call["name"] in self.registry:
            try:
                return format_action_input(self.registry[call["name"]], call["args"], self.registry.input_format)
            except ArgumentError:
                pass  # a call that its own tool would refuse (the tool message then says why) is shown as it was made
        try:
            return json.dumps(call["args"], ensure_ascii=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise PromptError(
                f"{where}: the arguments of the call of {call['name']!r} can't be written as JSON: {error}; give "
                "dates, sets and other objects as text, numbers or lists"
            ) from error

    def _read_observation(self, message: ToolMessage, where: str) -> None:
        call = self.calls.get(message.tool_call_id)
        if call is None:
            raise PromptError(
                f"{where} is a tool message for the call {message.tool_call_id!r}, but the AI message before it made "
                "no such call; keep the AI message with its tool_calls in the conversation"
            )
        if call.answered:
            raise PromptError(f"{where} is a second tool message for the call {message.tool_call_id!r}")
        text = _text(message, where)
        if message.status == "error" and not text.lower().startswith("error"):
            text = f"Error: {text}"
        call.observation, call.answered = text, True

    def _settle_calls(self, where: str) -> None:
        """Turn the calls made so far into steps; each must have its observation."""
        for identifier, call in self.calls.items():
            if call.observation is None:
                raise PromptError(
                    f"the call {identifier!r} of {call.action!r} has no tool message before {where}; "
                    "answer every tool call with a tool message"
                )
            self.steps.append(TakenStep(call.action, call.action_input, call.observation))
        self.calls.clear()

    def _close_turn(self) -> None:
        self.turns.append(Turn("\n\n".join(self.requests), tuple(self.steps), "\n\n".join(self.answers)))
        self.requests, self.answers, self.steps = [], [], []


def _text(
    message: BaseMessage, where: str, known_calls: set[str | None] | None = None, left_out: list[str] | None = None
) -> str:
    """The text of a message; blocks of an AI message that repeat its `tool_calls` are passed over."""
    if isinstance(message.content, str):
        return message.content
    parts: list[str] = []
    for block in message.content:
        if isinstance(block, str):
            parts.append(block)
            continue
        kind = block.get("type", "text" if "text" in block else None)
        if kind in _TEXT_BLOCKS and isinstance(block.get("text"), str):
            parts.append(block["text"])
        elif kind == "refusal" and isinstance(block.get("refusal"), str):
            parts.append(block["refusal"])
        elif kind == "json" and "json" in block:
            parts.append(json.dumps(block["json"], ensure_ascii=False))
        elif kind in _REASONING_BLOCKS and left_out is not None:
            left_out.append(f"{where}: an AI message's reasoning")
        elif kind in _CALL_BLOCKS and known_calls is not None:
            if (block.get("call_id") or block.get("id")) not in known_calls:
                raise PromptError(
                    f"{where} has a content block for a tool call that its tool_calls lack; put the call into "
                    "AIMessage.tool_calls"
                )
        else:
            raise PromptError(
                f"{where} has a content block of the type {kind!r}; this model reads text only: "
                "leave images, audio, video and files out, or put their text into the message"
            )
    return ("" if isinstance(message, AIMessage) else "\n").join(parts)


def step_message(step: Step) -> AIMessage:
    """The step as an AI message: an answer as its content, a call in `tool_calls` or `invalid_tool_calls`."""
    identifier = f"call_{uuid.uuid4().hex}"
    if isinstance(step, ToolStep):
        call = ToolCall(name=step.action, args=step.arguments, id=identifier, type="tool_call")
        return AIMessage(content="", tool_calls=[call])
    if isinstance(step, InvalidStep):
        return AIMessage(content="", invalid_tool_calls=[_invalid_call(step, identifier)])
    return AIMessage(content=step.text)


def last_chunk(step: Step) -> AIMessageChunk:
    """The chunk that ends a stream whose answer, if the step is one, has been sent already.

    A call is sent whole: LangChain takes what has come so far for a call, and half of one would be a guess.
    """
    message = step_message(step)
    chunks = [
        tool_call_chunk(name=call["name"], args=json.dumps(call["args"], ensure_ascii=False), id=call["id"], index=0)
        for call in message.tool_calls
    ]
    for failed in message.invalid_tool_calls:
        chunks.append(tool_call_chunk(name=failed["name"], args=failed["args"], id=failed["id"], index=0))
    return AIMessageChunk(content="", tool_call_chunks=chunks, chunk_position="last")


def _invalid_call(step: InvalidStep, identifier: str) -> InvalidToolCall:
    """LangChain's invalid tool call.

    LangChain rebuilds the calls of a streamed message from their text, and completes cut-off JSON. An invalid call must
    stay invalid, so `args` is never text that LangChain could complete to an object: it is the Action Input, else
    everything that the model said, else that text as a JSON string.
    """
    texts = [text for text in (step.action_input, step.text) if text and not _mends_to_object(text)]
    args = texts[0] if texts else json.dumps(step.text, ensure_ascii=False)
    return InvalidToolCall(name=step.action, args=args, id=identifier, error=step.error, type="invalid_tool_call")


def _mends_to_object(text: str) -> bool:
    try:
        return isinstance(parse_partial_json(text), dict)
    except json.JSONDecodeError:
        return False


class AnswerText:
    """The answer as it is sent on: it ends before the first stop text, of which no part is ever sent."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = stops
        self.text = ""
        self.stopped = False
        self._held = ""

    def feed(self, delta: str) -> str:
        """Take the next piece; return what of it can be sent."""
        if self.stopped:
            return ""
        ready, self.stopped = cut_at_first(self._held + delta, self.stops)
        length = 0 if self.stopped else held_back(ready, self.stops)
        ready, self._held = ready[: len(ready) - length], ready[len(ready) - length :]
        self.text += ready
        return ready

    def flush(self) -> str:
        """What was held back as the possible beginning of a stop text, once nothing more comes."""
        ready, self._held = self._held, ""
        self.text += ready
        return ready
