"""`LoRAGenChatModel`: a specialised local model as a LangChain chat model.

The class adds LangChain's interface to the rooms below: binding of tools, streaming, async forms, usage. The
fields, and how they are written down, are in `fields`; how messages become a prompt is in `messages`, how a step is
decoded in `steps`, how a registry becomes a model in `specialization`.
"""

import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from operator import itemgetter
from typing import Any, Literal

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.runnables.config import run_in_executor
from langchain_core.tools import BaseTool
from pydantic import BaseModel

from loragen_agents.chat.fields import ChatModelFields
from loragen_agents.chat.messages import last_chunk, read_conversation, step_message
from loragen_agents.chat.profile import name_of
from loragen_agents.chat.settings import (
    SETTINGS,
    CallSettings,
    openai_dicts,
    read_registry,
    read_settings,
    read_tool_choice,
)
from loragen_agents.chat.steps import StepOutcome, decode_step
from loragen_agents.chat.structured_output import output_parser, schema_tool
from loragen_agents.conversation.react import AnswerDelta, StepEvent
from loragen_agents.conversation.renderers import shared_renderer
from loragen_agents.edge.grammar_source import grammar_source
from loragen_agents.errors import PromptError
from loragen_agents.models.language_models import LanguageModel
from loragen_agents.registry import ToolRegistry
from loragen_agents.specialization.cloud import is_service, specialize_by_service
from loragen_agents.specialization.shared_models import shared_generator, shared_language_model
from loragen_agents.specialization.specialize import Specialization, specialize

ToolLike = dict[str, Any] | type | Callable[..., Any] | BaseTool


class LoRAGenChatModel(ChatModelFields):
    """A small local model that has a tool registry in its weights and reads the user's turn only.

    The tools (and the system messages) are turned into LoRA weights by the generator, once, and merged into the edge
    model. From then on prompts hold neither definitions nor system text.

    Set-up:
        `pip install loragen-agents`. The default model is fetched and converted on first use (about 100 MB); no key
        and no server are needed.

        ```python
        from loragen_agents import LoRAGenChatModel

        model = LoRAGenChatModel(temperature=0, max_tokens=256)
        ```

    Invoke:
        ```python
        message = model.invoke([("system", "Answer in one sentence."), ("human", "What is a LoRA?")])
        message.text
        message.usage_metadata  # {'input_tokens': ..., 'output_tokens': ..., 'total_tokens': ..., ...}
        message.response_metadata  # compression ratio, milliseconds to specialise and to first token, ...
        ```

    Stream:
        ```python
        for chunk in model.stream("Name three rivers."):
            print(chunk.text, end="")
        ```

        `ainvoke` and `astream` work as usual. Closing a stream, or cancelling the task that awaits it, stops the
        decoding. Words stream as they are decoded; a tool call comes as one chunk, once all of it has been checked.

    Batch:
        ```python
        model.batch(["Name a river.", "Name a lake."], config={"max_concurrency": 2}, return_exceptions=True)
        ```

        `batch` and `abatch` invoke the model once for each input, `batch` in threads. So each input has its own
        callbacks, trace, cache look-up, errors and figures. They are not decoded together: in 16-bit dtypes the last
        bits of a sum depend on how many sequences a pass holds, and an answer must not depend on the other inputs.

    Tool calling:
        ```python
        def multiply(a: int, b: int) -> int:
            '''Multiply two whole numbers.'''
            return a * b

        bound = model.bind_tools([multiply])  # or LoRAGenChatModel(tools=[multiply])
        bound.invoke("What is 6 times 7?").tool_calls
        # [{'name': 'multiply', 'args': {'a': 6, 'b': 7}, 'id': 'call_...', 'type': 'tool_call'}]
        ```

        `tool_choice` is "auto" (the model decides), "any" (some tool), "none" (an answer) or a tool's name. A call
        always fits its tool's schema as long as `grammar` is on. What can't be read (a call cut off by `max_tokens`,
        free text without the grammar) is found in `invalid_tool_calls`, with the reason.

    Structured output:
        ```python
        from pydantic import BaseModel

        class Person(BaseModel):
            '''A person in the text.'''
            name: str
            age: int

        model.with_structured_output(Person).invoke("Ada Lovelace is 36.")  # Person(name='Ada Lovelace', age=36)
        ```

    In an agent:
        ```python
        from langchain.agents import create_agent

        agent = create_agent(model, tools=[multiply], system_prompt="You are a careful clerk.")
        ```

    `langchain.chat_models.init_chat_model` takes a closed list of providers, which this package can't join; wherever
    LangChain takes a model's name it takes a model too, so hand over an instance.
    """

    # Binding

    def bind_tools(
        self, tools: Sequence[ToolLike], *, tool_choice: str | dict[str, Any] | bool | None = None, **kwargs: Any
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """A model specialised on `tools`, in the place of those of the constructor.

        Args:
            tools: any form that `ToolRegistry.from_tools` takes; two equal definitions count once.
            tool_choice: "auto", "any" (also "required" and True), "none" (also False), a tool's name, or OpenAI's dict.
            kwargs: bound along with the tools, for instance `temperature`; `strict` and `parallel_tool_calls` change
                nothing, as calls are always held to their schema and come one at a time.

        Raises:
            RegistryError: a tool that can't be used, by name.
            GrammarError: a tool that no call can be right for, by name, where the grammar is on.
            PromptError: `tool_choice` names no tool of these.
        """
        definitions = openai_dicts(tools)
        if kwargs.get("grammar", self.grammar):
            grammar_source(read_registry(definitions, self.input_format), "auto")
        if tool_choice is not None:
            names = [definition["function"]["name"] for definition in definitions]
            kwargs["tool_choice"] = read_tool_choice(tool_choice, names)
        return self.bind(tools=definitions, **kwargs)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type,
        *,
        include_raw: bool = False,
        method: Literal["json_schema", "function_calling", "json_mode"] = "json_schema",
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, dict[str, Any] | BaseModel]:
        """A model that gives an object of `schema`: its tool call is forced, and held to the schema by the grammar.

        The runnable raises OutputParserException when the object could not be read, for instance because `max_tokens`
        cut it off.

        Args:
            schema: a pydantic class (the result is an instance), a TypedDict, a JSON Schema or an OpenAI tool (a dict).
            include_raw: give `{"raw": message, "parsed": object or None, "parsing_error": exception or None}`.
            method: taken for LangChain's sake; the way is the same for all.
            strict: taken for LangChain's sake; the object always fits the schema.
            kwargs: bound along, for instance `temperature`.

        Raises:
            RegistryError: LangChain can't read the schema as a tool.
            ValueError: there is no such method.
        """
        if method not in ("json_schema", "function_calling", "json_mode"):
            raise ValueError(f"unknown method {method!r}: expected json_schema, function_calling or json_mode")
        definition = schema_tool(schema)
        name = definition["function"]["name"]
        bound = self.bind_tools(
            [definition],
            tool_choice=name,
            grammar=True,
            ls_structured_output_format={"kwargs": {"method": method, "strict": strict}, "schema": schema},
            **kwargs,
        )
        parser = output_parser(schema, name)
        if not include_raw:
            return bound | parser
        parse = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
        failed = RunnablePassthrough.assign(parsed=lambda _: None)
        return RunnableMap(raw=bound) | parse.with_fallbacks([failed], exception_key="parsing_error")

    # Running

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return self._invoke(messages, stop, kwargs, threading.Event())

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        cancel = threading.Event()
        try:
            return await run_in_executor(None, self._invoke, messages, stop, kwargs, cancel)
        finally:
            cancel.set()  # where the task was cancelled, the thread is still decoding

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        cancel = threading.Event()
        try:
            for chunk in self._chunks(messages, stop, kwargs, cancel):
                if run_manager:
                    run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk
        finally:
            cancel.set()

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        cancel = threading.Event()
        chunks = self._chunks(messages, stop, kwargs, cancel)
        try:
            while (chunk := await run_in_executor(None, next, chunks, None)) is not None:
                if run_manager:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk
        finally:
            cancel.set()

    def _invoke(
        self, messages: list[BaseMessage], stop: list[str] | None, kwargs: dict[str, Any], cancel: threading.Event
    ) -> ChatResult:
        outcome = None
        for event in self.steps(messages, stop, cancel, **kwargs):
            if isinstance(event, StepOutcome):
                outcome = event
        assert outcome is not None
        message = step_message(outcome.step)
        message.response_metadata, message.usage_metadata = outcome.metadata, outcome.usage
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _chunks(
        self, messages: list[BaseMessage], stop: list[str] | None, kwargs: dict[str, Any], cancel: threading.Event
    ) -> Iterator[ChatGenerationChunk]:
        for event in self.steps(messages, stop, cancel, **kwargs):
            if isinstance(event, AnswerDelta):
                yield ChatGenerationChunk(message=AIMessageChunk(content=event.text))
            if not isinstance(event, StepOutcome):
                continue
            last = last_chunk(event.step)
            last.response_metadata, last.usage_metadata = event.metadata, event.usage
            yield ChatGenerationChunk(message=last)

    def steps(
        self,
        messages: Sequence[BaseMessage],
        stop: Sequence[str] | None = None,
        cancel: threading.Event | None = None,
        **kwargs: Any,
    ) -> "Generator[StepEvent | StepOutcome, None, None]":
        """Decode one step of the model; for callers who want a call's name and input while it is written.

        Closing the iterator stops the decoding.

        Args:
            messages: the conversation.
            stop: texts that end an answer; by default the field's.
            cancel: set it, from any thread, to stop before the next token; the outcome then has what was written.
            kwargs: settings of this call in the place of the fields, as `bind` takes them.

        Yields:
            What has become certain (`ActionKnown` and `InputDelta` of a call, `AnswerDelta` of an answer), then the
            outcome. A call of which parts were given may still turn out invalid in the outcome.

        Raises:
            PromptError: the messages or a setting can't be used.
            RegistryError: a tool that can't be used.
            GrammarError: the tools or the tool choice can't be turned into a grammar.
        """
        started = time.perf_counter()
        call = self.call_settings(stop, **kwargs)
        conversation = read_conversation(messages, call.registry)
        specialization = self._specialize(call.model, call.registry, conversation.system_text)
        names = {
            "model_name": name_of(call.model),
            "model_provider": "loragen_agents",
            "generator": name_of(self.generator),
        }
        yield from decode_step(call, conversation, specialization, names, cancel, started)

    def call_settings(self, stop: Sequence[str] | None = None, **kwargs: Any) -> CallSettings:
        """What a call goes by: the fields, or the arguments of the call in their place. Loads nothing.

        Args:
            stop: texts that end an answer; by default the field's.
            kwargs: settings of the call, as `bind` takes them.

        Raises:
            PromptError: a setting can't be used.
            RegistryError: a tool that can't be used.
            GrammarError: a tool that no call can be right for, where the grammar is on.
        """
        fields = {name: getattr(self, name) for name in SETTINGS}
        return read_settings(fields, kwargs, self.stop if stop is None else stop, self.input_format)

    def _specialize(self, model: str | LanguageModel, registry: ToolRegistry, system_text: str) -> Specialization:
        edge = self._language_model(model)
        if isinstance(self.cloud, str) and is_service(self.cloud):
            kept = self.specialization_cache
            return specialize_by_service(self.cloud, registry, system_text, edge=edge, cache=kept)
        cloud = edge if self.cloud is None else self._language_model(self.cloud)
        generator = self.generator
        if isinstance(generator, str):
            generator = shared_generator(generator, cloud=cloud, edge=edge)
        cache = self.specialization_cache
        return specialize(registry, system_text, edge=edge, cloud=cloud, generator=generator, cache=cache)

    def _language_model(self, given: str | LanguageModel) -> LanguageModel:
        if isinstance(given, str):
            return shared_language_model(given, device=self.device, dtype=self.dtype)
        if not isinstance(given, LanguageModel):
            raise PromptError(f"model is {given!r}; expected a model's name or a LanguageModel")
        return given

    # Counting tokens

    def get_token_ids(self, text: str) -> list[int]:
        """Token ids of `text` by the edge LM's tokenizer; control tokens in it are plain text. Loads the model."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        return shared_renderer(self._language_model(self.model).tokenizer).encode_text(text)

    def get_num_tokens_from_messages(
        self, messages: Sequence[BaseMessage], tools: Sequence[ToolLike] | None = None
    ) -> int:
        """Tokens of the edge prompt for `messages`, in which neither system messages nor tools take any."""
        definitions = self.tools if tools is None else list(tools)
        conversation = read_conversation(messages, read_registry(definitions, self.input_format))
        return len(shared_renderer(self._language_model(self.model).tokenizer).user_turn(conversation.turns))
