"""The assistant's loop on a scripted model: steps, limits, permissions, errors."""

import asyncio
import threading
import time
from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import StructuredTool, ToolException

from loragen_agents.assistant.agent import HISTORY_TURNS, AnswerPiece, Assistant, CallBegins, CallEnds, Event
from loragen_agents.assistant.permission import Permissions
from loragen_agents.assistant.tools.catalog import chosen_tools
from loragen_agents.assistant.turns import Turn
from tests.scripted_chat import call, scripted, tool_context


@pytest.fixture
def context(tmp_path):
    return tool_context(tmp_path)


class Asked:
    """Answers the assistant's questions, and keeps them."""

    def __init__(self, *replies: str) -> None:
        self.replies = list(replies)
        self.questions: list[tuple[str, dict[str, Any], str]] = []

    async def __call__(self, tool: Any, arguments: dict[str, Any], why: str) -> Any:
        self.questions.append((tool.name, arguments, why))
        return self.replies.pop(0)


def run(assistant: Assistant, request: str = "Go.") -> tuple[Turn, list[Event]]:
    events: list[Event] = []
    return asyncio.run(assistant.turn(request, events.append)), events


def assistant(context, *script: Any, tools: Any = None, **options: Any) -> Assistant:
    return Assistant(scripted(*script), chosen_tools(context) if tools is None else tools, context, **options)


def test_a_turn_with_a_call(context):
    made = assistant(context, call("calculator", expression="17 * 23"), "It is 391.", system="Be brief.")
    turn, events = run(made, "What is 17 * 23?")
    assert [type(event) for event in events] == [CallBegins, CallEnds, AnswerPiece, AnswerPiece, AnswerPiece]
    assert (turn.calls[0].text, turn.answer, turn.ending) == ("17 * 23 = 391", "It is 391.", "answered")
    assert turn.succeeded and turn.calls[0].milliseconds > 0 and turn.figures.turn_ms > 0
    assert (turn.figures.prompt_tokens, turn.figures.definition_tokens, turn.figures.first_token_ms) == (31, 900, 12.0)
    assert len(turn.figures.choices) == 2
    model = made.model
    assert [type(message) for message in model.seen[1]] == [SystemMessage, HumanMessage, AIMessage, ToolMessage]
    assert len(model.bound[0]) >= 30


def test_later_turns_see_earlier_ones_and_no_more_than_a_few(context):
    made = assistant(context, call("today"), "Wednesday.", *["Yes."] * 6)
    for number in range(7):
        run(made, f"Question {number}")
    requests = [message.text for message in made.model.seen[-1] if isinstance(message, HumanMessage)]
    assert requests == [f"Question {number}" for number in range(6 - HISTORY_TURNS, 7)]
    second = made.model.seen[2]
    assert [message.text for message in second[:4]] == [
        "Question 0",
        "",
        "Today is Wednesday, 25 November 2026.",
        "Wednesday.",
    ]


def test_later_turns_do_not_see_what_failed(context):
    made = assistant(context, "One.", call("read_file", path="none.txt"), "It is not there.", "Three.")
    for number in range(3):
        run(made, f"Question {number}")
    assert [message.text for message in made.model.seen[-1]] == ["Question 0", "One.", "Question 2"]


def test_a_tools_error_is_an_observation_for_the_model(context):
    turn, events = run(assistant(context, call("read_file", path="none.txt"), "There is no such file."))
    assert turn.calls[0].failed and turn.calls[0].text == "there is no file none.txt"
    assert turn.ending == "answered" and not turn.succeeded
    assert isinstance(events[1], CallEnds) and events[1].call.failed


@pytest.mark.parametrize("error", [ValueError("bad\x1b[31m"), ToolException("sorry"), KeyError("k"), RecursionError()])
def test_any_exception_of_a_tool_is_an_error_of_the_call(context, error):
    def broken() -> str:
        """Breaks."""
        raise error

    tool = StructuredTool.from_function(broken, metadata={"read_only": True})
    turn, _ = run(assistant(context, call("broken"), "It broke.", tools=[tool]))
    assert turn.calls[0].failed and turn.answer == "It broke."


def test_a_tool_that_hangs_is_left_behind(context):
    release = threading.Event()

    def slow() -> str:
        """Takes its time."""
        release.wait(20)
        return "late"

    tool = StructuredTool.from_function(slow, metadata={"read_only": True})
    started = time.monotonic()
    turn, _ = run(assistant(context, call("slow"), "It took too long.", tools=[tool], tool_seconds=0.1))
    assert time.monotonic() - started < 5
    assert turn.calls[0].text == "slow took longer than 0.1 s" and turn.calls[0].failed
    release.set()


def test_a_model_that_asks_for_the_same_again_is_stopped(context):
    turn, _ = run(assistant(context, *[call("today")] * 2))
    assert turn.reason == "The model asked for the same call again, so the turn ends here."
    assert len(turn.calls) == 1 and turn.ending == "stopped" and turn.succeeded


def test_a_model_that_never_ends_is_stopped(context):
    steps = [call("calculator", expression=f"{number} + 1") for number in range(9)]
    turn, _ = run(assistant(context, *steps, max_steps=3))
    assert turn.reason == "Stopped after 3 steps: the model did not come to an end."
    assert len(turn.calls) == 3 and turn.ending == "failed"


def test_an_answer_that_goes_in_circles_is_cut_off(context):
    turn, _ = run(assistant(context, "I am sure. " + "And so it goes on. " * 200))
    assert turn.reason.startswith("The model repeats itself") and len(turn.answer) < 120
    turn, _ = run(assistant(context, "A rule: " + "- " * 60))
    assert turn.ending == "answered"


def test_a_call_that_can_not_be_read_fails_the_turn(context):
    broken = AIMessage(
        "",
        invalid_tool_calls=[{"name": "today", "args": "{", "id": "1", "error": "cut off", "type": "invalid_tool_call"}],
    )
    made = assistant(context)
    made.model.script[:] = [broken]
    made.model.disable_streaming = True
    turn, _ = run(made)
    assert turn.ending == "failed" and "cut off" in turn.reason


class TestPermissions:
    def delete(self, context, *script: Any, permissions: Permissions) -> Turn:
        turn, _ = run(assistant(context, call("delete_file", path="shopping.txt"), *script, permissions=permissions))
        return turn

    def there(self, context) -> bool:
        return (context.folder.root / "shopping.txt").exists()

    def test_nothing_is_changed_where_nobody_can_be_asked(self, context):
        turn = self.delete(context, permissions=Permissions())
        assert self.there(context) and turn.ending == "failed" and "Add --yes" in turn.reason
        assert not turn.succeeded

    def test_no(self, context):
        turn = self.delete(context, permissions=Permissions(Asked("no")))
        assert self.there(context) and turn.reason == "Not done, as you said no."

    def test_yes(self, context):
        asked = Asked("yes")
        self.delete(context, "Gone.", permissions=Permissions(asked))
        assert not self.there(context)
        assert asked.questions == [("delete_file", {"path": "shopping.txt"}, "")]

    def test_yes_to_all(self, context):
        self.delete(context, "Gone.", permissions=Permissions(yes=True))
        assert not self.there(context)

    def test_dry_run(self, context):
        turn = self.delete(context, "Fine.", permissions=Permissions(yes=True, dry_run=True))
        assert self.there(context)
        assert turn.calls[0].text == "Dry run: would delete shopping.txt (11 B) for good."

    def test_always_holds_for_the_session(self, context):
        asked = Asked("always")
        permissions = Permissions(asked)
        self.delete(context, "Gone.", permissions=permissions)
        (context.folder.root / "shopping.txt").write_text("again")
        self.delete(context, "Gone.", permissions=permissions)
        assert not self.there(context) and len(asked.questions) == 1

    def test_always_does_not_hold_once_outside_text_was_read(self, context):
        asked = Asked("no")
        permissions = Permissions(asked, always={"delete_file"})
        script = (call("read_file", path="plan.md"), call("delete_file", path="shopping.txt"))
        turn, _ = run(assistant(context, *script, permissions=permissions))
        assert self.there(context) and turn.reason == "Not done, as you said no."
        assert "was read in this turn" in asked.questions[0][2]

    @pytest.mark.parametrize(
        ("metadata", "asks"),
        [
            (None, True),
            ({"read_only": True}, False),
            ({"readOnlyHint": True}, False),
            ({"readOnlyHint": "yes"}, True),
            ({"asks": False}, True),
        ],
    )
    def test_tools_of_others_ask_unless_they_only_read(self, context, metadata, asks):
        tool = StructuredTool.from_function(lambda: "done", name="theirs", description="Acts.", metadata=metadata)
        asked = Asked("yes")
        run(assistant(context, call("theirs"), "Done.", tools=[tool], permissions=Permissions(asked)))
        assert len(asked.questions) == asks


async def test_a_cancelled_turn_is_kept_as_interrupted(context):
    def slow() -> str:
        """Takes its time."""
        time.sleep(2)
        return "late"

    tool = StructuredTool.from_function(slow, metadata={"read_only": True})
    made = assistant(context, call("slow"), tools=[tool])
    task = asyncio.create_task(made.turn("Go.", lambda event: None))
    await asyncio.sleep(0.2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert made.turns[0].ending == "interrupted" and not made.turns[0].succeeded


def test_turns_survive_json(context):
    turn, _ = run(assistant(context, call("calculator", expression="1 + 1"), "Two."))
    again = Turn.from_json(turn.to_json())
    assert again.to_json() == turn.to_json()
    assert [message.text for message in again.messages()] == [message.text for message in turn.messages()]
