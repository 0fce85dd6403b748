"""One chat request to the parts of its answer: runs `LoRAGenChatModel`, in a worker's thread, and knows no HTTP.

An answer that has to be JSON is a tool call behind the scenes: the schema becomes a tool, its call is forced, and what
the call gives is sent as the content.
"""

import threading
import uuid
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Literal

from loragen_agents.chat.chat_models import LoRAGenChatModel
from loragen_agents.chat.steps import StepOutcome
from loragen_agents.conversation.react import ActionKnown, AnswerDelta, InputDelta, InvalidStep, StepEvent, ToolStep
from loragen_agents.server.api_errors import ApiError
from loragen_agents.server.protocol import ChatRequest, ResponseFormat

FinishReason = Literal["stop", "length", "tool_calls"]
# What of the model's own figures goes to clients, beside the usage.
_FACTS = (
    "definition_tokens",
    "compression_ratio",
    "specialization",
    "specialize_ms",
    "first_token_ms",
    "total_ms",
    "tool_call_probability",
    "left_out",
)


@dataclass(frozen=True)
class Content:
    """The next piece of the answer's text."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """A tool is called; its arguments follow."""

    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """The next piece of the call's arguments, which are JSON."""

    text: str


@dataclass(frozen=True)
class Finish:
    """The end. facts: what the model says of the step (`definition_tokens`, `specialize_ms`, ...)."""

    reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    facts: dict[str, Any] = field(default_factory=dict)


ReplyPart = Content | CallStart | CallArguments | Finish


def run_request(model: LoRAGenChatModel, request: ChatRequest, cancel: threading.Event) -> Iterator[ReplyPart]:
    """Run one request.

    Args:
        model: the chat model; its tools and settings are the request's in this call.
        request: what is asked.
        cancel: set it, from any thread, to stop before the next token.

    Yields:
        The parts of the answer while it is written, `Finish` last.

    Raises:
        ApiError: the model wrote what is neither a call nor an answer.
        PromptError: the messages can't be read.
        RegistryError: a tool can't be used.
        GrammarError: its schema can't be turned into a grammar.
    """
    wanted = request.response_format
    shaped = wanted is not None and wanted.type != "text"
    tools = [tool.openai() for tool in request.tools or ()]
    choice = request.choice
    messages, stops, settings = request.conversation, request.stops, request.settings
    if not shaped or (tools and choice != "none"):
        steps = model.steps(messages, stops, cancel, tools=tools, tool_choice=choice, **settings)
        with closing(steps):
            for number, event in enumerate(steps):
                # The first event tells a call from an answer; an answer is written anew, in the asked shape.
                if shaped and number == 0 and isinstance(event, AnswerDelta):
                    break
                yield from _parts(event)
            else:
                return
    assert wanted is not None
    definition = _schema_tool(wanted)
    forced = definition["function"]["name"]
    steps = model.steps(messages, (), cancel, tools=[definition], tool_choice=forced, **settings)
    with closing(steps):
        for event in steps:
            if isinstance(event, InputDelta):
                yield Content(event.text)
            elif isinstance(event, StepOutcome):
                finish = _finish(event)
                reason: FinishReason = "stop" if finish.reason == "tool_calls" else finish.reason
                yield Finish(reason, finish.prompt_tokens, finish.cached_tokens, finish.completion_tokens, finish.facts)


def _parts(event: StepEvent | StepOutcome) -> Iterator[ReplyPart]:
    if isinstance(event, AnswerDelta):
        yield Content(event.text)
    elif isinstance(event, ActionKnown):
        yield CallStart(f"call_{uuid.uuid4().hex}", event.action)
    elif isinstance(event, InputDelta):
        yield CallArguments(event.text)
    else:
        yield _finish(event)


def _finish(outcome: StepOutcome) -> Finish:
    facts, usage, step = outcome.metadata, outcome.usage, outcome.step
    reason: FinishReason = "length" if facts["finish_reason"] == "length" else "stop"
    if isinstance(step, ToolStep):
        reason = "tool_calls"
    elif isinstance(step, InvalidStep) and reason == "stop" and facts["finish_reason"] != "cancelled":
        raise ApiError(500, f"the model's step could not be read: {step.error}", kind="server_error")
    return Finish(
        reason,
        usage["input_tokens"],
        usage.get("input_token_details", {}).get("cache_read", 0),
        usage["output_tokens"],
        {name: facts[name] for name in _FACTS if name in facts},
    )


def _schema_tool(wanted: ResponseFormat) -> dict[str, Any]:
    """The tool whose arguments are the answer."""
    given = wanted.json_schema
    name = "answer" if given is None else given.name
    schema = None if given is None else given.schema_
    if schema is None:
        schema = {"type": "object", "properties": {}, "additionalProperties": True}
    elif schema.get("type", "object") != "object":
        raise ApiError(
            400,
            f"the schema's type is {schema['type']!r}; expected an object at the top",
            param="response_format.json_schema.schema",
            code="unsupported_schema",
        )
    description = (given.description if given else None) or f"Give the {name}."
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}
