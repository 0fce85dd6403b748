"""Steps read whole and streamed: calls, answers, and everything that is neither."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from loragen_agents.conversation.react import (
    THOUGHT_QUESTION,
    ActionKnown,
    Answer,
    AnswerDelta,
    InputDelta,
    InvalidStep,
    StepStream,
    ToolStep,
    answer_text,
    format_action_input,
    parse_step,
    tool_step_text,
)
from loragen_agents.registry import Tool, ToolRegistry

CROP = {"properties": {"image": {"type": "string"}, "object": {"type": "string"}}, "required": ["image", "object"]}
TIMER = {"properties": {"minutes": {"type": "integer"}, "label": {"type": "string"}}, "required": ["minutes"]}
TOOLS = [
    Tool(name="Crop the Given Object", description="Crop.", parameters=CROP),
    Tool(name="set_timer", description="Time.", parameters=TIMER),
    Tool(name="today", description="Date."),
]
CSV = ToolRegistry(TOOLS, input_format="csv")
JSON = ToolRegistry(TOOLS)


def call(name: str, action_input: str, rest: str = "\nObservation:") -> str:
    return f" Yes\nAction: {name}\nAction Input: {action_input}{rest}"


class TestToolSteps:
    def test_csv(self):
        step = parse_step(call("Crop the Given Object", "a.png, the cat, the big one"), CSV)
        assert step == ToolStep(
            "Crop the Given Object",
            "a.png, the cat, the big one",
            {"image": "a.png", "object": "the cat, the big one"},
        )

    def test_json(self):
        text = '{"minutes": 5, "label": "tea, green"}'
        assert parse_step(call("set_timer", text), JSON) == ToolStep(
            "set_timer", text, {"minutes": 5, "label": "tea, green"}
        )

    def test_json_over_several_lines(self):
        step = parse_step(call("set_timer", '{\n  "minutes": 5\n}'), JSON)
        assert isinstance(step, ToolStep)
        assert step.arguments == {"minutes": 5}

    @pytest.mark.parametrize(
        "generated",
        [
            " Yes\nAction: set_timer\nAction Input: 5\nObservation:",
            "Yes\nAction: set_timer\nAction Input: 5",
            "  yes  \n Action:set_timer\nAction Input:5\n",
            " YES.\nACTION: set_timer \n\nACTION INPUT:  5  \nObservation: done",
            "\n Yes\r\nAction: set_timer\r\nAction Input: 5\r\nObservation:",
            " Yes Action: set_timer\nAction Input: 5",
            " Yes\nAction: set_timer\nAction Input:\n5\nObservation:",
        ],
    )
    def test_odd_spacing_and_case(self, generated: str):
        assert parse_step(generated, CSV) == ToolStep("set_timer", "5", {"minutes": 5})

    @pytest.mark.parametrize(
        "rest",
        [
            "\nObservation: done\nThought: Do I need to use a tool? Yes\nAction: today\nAction Input: \nObservation:",
            "\nObservation:",
            "\nObservation",
            "\nO",
            "\n",
            "\nThought: Do I need to use a tool? No\nAI: done",
        ],
        ids=repr,
    )
    def test_what_the_model_writes_past_its_input_is_cut(self, rest: str):
        assert parse_step(call("set_timer", "5, tea", rest), CSV) == ToolStep(
            "set_timer", "5, tea", {"minutes": 5, "label": "tea"}
        )

    def test_tool_without_arguments(self):
        assert parse_step(call("today", ""), CSV) == ToolStep("today", "", {})
        assert parse_step(call("today", "{}"), JSON) == ToolStep("today", "{}", {})

    def test_a_second_call_in_one_step_is_not_run(self):
        step = parse_step(call("set_timer", "5") + " ok\nAction: today\nAction Input: \nObservation:", CSV)
        assert isinstance(step, ToolStep)
        assert step.action == "set_timer"


class TestAnswers:
    @pytest.mark.parametrize(
        ("generated", "text"),
        [
            (" No\nAI: Hello.", "Hello."),
            ("no\nAI:Hello.\n", "Hello."),
            (" NO.\n\n ai:  Hello. ", "Hello."),
            (" No AI: Hello.", "Hello."),
            (" No\nAI:", ""),
            (" No\nAI: One.\n\nTwo: Action: x\nAction Input: y", "One.\n\nTwo: Action: x\nAction Input: y"),
            (" No\nAI: The report says:\nObservation: all well", "The report says:\nObservation: all well"),
            (f" No\nAI: Done.\n{THOUGHT_QUESTION} Yes\nAction: today", "Done."),
            (f" No\nAI: Done.\n{THOUGHT_QUESTION[:-1]}", f"Done.\n{THOUGHT_QUESTION[:-1]}"),
            (" No\nAI: 36.\nAI: 36.\nAI: 36.", "36."),
            (" No\nAI: An AI: software.\nAIs: many", "An AI: software.\nAIs: many"),
            (" No\nAI: Yes\nAction: today\nAction Input: ", "Yes\nAction: today\nAction Input:"),
        ],
        ids=repr,
    )
    def test_answer(self, generated: str, text: str):
        assert parse_step(generated, CSV) == Answer(text)

    def test_an_answer_needs_no_tools(self):
        assert parse_step(" No\nAI: Hi", ToolRegistry([])) == Answer("Hi")

    def test_an_answer_that_ran_out_of_tokens_is_still_one(self):
        assert parse_step(" No\nAI: It is", CSV, cut_off=True) == Answer("It is")


class TestInvalidSteps:
    @pytest.mark.parametrize(
        ("generated", "action", "action_input", "error"),
        [
            ("", None, None, "expected 'Yes' with an 'Action:' line"),
            (" Maybe\nAction: today\nAction Input: ", None, None, "expected 'Yes'"),
            (" Yes", None, None, "expected 'Yes'"),
            (" Yes\nAI: hello", None, None, "expected 'Yes'"),
            (" No\nAction: today\nAction Input: ", None, None, "expected 'Yes'"),
            (" No, thanks.\nAI: x", None, None, "expected 'Yes'"),
            (" Yesterday\nAction: today\nAction Input: ", None, None, "expected 'Yes'"),
            (" Nothing\nAI: x", None, None, "expected 'Yes'"),
            ("Hello there", None, None, "expected 'Yes'"),
            (" Yes\nAction Input: 5\nAction: set_timer", None, None, "expected 'Yes'"),
            (" Yes\nAction:", None, None, "no 'Action Input:' line"),
            (" Yes\nAction: set_ti", "set_ti", None, "no 'Action Input:' line"),
            (" Yes\nAction: today\nObservation: Monday", "today", None, "no 'Action Input:' line"),
            (" Yes\nAction: today\nAction Inp", "today", None, "no 'Action Input:' line"),
            (call("set_timers", "5"), "set_timers", "5", "did you mean 'set_timer'?"),
            (call("SET_TIMER", "5"), "SET_TIMER", "5", "no tool 'SET_TIMER' among the 3 tools"),
            (call("", "5"), None, "5", "no tool ''"),
            (call("set_timer", "five"), "set_timer", "five", "argument 'minutes': expected integer, got 'five'"),
            (call("set_timer", ""), "set_timer", "", "'minutes': is required but missing"),
            (call("set_timer", "5\nand then"), "set_timer", "5\nand then", "one line"),
            (call("today", "now"), "today", "now", "takes 0 values"),
        ],
        ids=repr,
    )
    def test_reason(self, generated: str, action: str | None, action_input: str | None, error: str):
        step = parse_step(generated, CSV)
        assert isinstance(step, InvalidStep)
        assert (step.text, step.action, step.action_input) == (generated, action, action_input)
        assert error in step.error

    def test_csv_input_that_ran_out_of_tokens(self):
        step = parse_step(call("Crop the Given Object", "a.png, the c", ""), CSV, cut_off=True)
        assert isinstance(step, InvalidStep)
        assert "cut off" in step.error
        closed = parse_step(call("Crop the Given Object", "a.png, the c"), CSV, cut_off=True)
        assert isinstance(closed, ToolStep)

    def test_json_input_that_ran_out_of_tokens(self):
        assert isinstance(parse_step(call("set_timer", '{"minutes": 5', ""), JSON, cut_off=True), InvalidStep)
        assert isinstance(parse_step(call("set_timer", '{"minutes": 5}', ""), JSON, cut_off=True), ToolStep)

    def test_empty_registry(self):
        assert isinstance(parse_step(call("today", ""), ToolRegistry([])), InvalidStep)

    def test_every_prefix_of_a_call_is_invalid_or_a_prefix_of_its_input(self):
        whole = call("set_timer", '{"minutes": 5, "label": "tea"}')
        steps = [parse_step(whole[:end], JSON) for end in range(len(whole) + 1)]
        assert all(isinstance(step, InvalidStep) for step in steps[: whole.index("}") + 1])
        assert all(step == steps[-1] for step in steps[whole.index("}") + 1 :])


def stream(text: str, registry: ToolRegistry, cuts: list[int]) -> tuple[StepStream, list[Any]]:
    reader = StepStream(registry)
    events: list[Any] = []
    places = [0, *sorted(cuts), len(text)]
    for start, end in pairwise(places):
        events += reader.feed(text[start:end])
    return reader, events + reader.flush()


def joined(events: list[Any], kind: type[AnswerDelta | InputDelta]) -> str:
    return "".join(event.text for event in events if isinstance(event, kind))


class TestStream:
    def test_events_come_as_soon_as_they_are_certain(self):
        reader = StepStream(JSON)
        assert reader.feed(" Yes\nAction: set_ti") == []
        assert reader.feed("mer\nAction Input:") == [ActionKnown("set_timer")]
        assert reader.feed(' {"minutes"') == [InputDelta('{"minutes"')]
        assert reader.feed(": 5}") == [InputDelta(": 5}")]
        assert not reader.finished
        assert reader.feed("\nObser") == []
        assert reader.feed("vation: 7") == []
        assert reader.finished
        assert reader.feed(" more") == []
        assert reader.close() == ToolStep("set_timer", '{"minutes": 5}', {"minutes": 5})

    def test_answer_holds_back_only_what_may_close_it(self):
        reader = StepStream(JSON)
        assert reader.feed(" No\nAI: Good") == [AnswerDelta("Good")]
        assert reader.feed(" morning.\nTho") == [AnswerDelta(" morning.")]
        assert reader.feed("mas\n") == [AnswerDelta("\nThomas")]
        assert reader.feed("\nThought") == []
        assert reader.flush() == [AnswerDelta("\n\nThought")]
        assert reader.flush() == []
        assert reader.close() == Answer("Good morning.\nThomas\n\nThought")

    def test_an_answer_ends_at_the_next_question(self):
        reader, events = stream(f" No\nAI: Done.\n{THOUGHT_QUESTION} Yes", JSON, [20, 30])
        assert reader.finished
        assert joined(events, AnswerDelta) == "Done."

    def test_an_answer_that_begins_again_is_over(self):
        reader, events = stream(" No\nAI: It is 36.\nAI: It is 36.\nAI:", JSON, [20, 24, 30])
        assert reader.finished
        assert joined(events, AnswerDelta) == "It is 36."

    def test_an_unknown_tool_raises_no_events(self):
        reader, events = stream(call("nothing", "5"), CSV, [])
        assert events == []
        assert isinstance(reader.close(), InvalidStep)

    def test_cut_off(self):
        reader, _ = stream(call("set_timer", "5, te", ""), CSV, [])
        assert isinstance(reader.close(), ToolStep)
        assert isinstance(reader.close(cut_off=True), InvalidStep)


fragments = st.sampled_from(
    [
        " Yes",
        " No",
        "\n",
        " ",
        "Action:",
        "Action Input:",
        "Observation:",
        "AI:",
        "Thought:",
        THOUGHT_QUESTION,
        " set_timer",
        " today",
        "5, tea",
        '{"minutes": 5}',
        "{}",
        "\r",
        ".",
    ]
)
texts = st.text() | st.lists(fragments | st.text(max_size=4), max_size=14).map("".join)


@given(texts, st.sampled_from([CSV, JSON, ToolRegistry([])]), st.booleans())
def test_no_text_raises(text: str, registry: ToolRegistry, cut_off: bool):
    step = parse_step(text, registry, cut_off=cut_off)
    assert isinstance(step, ToolStep | Answer | InvalidStep)
    if isinstance(step, ToolStep):
        assert step.action in registry
    if isinstance(step, InvalidStep):
        assert step.text == text
        assert step.error


@given(texts, st.sampled_from([CSV, JSON]), st.data())
@example(" No\nAI: x\n\nThought: Do I need to use a tool? ", CSV, None)
@example(" Yes\nAction: today\nAction Input: \n \nObservation: x", CSV, None)
def test_streaming_reads_what_the_whole_reads(text: str, registry: ToolRegistry, data: Any):
    cuts = list(range(1, len(text))) if data is None else data.draw(st.lists(st.integers(0, len(text)), max_size=8))
    reader, events = stream(text, registry, cuts)
    step = parse_step(text, registry)
    assert reader.close() == step
    assert reader.text == text
    assert all(event.text for event in events if not isinstance(event, ActionKnown))
    if isinstance(step, Answer):
        assert joined(events, AnswerDelta) == step.text
        assert not [event for event in events if not isinstance(event, AnswerDelta)]
    elif step.action is not None and step.action_input is not None and step.action in registry:
        assert events[0] == ActionKnown(step.action)
        assert joined(events, InputDelta) == step.action_input
    else:
        assert events == []


def ends_an_answer(text: str) -> bool:
    return any(f"\n{line}" in f"\n{text}" for line in (THOUGHT_QUESTION, "AI:"))


@given(answer=st.text().map(str.strip).filter(lambda text: not ends_an_answer(text)))
def test_answers_round_trip(answer: str):
    assert parse_step(answer_text(answer), CSV) == Answer(answer)


@given(minutes=st.integers(), label=st.none() | st.text(), cuts=st.lists(st.integers(0, 40), max_size=5))
def test_calls_round_trip(minutes: int, label: str | None, cuts: list[int]):
    arguments = {"minutes": minutes} | ({} if label is None else {"label": label})
    action_input = format_action_input(JSON["set_timer"], arguments, "json")
    text = tool_step_text("set_timer", action_input)
    assert parse_step(text, JSON) == ToolStep("set_timer", action_input, arguments)
    reader, events = stream(text, JSON, [cut for cut in cuts if cut <= len(text)])
    assert reader.finished
    assert joined(events, InputDelta) == action_input
