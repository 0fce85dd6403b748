"""What clients may ask: OpenAI's chat request, checked field by field. Knows no model.

Fields of OpenAI's API that change nothing here are taken and passed over; those that ask for something this model can't
do are refused with a reason, unless their value asks for nothing (`n: 1`). All other fields are unknown, and an error.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    HumanMessage,
    InvalidToolCall,
    SystemMessage,
    ToolCall,
    ToolMessage,
)
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from loragen_agents.server.api_errors import ApiError, validation_error

Text = Annotated[str, Field(min_length=1)]


class _Strict(BaseModel):
    """A part of the request: unknown fields are errors, and so are values of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)


class CalledFunction(_Strict):
    """Name and arguments (JSON as text) of a call that was made."""

    name: Text
    arguments: str = "{}"


class MadeCall(_Strict):
    """A tool call of an assistant message. index: what streams number calls with; some clients send it back."""

    id: Text
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class Message(_Strict):
    """A message of the conversation.

    Attributes:
        content: text, or parts of the type text.
        refusal, annotations, audio, function_call, reasoning, reasoning_content: parts of answers of other models,
            which some clients send back; passed over.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[MadeCall] | None = None
    tool_call_id: str | None = None
    refusal: Any = None
    annotations: Any = None
    audio: Any = None
    function_call: Any = None
    reasoning: Any = None
    reasoning_content: Any = None

    @model_validator(mode="after")
    def _fits_role(self) -> "Message":
        if self.role != "assistant" and self.content is None:
            raise ValueError(f"a message of the role {self.role} needs content")
        if self.role == "assistant" and self.content is None and not self.tool_calls:
            raise ValueError("an assistant message needs content or tool_calls")
        if self.role != "assistant" and self.tool_calls:
            raise ValueError("only assistant messages have tool_calls")
        if self.role == "tool" and not self.tool_call_id:
            raise ValueError("a tool message needs the tool_call_id of the call that it answers")
        return self

    def read(self) -> BaseMessage:
        """The message as LangChain's."""
        content: Any = self.content or ""
        if self.role in ("system", "developer"):
            return SystemMessage(content)
        if self.role == "user":
            return HumanMessage(content, name=self.name)
        if self.role == "tool":
            return ToolMessage(content, tool_call_id=self.tool_call_id or "", name=self.name)
        calls: list[ToolCall] = []
        broken: list[InvalidToolCall] = []
        for call in self.tool_calls or ():
            name, text = call.function.name, call.function.arguments
            try:
                arguments = json.loads(text or "{}")
                if not isinstance(arguments, dict):
                    raise ValueError("the arguments are no JSON object")
                calls.append(ToolCall(name=name, args=arguments, id=call.id, type="tool_call"))
            except (ValueError, RecursionError) as error:
                failed = InvalidToolCall(name=name, args=text, id=call.id, error=str(error), type="invalid_tool_call")
                broken.append(failed)
        return AIMessage(content, tool_calls=calls, invalid_tool_calls=broken)


class FunctionDefinition(_Strict):
    """A tool: name, what it does, JSON Schema of its arguments. strict: always so here."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolDefinition(_Strict):
    """A tool as OpenAI writes it."""

    type: Literal["function"]
    function: FunctionDefinition

    def openai(self) -> dict[str, Any]:
        """The definition as a plain dict, without what was left out."""
        return {"type": "function", "function": self.function.model_dump(exclude_none=True, exclude={"strict"})}


class FunctionName(_Strict):
    """The name of a tool."""

    name: Text


class NamedChoice(_Strict):
    """The one tool to call."""

    type: Literal["function"]
    function: FunctionName


class SchemaFormat(_Strict):
    """A JSON Schema for the answer. strict: always so here."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(_Strict):
    """What the answer looks like: text, any JSON object, or one that fits a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with the type json_schema, and with no other")
        return self


class StreamOptions(_Strict):
    """include_usage: send a last chunk with the usage. include_obfuscation: changes nothing here."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ChatRequest(_Strict):
    """The body of POST /v1/chat/completions."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    tools: list[ToolDefinition] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedChoice | None = None
    response_format: ResponseFormat | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=0)] = None
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    stop: str | list[str] | None = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    # They change nothing: calls come one at a time, nothing is stored, and there is one way to serve.
    parallel_tool_calls: bool | None = None
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    # They ask for what this model can't do, unless they ask for nothing.
    n: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None
    functions: Any = None
    function_call: Any = None

    @field_validator("n")
    @classmethod
    def _one(cls, value: int | None) -> int | None:
        if value not in (None, 1):
            raise ValueError("one choice a request; leave it out, or send several requests")
        return value

    @field_validator("logprobs", "top_logprobs", "frequency_penalty", "presence_penalty")
    @classmethod
    def _off(cls, value: Any) -> Any:
        if value:
            raise ValueError("not supported by this server; leave it out")
        return value

    @field_validator("logit_bias", "audio", "prediction", "web_search_options", "functions", "function_call")
    @classmethod
    def _empty(cls, value: Any) -> Any:
        if value:
            raise ValueError("not supported by this server; leave it out (functions are given as tools)")
        return value

    @field_validator("modalities")
    @classmethod
    def _text_only(cls, value: Any) -> Any:
        if value not in (None, ["text"]):
            raise ValueError('this model writes text only; leave it out, or send ["text"]')
        return value

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, list) and len(value) > 4:
            raise ValueError("at most four stop texts")
        return value

    @model_validator(mode="after")
    def _fits(self) -> "ChatRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream: true only")
        return self

    @property
    def choice(self) -> str:
        """The tool choice as `LoRAGenChatModel` takes it."""
        given = self.tool_choice or "auto"
        return given if isinstance(given, str) else given.function.name

    @property
    def stops(self) -> list[str]:
        """The stop texts."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def settings(self) -> dict[str, Any]:
        """Sampling settings of `LoRAGenChatModel`; None where the server's own hold."""
        most = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        sampling = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "seed")}
        return {"max_tokens": most, **sampling}

    @property
    def conversation(self) -> Sequence[BaseMessage]:
        """The messages as LangChain's."""
        return [message.read() for message in self.messages]


_MODELS: tuple[type[BaseModel], ...] = (
    *(ChatRequest, Message, MadeCall, CalledFunction, ToolDefinition, FunctionDefinition, NamedChoice, FunctionName),
    *(ResponseFormat, SchemaFormat, StreamOptions),
)
_FIELDS = frozenset(field.alias or name for model in _MODELS for name, field in model.model_fields.items())


def read_chat_request(body: Any) -> ChatRequest:
    """Check the body of a chat request.

    Args:
        body: what its JSON says.

    Raises:
        ApiError: status 400, with the first field that is wrong.
    """
    if not isinstance(body, Mapping):
        raise ApiError(400, "the body is no JSON object; expected model and messages", code="invalid_value")
    try:
        return ChatRequest.model_validate(body)
    except ValidationError as error:
        raise validation_error(error, _FIELDS) from error
