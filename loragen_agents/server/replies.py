"""The parts of an answer as OpenAI's objects: one completion, or the chunks of a stream."""

import json
import time
import uuid
from collections.abc import Iterator
from typing import Any

from starlette.responses import Response

from loragen_agents.server.api_errors import ApiError
from loragen_agents.server.steps import CallArguments, CallStart, Content, Finish, ReplyPart


class Reply:
    """Builds the answer to one request from its parts.

    Args:
        model: the model's name, as the client gave it.
        fingerprint: OpenAI's `system_fingerprint`.
        include_usage: whether a stream ends with a chunk for the usage.
    """

    def __init__(self, model: str, fingerprint: str, include_usage: bool = False) -> None:
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self._include_usage = include_usage
        self._begun = False
        self._content: list[str] = []
        self._call: CallStart | None = None
        self._arguments: list[str] = []
        self.finish: Finish | None = None

    def add(self, part: ReplyPart) -> None:
        """Take the next part of an answer that is sent as a whole."""
        if isinstance(part, Content):
            self._content.append(part.text)
        elif isinstance(part, CallStart):
            self._call = part
        elif isinstance(part, CallArguments):
            self._arguments.append(part.text)
        else:
            self.finish = part

    def completion(self) -> dict[str, Any]:
        """The whole answer; `finish` must be known."""
        assert self.finish is not None
        message: dict[str, Any] = {"role": "assistant", "content": "".join(self._content), "refusal": None}
        if self._call is not None:
            function = {"name": self._call.name, "arguments": "".join(self._arguments)}
            message["content"] = None
            message["tool_calls"] = [{"id": self._call.id, "type": "function", "function": function}]
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self.finish.reason}
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [choice],
            "usage": _usage(self.finish),
            "loragen_agents": self.finish.facts,
        }

    def chunks(self, part: ReplyPart) -> Iterator[dict[str, Any]]:
        """The chunks that a part makes in a stream."""
        if isinstance(part, CallStart):
            function = {"name": part.name, "arguments": ""}
            call = {"index": 0, "id": part.id, "type": "function", "function": function}
            self._begun = True
            yield self._chunk({"role": "assistant", "content": None, "tool_calls": [call]})
            return
        if not self._begun:
            self._begun = True
            yield self._chunk({"role": "assistant", "content": ""})
        if isinstance(part, Content):
            yield self._chunk({"content": part.text})
        elif isinstance(part, CallArguments):
            yield self._chunk({"tool_calls": [{"index": 0, "function": {"arguments": part.text}}]})
        else:
            self.finish = part
            yield {**self._chunk({}, part.reason), "loragen_agents": part.facts}
            if self._include_usage:
                yield {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": _usage(part)}

    def _chunk(self, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": [choice]}
        return {**chunk, "usage": None} if self._include_usage else chunk


def ascii_json(value: Any) -> bytes:
    """A value as JSON. ASCII, so that half of a surrogate pair is an escape and not an error."""
    return json.dumps(value, separators=(",", ":")).encode("ascii")


def error_response(error: ApiError) -> Response:
    """The answer that an error is."""
    return Response(ascii_json(error.body()), error.status, error.headers, "application/json")


def server_sent(value: Any) -> bytes:
    """A value as a server-sent event."""
    return b"data: " + ascii_json(value) + b"\n\n"


DONE = b"data: [DONE]\n\n"


def _usage(finish: Finish) -> dict[str, Any]:
    return {
        "prompt_tokens": finish.prompt_tokens,
        "completion_tokens": finish.completion_tokens,
        "total_tokens": finish.prompt_tokens + finish.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": finish.cached_tokens},
    }
