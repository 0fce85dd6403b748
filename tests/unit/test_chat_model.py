"""The chat model on tiny random models: whatever these say, LangChain's shape must hold."""

import asyncio
import json
import pickle
import threading
import time
from collections.abc import Iterator
from typing import Any, Literal

import pytest
from langchain.chat_models import init_chat_model
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler, UsageMetadataCallbackHandler
from langchain_core.exceptions import OutputParserException
from langchain_core.load import dumpd, load
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage, ToolMessage
from langchain_core.utils.function_calling import convert_to_openai_tool as openai_dict
from pydantic import BaseModel, ValidationError
from typing_extensions import TypedDict

from loragen_agents import LoRAGenChatModel, ToolRegistry
from loragen_agents.conversation.react import ActionKnown, AnswerDelta, InputDelta
from loragen_agents.errors import PromptError, RegistryError
from loragen_agents.specialization import shared_models
from loragen_agents.specialization import specialize as specialization
from tests.tiny_chat import tiny_generator, tiny_language_model


def roll() -> int:
    """Roll a die."""
    return 4


def pick(number: Literal[3], colour: Literal["red"]) -> str:
    """Pick a number and a colour."""
    return f"{number} {colour}"


def choose(number: Literal[1, 2]) -> int:
    """Choose a number."""
    return number


def write(text: str) -> str:
    """Write a text."""
    return text


class Choice(BaseModel):
    """What was chosen."""

    number: Literal[3]
    colour: Literal["red"] = "red"


class Note(BaseModel):
    """A note."""

    text: str


class Fields(TypedDict):
    """What was chosen."""

    number: Literal[3]


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, Any]:
    edge = tiny_language_model(tmp_path_factory.mktemp("tiny") / "edge")
    return {"model": edge, "generator": tiny_generator(edge)}


@pytest.fixture(autouse=True)
def nothing_in_memory() -> Iterator[None]:
    specialization.forget_specializations()
    yield
    specialization.forget_specializations()


@pytest.fixture
def model(parts) -> LoRAGenChatModel:
    """Its answers are short; a call of `pick` or `roll`, which takes more tokens, is forced and costs no decoding."""
    return LoRAGenChatModel(**parts, max_tokens=16)


@pytest.fixture
def caller(model) -> LoRAGenChatModel:
    return model.model_copy(update={"max_tokens": 64})


def merged(chunks) -> AIMessageChunk:
    chunks = list(chunks)
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole = whole + chunk
    assert chunks[-1].chunk_position == "last"
    return whole


def said(message: Any) -> tuple[Any, ...]:
    """What a message says, without the figures and ids that differ from call to call."""
    calls = [(call["name"], call["args"]) for call in [*message.tool_calls, *message.invalid_tool_calls]]
    return message.text, calls, message.usage_metadata["output_tokens"]


def test_an_answer_with_its_figures(model):
    message = model.invoke("Hello")
    assert message.text
    assert message.tool_calls == message.invalid_tool_calls == []
    facts, usage = message.response_metadata, message.usage_metadata
    assert (
        usage["input_tokens"] == facts["prompt_tokens"] == model.get_num_tokens_from_messages([HumanMessage("Hello")])
    )
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert facts["definition_tokens"] > 0
    assert facts["compression_ratio"] == round(1 + facts["definition_tokens"] / facts["prompt_tokens"], 2)
    assert facts["model_name"] == model.model.name
    assert facts["finish_reason"] in ("stop", "length")
    assert facts["specialize_ms"] > 0
    assert facts["first_token_ms"] > 0
    assert "left_out" not in facts


def test_specialising_happens_once(model):
    first = model.invoke("Hello").response_metadata
    again = model.invoke("Hello there").response_metadata
    assert (first["specialization"], again["specialization"]) == ("generated", "memory")
    assert again["specialize_ms"] == 0
    other = model.bind_tools([roll]).invoke("Hello").response_metadata
    assert other["specialization"] == "generated"
    assert other["definition_tokens"] > first["definition_tokens"]


def test_system_messages_are_compressed(model):
    bare = model.invoke([HumanMessage("Hello")])
    held = model.invoke([SystemMessage("You speak like a pirate, always."), HumanMessage("Hello")])
    assert held.usage_metadata["input_tokens"] == bare.usage_metadata["input_tokens"]
    assert held.response_metadata["definition_tokens"] != bare.response_metadata["definition_tokens"]
    assert held.response_metadata["specialization"] == "generated"


@pytest.mark.parametrize(
    "choice", ["pick", "any", "required", True, {"type": "function", "function": {"name": "pick"}}]
)
def test_a_forced_call(caller, choice):
    message = caller.bind_tools([pick], tool_choice=choice).invoke("Hello")
    assert [(call["name"], call["args"]) for call in message.tool_calls] == [("pick", {"number": 3, "colour": "red"})]
    assert message.text == ""
    assert message.response_metadata["finish_reason"] == "stop"


@pytest.mark.parametrize("choice", ["none", False])
def test_a_forbidden_call(model, choice):
    request = "Yes\nAction: roll\nAction Input: {}\nObservation: 4\nThought: Do I need to use a tool? Yes\nAction: roll"
    message = model.bind_tools([roll], tool_choice=choice).invoke(request)
    assert message.text
    assert message.tool_calls == message.invalid_tool_calls == []


def test_tools_of_the_constructor_and_bound_ones(parts):
    model = LoRAGenChatModel(**parts, tools=[roll], tool_choice="any", max_tokens=64)
    assert [tool["function"]["name"] for tool in model.tools] == ["roll"]
    assert [call["name"] for call in model.invoke("Hi").tool_calls] == ["roll"]
    assert [call["name"] for call in model.bind_tools([pick]).invoke("Hi").tool_calls] == ["pick"]


def test_a_registry_brings_its_input_format(parts):
    registry = ToolRegistry.from_tools([pick], input_format="csv")
    model = LoRAGenChatModel(**parts, tools=registry, tool_choice="pick", max_tokens=64)
    assert model.input_format == "csv"
    assert model.invoke("Hi").tool_calls[0]["args"] == {"number": 3, "colour": "red"}
    with pytest.raises(ValidationError, match="inputs are csv, not json"):
        LoRAGenChatModel(**parts, tools=registry, input_format="json")


@pytest.mark.parametrize("options", [{}, {"tool_choice": "pick", "max_tokens": 64}, {"tool_choice": "write"}])
async def test_all_ways_to_run_say_the_same(model, options):
    bound = model.bind_tools([pick, write], **options)
    expected = said(bound.invoke("Hello"))
    assert said(merged(bound.stream("Hello"))) == expected
    assert said(await bound.ainvoke("Hello")) == expected
    assert said(merged([chunk async for chunk in bound.astream("Hello")])) == expected
    assert [said(one) for one in bound.batch(["Hello", "Hello"])] == [expected] * 2
    assert [said(one) for one in await bound.abatch(["Hello", "Hello"])] == [expected] * 2


def test_figures_come_once_in_a_stream(model):
    chunks = list(model.stream("Hello"))
    assert len(chunks) > 2
    assert [bool(chunk.usage_metadata) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert merged(chunks).response_metadata["model_name"] == model.model.name


def test_what_cannot_be_read_is_invalid(caller):
    bound = caller.bind_tools([write], tool_choice="write", max_tokens=12)
    message = bound.invoke("Hello")
    assert message.tool_calls == []
    (failed,) = message.invalid_tool_calls
    assert (failed["name"], failed["error"]) == ("write", message.response_metadata["invalid_step"])
    assert message.response_metadata["finish_reason"] == "length"
    streamed = merged(bound.stream("Hello"))
    assert streamed.tool_calls == []
    assert streamed.invalid_tool_calls[0]["args"] == failed["args"]
    assert streamed.response_metadata["invalid_step"] == failed["error"]


def test_free_decoding_of_a_random_model_is_no_call(model):
    message = model.bind_tools([write], grammar=False).invoke("Hello")
    assert message.tool_calls == []
    assert message.text or message.invalid_tool_calls


def test_stop_texts_end_an_answer(model):
    whole = model.invoke("Hello").text
    stop = whole[len(whole) // 2 :][:2]
    short = model.invoke("Hello", stop=[stop])
    assert short.text == whole[: whole.index(stop)]
    assert short.response_metadata["finish_reason"] == "stop"
    assert merged(model.stream("Hello", stop=[stop])).text == short.text
    assert model.model_copy(update={"stop": [stop]}).invoke("Hello").text == short.text
    # The lines of the step itself are no part of the answer.
    assert (
        model.bind_tools([pick], tool_choice="any", max_tokens=64).invoke("Hello", stop=["Action", "Input"]).tool_calls
    )


def test_sampling(model):
    hot = model.model_copy(update={"temperature": 1.0, "seed": 1})
    assert hot.invoke("Hello").text == hot.invoke("Hello").text
    assert len({hot.invoke("Hello", seed=seed).text for seed in range(4)}) > 1
    with pytest.raises(ValueError, match="temperature"):
        model.invoke("Hello", temperature=-1)


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_structured_output(caller, method):
    structured = caller.with_structured_output(Choice, method=method)
    assert structured.invoke("Hello") == Choice(number=3)
    assert list(structured.stream("Hello"))[-1] == Choice(number=3)
    assert caller.with_structured_output(Fields, method=method).invoke("Hello") == {"number": 3}
    parsed = caller.with_structured_output(Choice.model_json_schema(), method=method).invoke("Hello")
    assert parsed in ({"number": 3}, {"number": 3, "colour": "red"})


async def test_structured_output_that_was_cut_off_is_an_error(model):
    structured = model.with_structured_output(Note, max_tokens=12)
    with pytest.raises(OutputParserException, match="could not be read"):
        structured.invoke("Hello")
    with pytest.raises(OutputParserException, match="could not be read"):
        list(structured.stream("Hello"))
    with pytest.raises(OutputParserException, match="could not be read"):
        await structured.ainvoke("Hello")
    both = model.with_structured_output(Note, include_raw=True, max_tokens=12).invoke("Hello")
    assert both["parsed"] is None
    assert isinstance(both["parsing_error"], OutputParserException)
    assert both["raw"].invalid_tool_calls


def test_structured_output_with_the_raw_message(caller):
    both = caller.with_structured_output(Choice, include_raw=True).invoke("Hello")
    assert (both["parsed"], both["parsing_error"]) == (Choice(number=3), None)
    assert both["raw"].tool_calls[0]["name"] == "Choice"
    with pytest.raises(ValueError, match="unknown method"):
        caller.with_structured_output(Choice, method="magic")
    with pytest.raises(RegistryError, match="structured output"):
        caller.with_structured_output({"no": "schema"})


def test_a_conversation_with_results(caller):
    first = caller.bind_tools([choose], tool_choice="choose").invoke("Hello")
    result = ToolMessage("3 red", tool_call_id=first.tool_calls[0]["id"])
    answer = caller.bind_tools([choose], tool_choice="none").invoke([HumanMessage("Hello"), first, result])
    assert answer.text
    usage = first.usage_metadata
    # The next prompt holds this one, what was said to it, and the result.
    assert answer.usage_metadata["input_tokens"] > usage["input_tokens"] + usage["output_tokens"]
    assert answer.usage_metadata["input_token_details"]["cache_read"] >= usage["input_tokens"] - 1


def test_what_the_prompt_leaves_out_is_said(model):
    history = [
        HumanMessage("Hello"),
        AIMessage("One moment.", tool_calls=[{"name": "roll", "args": {}, "id": "1"}]),
        ToolMessage("4", tool_call_id="1"),
    ]
    facts = model.bind_tools([roll]).invoke(history).response_metadata
    assert facts["left_out"] == ["message 2: an AI message's words before its tool call"]


@pytest.fixture
def decodings(monkeypatch) -> list[Any]:
    """The streams of all decodings."""
    streams: list[Any] = []
    original = specialization.SpecializedLM.stream

    def stream(*args, **kwargs):
        streams.append(original(*args, **kwargs))
        return streams[-1]

    monkeypatch.setattr(specialization.SpecializedLM, "stream", stream)
    return streams


LONG = 1500


def assert_stopped(streams: list[Any]) -> None:
    """The one decoding has ended before its time, or does so at its next token."""
    (stream,) = streams
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            completion = stream.completion
        except RuntimeError:
            time.sleep(0.01)
            continue
        assert completion.finish_reason == "cancelled"
        assert 0 < len(completion.token_ids) < LONG
        return
    raise AssertionError("the decoding goes on")


def test_closing_a_stream_stops_the_decoding(model, decodings):
    stream = model.stream("Hello", max_tokens=LONG)
    assert next(stream).text
    stream.close()
    assert_stopped(decodings)


async def test_closing_an_async_stream_stops_the_decoding(model, decodings):
    stream = model.astream("Hello", max_tokens=LONG)
    async for chunk in stream:
        assert chunk.text
        break
    await stream.aclose()
    assert_stopped(decodings)


async def test_cancelling_a_task_stops_the_decoding_and_the_loop_goes_on_meanwhile(model, decodings):
    model.invoke("Hello")  # specialised, so that what follows is decoding
    decodings.clear()
    task = asyncio.ensure_future(model.ainvoke("Hello", max_tokens=LONG))
    ticks = 0
    while not decodings or decodings[0]._sequence.tokens == []:
        await asyncio.sleep(0.001)
        ticks += 1
    for _ in range(20):
        await asyncio.sleep(0.001)
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert_stopped(decodings)


def test_registries_in_threads_do_not_see_each_other(model):
    requests = [(tools, f"Request {n}") for tools in ([pick], [roll, write], []) for n in range(3)]

    def ask(tools, request):
        return said(model.bind_tools(tools).invoke(request))

    alone = [ask(*request) for request in requests]
    specialization.forget_specializations()
    results: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda n=n, request=request: results.update({n: ask(*request)}))
        for n, request in enumerate(requests)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[n] for n in range(len(requests))] == alone


class _Tokens(BaseCallbackHandler):
    def __init__(self) -> None:
        self.tokens: list[str] = []

    def on_llm_new_token(self, token: Any, **kwargs: Any) -> None:
        self.tokens.append(token)


async def test_callbacks(model):
    handler, usage = _Tokens(), UsageMetadataCallbackHandler()
    text = merged(model.stream("Hello", config={"callbacks": [handler, usage]})).text
    assert "".join(handler.tokens) == text
    assert usage.usage_metadata[model.model.name]["output_tokens"] > 0
    streaming, handler = model.model_copy(), _Tokens()
    streaming.streaming = True
    assert streaming.invoke("Hello", config={"callbacks": [handler]}).text == text == "".join(handler.tokens)
    events = [event["event"] async for event in model.astream_events("Hello", version="v2")]
    assert events[0] == "on_chat_model_start"
    assert events[-1] == "on_chat_model_end"
    assert events.count("on_chat_model_stream") > 2


def test_langchains_response_cache(model, decodings):
    cached = model.model_copy(update={"cache": InMemoryCache(), "max_tokens": 64})
    bound = cached.bind_tools([pick], tool_choice="pick")
    first, again = bound.invoke("Hello"), bound.invoke("Hello")
    assert first.tool_calls == again.tool_calls
    assert len(decodings) == 1
    cached.bind_tools([pick], tool_choice="none").invoke("Hello")
    assert len(decodings) == 2


def test_steps_give_a_call_while_it_is_written(caller):
    *events, outcome = caller.steps([HumanMessage("Hello")], tools=[openai_dict(pick)], tool_choice="pick")
    assert events[0] == ActionKnown("pick")
    assert all(isinstance(event, InputDelta) for event in events[1:])
    assert json.loads("".join(event.text for event in events[1:])) == {"number": 3, "colour": "red"}
    assert outcome.step.arguments == {"number": 3, "colour": "red"}
    assert outcome.usage["output_tokens"] > 0


def test_steps_end_where_they_are_cancelled(model):
    cancel = threading.Event()
    steps = model.steps([HumanMessage("Hello")], None, cancel)
    first = next(steps)
    cancel.set()
    *_, outcome = steps
    assert isinstance(first, AnswerDelta)
    assert outcome.metadata["finish_reason"] == "cancelled"
    assert outcome.usage["output_tokens"] < 16


def test_serialisation(parts):
    model = LoRAGenChatModel(**parts, tools=[pick], tool_choice="pick", seed=3, stop=["x"])
    written = dumpd(model)
    assert written["kwargs"]["model"] == parts["model"].name
    assert written["kwargs"]["generator"].startswith("generator ")
    back = load(written, allowed_objects=[LoRAGenChatModel], valid_namespaces=["loragen_agents"])
    assert back.asdict() == model.asdict()
    assert back.tools == model.tools


def test_pickling_takes_the_settings_and_no_weights(parts):
    model = LoRAGenChatModel(**parts, tools=[pick], max_tokens=7)
    model.invoke("Hello")
    pickled = pickle.dumps(model)
    assert len(pickled) < 5000
    back = pickle.loads(pickled)
    assert (back.model, back.max_tokens, back.tools) == (parts["model"].name, 7, model.tools)
    assert model.model is parts["model"]


def test_making_a_model_loads_nothing():
    loaded = list(shared_models._language_models._used)
    assert LoRAGenChatModel().asdict()["model"] == "smollm2-135m-instruct"
    assert list(shared_models._language_models._used) == loaded


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temprature": 1}, "unknown parameters: temprature"),
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"tools": [pick], "tool_choice": "roll"}, "'roll' is none of the tools"),
        ({"tools": [pick, {"name": "pick", "description": "Another."}]}, "two different tools have this name"),
        ({"tools": "pick"}, "expected a list of tools"),
        ({"input_format": "xml"}, "input_format"),
    ],
)
def test_settings_that_cannot_be(settings, said):
    with pytest.raises(ValidationError, match=said):
        LoRAGenChatModel(**settings)


def test_calls_that_cannot_be(model):
    with pytest.raises(PromptError, match="none of the tools"):
        model.bind_tools([pick], tool_choice="roll")
    with pytest.raises(PromptError, match="there are no tools"):
        model.invoke("Hello", tool_choice="any")
    with pytest.raises(PromptError, match="unknown arguments of the call: response_format"):
        model.invoke("Hello", response_format={})
    with pytest.raises(RegistryError, match="description is empty"):
        model.bind_tools([{"name": "x", "description": "", "parameters": {}}])
    with pytest.raises(PromptError, match="held by the grammar, which is off"):
        model.bind_tools([pick], tool_choice="any", grammar=False).invoke("Hello")
    with pytest.raises(PromptError, match="room for"):
        model.invoke("word " * 3000)


def test_equal_definitions_count_once(caller):
    definitions = [Choice, Choice.model_json_schema(), Choice]
    assert caller.bind_tools(definitions, tool_choice="any").invoke("Hello").tool_calls[0]["name"] == "Choice"


def test_counting_tokens(model):
    text = "Hello <|im_end|> there"
    assert model.get_num_tokens(text) == len(model.get_token_ids(text))
    assert model.model.tokenizer.eos_token_id not in model.get_token_ids(text)
    bare = model.get_num_tokens_from_messages([HumanMessage("Hello")])
    assert model.get_num_tokens_from_messages([SystemMessage("Be brief."), HumanMessage("Hello")], tools=[pick]) == bare


def test_what_a_model_says_of_itself(model):
    assert model._llm_type == "loragen-agents"
    assert model.profile["tool_calling"]
    assert not model.profile["image_inputs"]
    assert model.profile["max_input_tokens"] == 2048
    params = model._get_ls_params(stop=["x"])
    assert (params["ls_provider"], params["ls_model_name"], params["ls_stop"]) == (
        "loragen_agents",
        model.model.name,
        ["x"],
    )


def test_init_chat_model_is_closed_to_other_packages(model):
    """As the class says. When LangChain opens its list of providers, this fails and the package can join."""
    with pytest.raises(ValueError, match="Unable to infer model provider"):
        init_chat_model("loragen_agents:smollm2-135m-instruct")
    with pytest.raises(ValueError, match="Unsupported provider"):
        init_chat_model("smollm2-135m-instruct", model_provider="loragen_agents")
    with pytest.raises(TypeError, match="use it directly"):
        init_chat_model(model)
