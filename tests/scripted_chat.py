"""A chat model that says what a test tells it to, and a context for the assistant's tools."""

import json
from collections.abc import AsyncIterator, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult

from loragen_agents.assistant.tools.context import Context, Folder
from loragen_agents.assistant.tools.store import Store

NOW = datetime(2026, 11, 25, 12, 0, tzinfo=ZoneInfo("Europe/Berlin"))
FIGURES = {
    "prompt_tokens": 31,
    "definition_tokens": 900,
    "first_token_ms": 12.0,
    "tool_call_probability": 0.9,
    "tool_probabilities": {"calculator": 0.8, "today": 0.1},
}


def call(name: str, /, **arguments: Any) -> AIMessage:
    """A step that calls a tool."""
    return AIMessage("", tool_calls=[{"name": name, "args": arguments, "id": f"{name}-{len(str(arguments))}"}])


class ScriptedChatModel(BaseChatModel):
    """Gives the steps of `script` one after the other: messages, or texts as answers. Streams answers word by word."""

    script: list[Any]
    seen: list[list[BaseMessage]] = []  # noqa: RUF012  (pydantic copies it for each instance)
    bound: list[Any] = []  # noqa: RUF012

    @property
    def _llm_type(self) -> str:
        return "scripted"

    def bind_tools(self, tools: Sequence[Any], **_: Any) -> "ScriptedChatModel":  # type: ignore[override]
        self.bound.append([tool.name for tool in tools])
        return self

    def _step(self, messages: list[BaseMessage]) -> AIMessage:
        self.seen.append(list(messages))
        step = self.script.pop(0)
        message = AIMessage(step) if isinstance(step, str) else step
        return message.model_copy(update={"response_metadata": dict(FIGURES), "id": f"step-{len(self.seen)}"})

    def _generate(self, messages: list[BaseMessage], *_: Any, **settings: Any) -> ChatResult:
        if settings.get("max_tokens") == 1:  # the warm-up says nothing
            return ChatResult(generations=[ChatGeneration(message=AIMessage(""))])
        return ChatResult(generations=[ChatGeneration(message=self._step(messages))])

    def _stream(self, messages: list[BaseMessage], *_: Any, **__: Any) -> Iterator[ChatGenerationChunk]:
        step = self._step(messages)
        words = step.text.split(" ") if step.text else []
        for number, word in enumerate(words):
            yield ChatGenerationChunk(message=AIMessageChunk(content=f" {word}" if number else word))
        chunks: list[Any] = [
            {"name": one["name"], "args": json.dumps(one["args"]), "id": one["id"], "index": 0}
            for one in step.tool_calls
        ]
        yield ChatGenerationChunk(
            message=AIMessageChunk(
                content="", tool_call_chunks=chunks, response_metadata=step.response_metadata, chunk_position="last"
            )
        )

    async def _astream(self, messages: list[BaseMessage], *_: Any, **__: Any) -> AsyncIterator[ChatGenerationChunk]:
        for chunk in self._stream(messages):
            yield chunk


def scripted(*script: Any) -> ScriptedChatModel:
    """A model with this script."""
    return ScriptedChatModel(script=list(script), seen=[], bound=[])


def tool_context(folder: Path) -> Context:
    """A root with a few files, an empty store, and a clock that stands still."""
    root = folder / "root"
    root.mkdir()
    (root / "shopping.txt").write_text("milk\nbread\n")
    (root / "plan.md").write_text("# Plan\n\nRest.\n")
    return Context(Folder(root), Store(folder / "store.sqlite"), lambda: NOW)
