"""The loop: LangChain's own agent around a chat model, with limits, permissions and a report of each step.

A turn never raises for what a model or a tool did: it ends with an answer, or stopped or failed with a sentence. Knows
nothing of the terminal; who runs a turn is told of its events as they happen.
"""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware
from langchain.agents.middleware.types import ModelRequest, ModelResponse, ToolCallRequest
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import BaseTool, StructuredTool, ToolException

from loragen_agents.assistant.permission import Permissions, brings_outside_text
from loragen_agents.assistant.preview import preview
from loragen_agents.assistant.results import MODEL_CHARACTERS, Result
from loragen_agents.assistant.tools.context import Context, ToolError
from loragen_agents.assistant.turns import ToolCall, Turn, history, remembered, shown_of
from loragen_agents.errors import LoRAGenError

# Turns of the conversation that the model sees beside the one at hand. It was trained with one at most.
HISTORY_TURNS = 1
MAX_STEPS = 6
TOOL_SECONDS = 30.0
# Tools of which a turn remembers how likely they were.
LIKELIEST = 5


@dataclass(frozen=True)
class AnswerPiece:
    """The next words of the model's answer."""

    text: str


@dataclass(frozen=True)
class CallBegins:
    """A tool is about to be called (and may still be refused)."""

    call: ToolCall


@dataclass(frozen=True)
class CallEnds:
    """A tool has been called; the call holds its result or its error."""

    call: ToolCall


Event = AnswerPiece | CallBegins | CallEnds
Show = Callable[[Event], None]


class _TurnEnds(Exception):
    """The turn is over before the model has said so; `failed` where nothing came of it."""

    def __init__(self, reason: str, *, failed: bool) -> None:
        super().__init__(reason)
        self.failed = failed


@dataclass
class Assistant:
    """A conversation with a model that has tools.

    Attributes:
        model: a LangChain chat model that takes tools; None until it is loaded, which is before the first turn.
        tools: what it can call.
        context: what previews of the assistant's own tools look at.
        system: system text; compressed with the tools.
        max_steps: most steps of the model in a turn.
        tool_seconds: the time limit of a tool.
    """

    model: Any
    tools: Sequence[BaseTool]
    context: Context
    permissions: Permissions = field(default_factory=Permissions)
    system: str = ""
    max_steps: int = MAX_STEPS
    tool_seconds: float = TOOL_SECONDS
    turns: list[Turn] = field(default_factory=list)

    async def turn(self, request: str, show: Show) -> Turn:
        """Run a turn to its end and add it to the conversation. Cancelling it ends the turn as interrupted."""
        turn = Turn(request)
        started = time.perf_counter()
        try:
            await self._run(turn, show)
        except _TurnEnds as end:
            turn.ending, turn.reason = ("failed" if end.failed else "stopped"), str(end)
        except LoRAGenError as error:
            turn.ending, turn.reason = "failed", str(error)
        except asyncio.CancelledError:
            turn.ending, turn.reason = "interrupted", "Interrupted."
            raise
        finally:
            turn.figures.turn_ms = round(turn.figures.turn_ms + (time.perf_counter() - started) * 1000, 1)
            self.turns.append(turn)
        return turn

    async def _run(self, turn: Turn, show: Show) -> None:
        watch = _Watch(self, turn, show)
        agent: Any = create_agent(
            self.model,
            tools=[_in_own_thread(tool) for tool in self.tools],
            system_prompt=self.system or None,
            middleware=[watch],
        )
        messages = [*history(self.turns, HISTORY_TURNS), HumanMessage(turn.request)]
        # A step is a model call and a tool call; the limit in words is the watch's, this one only bounds the graph.
        config = {"recursion_limit": 4 * self.max_steps + 10}
        stream = agent.astream({"messages": messages}, config, stream_mode="messages")
        try:
            async for chunk, _ in stream:
                if isinstance(chunk, AIMessageChunk | AIMessage) and chunk.text:
                    turn.answer += chunk.text
                    show(AnswerPiece(chunk.text))
                    if _goes_in_circles(turn.answer):
                        raise _TurnEnds("The model repeats itself, so its answer was cut off.", failed=not turn.calls)
        finally:
            turn.figures.turn_ms -= watch.thinking_seconds * 1000
            await stream.aclose()


class _Watch(AgentMiddleware):
    """Counts the steps of one turn, asks for permission, keeps the time limit, and tells what happens."""

    def __init__(self, assistant: Assistant, turn: Turn, show: Show) -> None:
        super().__init__()
        self.assistant, self.turn, self.show = assistant, turn, show
        self.steps = 0
        # What an earlier turn read still stands in the prompt, and may still try to give orders.
        before = remembered(assistant.turns, HISTORY_TURNS)
        self.outside_text = any(call.outside for earlier in before for call in earlier.calls)
        # Time that the user took to say yes or no, which is none of the turn's.
        self.thinking_seconds = 0.0

    async def awrap_model_call(
        self, request: ModelRequest, handler: Callable[[ModelRequest], Awaitable[ModelResponse]]
    ) -> ModelResponse:
        if self.steps == self.assistant.max_steps:
            raise _TurnEnds(f"Stopped after {self.steps} steps: the model did not come to an end.", failed=True)
        self.steps += 1
        response = await handler(request)
        for message in response.result:
            if isinstance(message, AIMessage):
                self._note_figures(message)
                self._check_calls(message)
        return response

    def _note_figures(self, message: AIMessage) -> None:
        facts, figures = message.response_metadata, self.turn.figures
        if self.steps == 1:
            figures.prompt_tokens = facts.get("prompt_tokens", 0)
            figures.definition_tokens = facts.get("definition_tokens", 0)
            figures.first_token_ms = facts.get("first_token_ms", 0.0)
        if "tool_probabilities" in facts:
            likeliest = sorted(facts["tool_probabilities"].items(), key=lambda one: -one[1])[:LIKELIEST]
            figures.choices.append(
                {
                    "tool_call_probability": round(facts["tool_call_probability"], 4),
                    "tool_probabilities": {name: round(share, 4) for name, share in likeliest},
                }
            )

    def _check_calls(self, message: AIMessage) -> None:
        for failed in message.invalid_tool_calls:
            raise _TurnEnds(f"The model's call can't be read: {failed.get('error') or 'it is damaged'}.", failed=True)
        for call in message.tool_calls:
            for made in self.turn.calls:
                if (made.tool, made.arguments) == (call["name"], call["args"]):
                    raise _TurnEnds(
                        "The model asked for the same call again, so the turn ends here.", failed=made.failed
                    )

    async def awrap_tool_call(
        self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], Awaitable[Any]]
    ) -> ToolMessage:
        name, arguments = request.tool_call["name"], request.tool_call["args"]
        call = ToolCall(name, arguments)
        self.turn.calls.append(call)
        self.show(CallBegins(call))
        tool = request.tool
        if tool is None:
            return self._ended(request, call, f"there is no tool {name!r}", failed=True)
        asked = time.perf_counter()
        decision = await self.assistant.permissions.decide(tool, arguments, outside_text=self.outside_text)
        self.thinking_seconds += time.perf_counter() - asked
        if decision == "pretend":
            return self._ended(request, call, f"Dry run: {preview(self.assistant.context, name, arguments)}.")
        if decision == "refuse":
            self._refused(call)
        started = time.perf_counter()
        message = await self._called(request, handler, call)
        call.milliseconds = round((time.perf_counter() - started) * 1000, 1)
        artifact = message.artifact
        call.shown = shown_of(artifact)
        if brings_outside_text(tool) or (isinstance(artifact, Result) and artifact.outside):
            call.outside = True
        self.outside_text |= call.outside
        self.show(CallEnds(call))
        return message

    def _refused(self, call: ToolCall) -> None:
        if self.assistant.permissions.ask is None:
            why = "comes after text that others may have written" if self.outside_text else "may change something"
            reason = f"{call.tool} {why}, so it asks first; nobody can be asked here. Add --yes to allow it."
        else:
            reason = "Not done, as you said no."
        call.text, call.failed, call.refused = reason, True, True
        self.show(CallEnds(call))
        raise _TurnEnds(reason, failed=self.assistant.permissions.ask is None)

    async def _called(
        self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], Awaitable[Any]], call: ToolCall
    ) -> ToolMessage:
        """The tool's message; what goes wrong is its text."""
        try:
            message = await asyncio.wait_for(handler(request), self.assistant.tool_seconds)
        except asyncio.TimeoutError:
            return self._message(request, call, f"{call.tool} took longer than {self.assistant.tool_seconds:g} s", True)
        except ToolException as error:
            call.outside = isinstance(error, ToolError) and error.outside
            return self._message(request, call, str(error), True)
        except Exception as error:  # a tool may fail in any way; the turn goes on with its error as an observation
            return self._message(request, call, f"{type(error).__name__}: {error}", True)
        if not isinstance(message, ToolMessage):
            return self._message(request, call, f"{call.tool} gave a {type(message).__name__}, not a result", True)
        text = str(message.text)
        if len(text) > MODEL_CHARACTERS * 2:
            # The assistant's own results are cut already; those of other tools are as long as they like.
            call.text = text
            text = f"{text[:MODEL_CHARACTERS].rstrip()} ... ({len(text)} characters in all)"
        made = self._message(request, call, text, message.status == "error", keep_text=call.text)
        made.artifact = message.artifact
        return made

    def _message(
        self, request: ToolCallRequest, call: ToolCall, text: str, failed: bool, keep_text: str = ""
    ) -> ToolMessage:
        call.text, call.failed = keep_text or text, failed
        status: Any = "error" if failed else "success"
        return ToolMessage(text, tool_call_id=request.tool_call["id"] or "", name=call.tool, status=status)

    def _ended(self, request: ToolCallRequest, call: ToolCall, text: str, failed: bool = False) -> ToolMessage:
        message = self._message(request, call, text, failed)
        self.show(CallEnds(call))
        return message


def _in_own_thread(tool: BaseTool) -> BaseTool:
    """A tool that runs in a daemon thread: one that hangs is left behind, and does not keep the program from ending."""
    if not isinstance(tool, StructuredTool) or tool.coroutine is not None or tool.func is None:
        return tool
    function = tool.func

    async def run(*args: Any, **kwargs: Any) -> Any:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Any] = loop.create_future()

        def settle(value: Any, error: BaseException | None) -> None:
            if not done.done():  # nobody waits any more after the time limit
                done.set_exception(error) if error else done.set_result(value)

        def work() -> None:
            value, error = None, None
            try:
                value = function(*args, **kwargs)
            except Exception as failure:
                error = failure
            if not loop.is_closed():
                loop.call_soon_threadsafe(settle, value, error)

        threading.Thread(target=work, name=tool.name, daemon=True).start()
        return await done

    return tool.model_copy(update={"coroutine": run})


def _goes_in_circles(text: str) -> bool:
    """Whether a text ends in the same 12 to 200 characters three times; they must hold a letter or digit."""
    lengths = range(12, min(200, len(text) // 3) + 1)
    return any(text.endswith(text[-length:] * 3) and any(map(str.isalnum, text[-length:])) for length in lengths)
