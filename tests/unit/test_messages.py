"""Messages to turns and steps to messages: everything arrives, in order, or is named as left out or refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    ChatMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
)

from loragen_agents.chat.messages import AnswerText, last_chunk, read_conversation, step_message
from loragen_agents.conversation.prompts import TakenStep, Turn
from loragen_agents.conversation.react import Answer, InvalidStep, ToolStep
from loragen_agents.errors import PromptError
from loragen_agents.registry import Tool, ToolRegistry

ADD = Tool(
    name="add",
    description="Add two numbers.",
    parameters={
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
    },
)
REGISTRY = ToolRegistry([ADD])


def call(identifier: str | None = "1", name: str = "add", **arguments):
    return {"name": name, "args": arguments, "id": identifier, "type": "tool_call"}


def turns(*messages):
    return read_conversation(messages, REGISTRY).turns


def test_system_messages_are_joined_and_stand_in_no_turn():
    read = read_conversation(
        [
            SystemMessage("Be brief."),
            HumanMessage("Hi"),
            AIMessage("Hello"),
            SystemMessage("Be kind."),
            HumanMessage("Now"),
        ],
        REGISTRY,
    )
    assert read.system_text == "Be brief.\n\nBe kind."
    assert read.turns == (Turn("Hi", (), "Hello"), Turn("Now"))
    assert read.left_out == ()


def test_messages_of_one_side_in_a_row_are_joined():
    assert turns(
        HumanMessage("one"), HumanMessage("two"), AIMessage("three"), AIMessage("four"), HumanMessage("five")
    ) == (Turn("one\n\ntwo", (), "three\n\nfour"), Turn("five"))


def test_a_greeting_before_the_first_request_is_kept():
    assert turns(AIMessage("How can I help?"), HumanMessage("Hi")) == (Turn("", (), "How can I help?"), Turn("Hi"))


def test_calls_and_their_results_become_steps_in_the_order_of_the_calls():
    assert turns(
        HumanMessage("1+2 and 3+4"),
        AIMessage("", tool_calls=[call("x", a=1, b=2), call("y", b=4, a=3)]),
        ToolMessage("7", tool_call_id="y"),
        ToolMessage("3", tool_call_id="x"),
    ) == (
        Turn(
            "1+2 and 3+4",
            (TakenStep("add", '{"a": 1, "b": 2}', "3"), TakenStep("add", '{"a": 3, "b": 4}', "7")),
        ),
    )


def test_inputs_are_written_in_the_registrys_format():
    registry = ToolRegistry([ADD], input_format="csv")
    messages = [HumanMessage("x"), AIMessage("", tool_calls=[call(a=1, b=2)]), ToolMessage("3", tool_call_id="1")]
    assert read_conversation(messages, registry).turns[0].steps[0].action_input == "1, 2"


@pytest.mark.parametrize(
    "made", [call(a=1), call(a="x", b=[1]), call(name="elsewhere", q="y")], ids=["incomplete", "wrong types", "unknown"]
)
def test_calls_that_the_registry_would_refuse_are_shown_as_they_were_made(made):
    (turn,) = turns(
        HumanMessage("x"), AIMessage("", tool_calls=[made]), ToolMessage("no", tool_call_id="1", status="error")
    )
    assert turn.steps[0].action == made["name"]
    assert json.loads(turn.steps[0].action_input) == made["args"]
    assert turn.steps[0].observation == "Error: no"


def test_an_error_is_not_called_error_twice():
    (turn,) = turns(
        HumanMessage("x"),
        AIMessage("", tool_calls=[call(a=1, b=2)]),
        ToolMessage("Error: overflow", tool_call_id="1", status="error"),
    )
    assert turn.steps[0].observation == "Error: overflow"


def test_a_call_that_could_not_be_read_is_a_step_that_failed():
    broken = AIMessage(
        "",
        invalid_tool_calls=[
            {"name": "add", "args": '{"a":\n 1', "id": "1", "error": "cut off", "type": "invalid_tool_call"},
            {"name": None, "args": "?", "id": "2", "error": "what", "type": "invalid_tool_call"},
        ],
    )
    read = read_conversation([HumanMessage("x"), broken, HumanMessage("again")], REGISTRY)
    assert read.turns == (Turn("x", (TakenStep("add", '{"a": 1', "Error: cut off"),), ""), Turn("again"))
    assert read.left_out == ("message 2: a tool call that could not be read and has no name",)


def test_a_request_after_a_result_opens_a_turn():
    assert turns(
        HumanMessage("x"),
        AIMessage("", tool_calls=[call(a=1, b=2)]),
        ToolMessage("3", tool_call_id="1"),
        HumanMessage("never mind"),
    ) == (Turn("x", (TakenStep("add", '{"a": 1, "b": 2}', "3"),), ""), Turn("never mind"))


def test_names_and_roles():
    messages = HumanMessage("hi", name="Ann"), AIMessage("yes", name="bot"), ChatMessage(content="more", role="User")
    assert turns(*messages) == (Turn("Ann: hi", (), "yes"), Turn("more"))
    assert (
        read_conversation([ChatMessage(content="Be brief.", role="developer"), HumanMessage("x")], REGISTRY).system_text
        == "Be brief."
    )


def test_text_blocks_of_all_kinds_are_read():
    read = read_conversation(
        [
            HumanMessage([{"type": "text", "text": "one"}, "two", {"text": "three"}]),
            AIMessage([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]),
            HumanMessage("x"),
            AIMessage(
                [{"type": "reasoning", "reasoning": "hm"}, {"type": "tool_use", "id": "1", "name": "add", "input": {}}],
                tool_calls=[call(a=1, b=2)],
            ),
            ToolMessage([{"type": "json", "json": {"sum": 3}}], tool_call_id="1"),
        ],
        REGISTRY,
    )
    assert read.turns == (
        Turn("one\ntwo\nthree", (), "ab"),
        Turn("x", (TakenStep("add", '{"a": 1, "b": 2}', '{"sum": 3}'),)),
    )
    assert read.left_out == ("message 4: an AI message's reasoning",)


def test_words_beside_a_call_are_named_as_left_out():
    read = read_conversation(
        [HumanMessage("x"), AIMessage("Let me see.", tool_calls=[call(a=1, b=2)]), ToolMessage("3", tool_call_id="1")],
        REGISTRY,
    )
    assert read.left_out == ("message 2: an AI message's words before its tool call",)
    assert read.turns[0].request == "x"


ASK, CALL, RESULT = HumanMessage("x"), AIMessage("", tool_calls=[call(a=1, b=2)]), ToolMessage("3", tool_call_id="1")


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "no human message"),
        ([SystemMessage("Be brief.")], "no human message"),
        ([ASK, AIMessage("done")], "ends with an AI message"),
        ([ASK, CALL], "has no tool message before the end"),
        ([ASK, CALL, HumanMessage("y")], "has no tool message before message 3"),
        ([ASK, RESULT], "made no such call"),
        ([ASK, CALL, RESULT, RESULT], "second tool message"),
        ([ASK, AIMessage("", tool_calls=[call(a=1, b=2), call(a=1, b=2)])], "two tool calls have the id"),
        ([ASK, AIMessage("", tool_calls=[call(None, a=1, b=2)])], "has no id"),
        ([ASK, AIMessage([{"type": "tool_use", "id": "9", "name": "add", "input": {}}])], "tool_calls lack"),
        ([ChatMessage(content="x", role="critic")], "the role 'critic'"),
        ([RemoveMessage(id="1")], "is a RemoveMessage"),
        ([HumanMessage([{"type": "image", "url": "http://x/y.png"}])], "'image'; this model reads text only"),
        ([HumanMessage([{"type": "input_audio", "input_audio": {}}])], "'input_audio'"),
        ([ASK, CALL, ToolMessage([{"type": "file", "base64": "x"}], tool_call_id="1")], "'file'"),
    ],
)
def test_what_cannot_be_read_is_an_error_that_says_where(messages, said):
    with pytest.raises(PromptError, match=said):
        read_conversation(messages, REGISTRY)


def test_steps_as_messages():
    assert step_message(Answer("Hello")).content == "Hello"
    made = step_message(ToolStep("add", '{"a": 1, "b": 2}', {"a": 1, "b": 2}))
    assert (made.content, made.tool_calls[0]["name"], made.tool_calls[0]["args"]) == ("", "add", {"a": 1, "b": 2})
    assert made.tool_calls[0]["id"] != step_message(ToolStep("add", "", {})).tool_calls[0]["id"]
    failed = step_message(InvalidStep(" Yes\nAction: add\nAction Input: 1", "add", "1", "not an object"))
    assert failed.tool_calls == []
    assert failed.invalid_tool_calls[0]["args"] == "1"
    assert failed.invalid_tool_calls[0]["error"] == "not an object"


CUT_OFF = ['{"a": 1', '{"a": 1, "b": "x', '{"a": 1}', "{", "{}", "", '{"a": {"b": [1', "1, 2", "null", "[1]"]


@given(
    st.one_of(st.sampled_from(CUT_OFF), st.text(), st.none()),
    st.one_of(st.sampled_from(CUT_OFF), st.text()),
    st.one_of(st.none(), st.just("add")),
)
def test_a_step_that_could_not_be_read_never_streams_into_a_call(action_input, text, action):
    step = InvalidStep(text, action, action_input, "no")
    merged = AIMessageChunk(content="") + last_chunk(step)
    assert merged.tool_calls == []
    assert len(merged.invalid_tool_calls) == 1
    assert merged.invalid_tool_calls[0]["args"] == step_message(step).invalid_tool_calls[0]["args"]


@given(st.dictionaries(st.text(), st.one_of(st.integers(), st.text(), st.lists(st.booleans())), max_size=4))
def test_a_call_streams_as_it_is_invoked(arguments):
    step = ToolStep("add", "", arguments)
    merged = AIMessageChunk(content="") + last_chunk(step)
    assert [one["args"] for one in merged.tool_calls] == [arguments]
    assert merged.invalid_tool_calls == []


@given(st.lists(st.text(alphabet="abST O", max_size=6)), st.lists(st.text(alphabet="abSTO ", min_size=1), max_size=3))
def test_an_answer_ends_before_the_first_stop_text(pieces, stops):
    answer, sent = AnswerText(stops), ""
    for piece in pieces:
        sent += answer.feed(piece)
        assert not any(stop in sent for stop in stops)
    sent += answer.flush()
    whole = "".join(pieces)
    # The stop text that is complete first decides, as it does for whoever reads along.
    ends = [whole.find(stop) for stop in stops if stop in whole]
    assert sent == answer.text
    assert whole.startswith(sent)
    assert answer.stopped == bool(ends)
    if not ends:
        assert sent == whole
