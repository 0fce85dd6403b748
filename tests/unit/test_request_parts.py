"""Requests for several things: where they may be taken apart, and what is due after which step."""

from typing import Any

import pytest

from loragen_agents.conversation.parts import parts_of
from loragen_agents.conversation.prompts import TakenStep, Turn
from loragen_agents.edge.request_parts import RequestParts
from loragen_agents.edge.tool_choice import ToolProbabilities


@pytest.mark.parametrize(
    ("request_text", "parts"),
    [
        ("Dim the lights and play jazz", ["Dim the lights", "play jazz"]),
        ("Dim the lights. Play jazz.", ["Dim the lights.", "Play jazz."]),
        ("could you lock the door, then turn the heat down?", ["could you lock the door", "turn the heat down?"]),
        ("add milk and eggs to the list, and also call Ann", ["add milk and eggs to the list", "call Ann"]),
        ("What's the time and when does the shop open", []),
        ("Turn on the lamp and the fan", []),
        ("find a flight to Rome and book it", []),
        ("remind me to buy milk and call Ann", []),
        ('translate "open the door and close the window"', []),
        ("I need some ideas. Can you give me a quote?", []),
        ("play rock and roll", []),
        ("", []),
    ],
)
def test_requests_are_taken_apart_where_another_one_begins(request_text: str, parts: list[str]) -> None:
    assert [part.text for part in parts_of(request_text)] == parts


class _Scorer:
    """Finds a tool by a word of the last request; where several are named, the last one is the likeliest."""

    def __init__(self, others: float = 0.1) -> None:
        self.words = {"light": "lights", "jazz": "music", "loud": "music", "door": "lock"}
        self.others = others
        self.read: list[str] = []

    def user_turn(self, turns: Any) -> Any:
        return turns

    def prefill(self, turns: Any) -> Any:
        self.read.append(turns[-1].request)
        return turns

    def __call__(self, turns: Any) -> ToolProbabilities:
        found = [tool for word, tool in self.words.items() if word in turns[-1].request.lower()]
        tools = dict.fromkeys(self.words.values(), 1e-6) | dict.fromkeys(found, self.others)
        if found:
            tools[found[-1]] = 0.6
        return ToolProbabilities(0.9 if found else 0.1, tools)


def due(request: str, *tools: str, earlier: tuple[Turn, ...] = ()) -> Any:
    scorer: Any = _Scorer()
    steps = tuple(TakenStep(tool, "{}", f"{tool} done") for tool in tools)
    return RequestParts(scorer, scorer).due([*earlier, Turn(request, steps)])


def test_one_thing_is_due_at_a_time_and_what_was_done_stands_before_it() -> None:
    request, before = "Dim the lights, play jazz and lock the door", (Turn("Hi", (), "Hello"),)
    assert due(request, earlier=before) == [*before, Turn("Dim the lights")]
    lights = Turn("Dim the lights", (TakenStep("lights", "{}", "lights done"),), "Done.")
    assert due(request, "lights", earlier=before) == [*before, lights, Turn("play jazz")]
    assert due(request, "lights", "music")[-1] == Turn("lock the door")


@pytest.mark.parametrize(
    ("request_text", "tools"),
    [
        ("Dim the lights", ()),  # one request
        ("Dim the lights and open a book", ()),  # no tool for a part
        ("Play jazz. Play loud.", ()),  # more of the same in a new sentence
        ("Dim the lights and play jazz", ("lights", "music")),  # nothing left
        ("Dim the lights and play jazz", ("lock",)),  # not what its parts call for
    ],
)
def test_other_conversations_stay_as_they_are(request_text: str, tools: tuple[str, ...]) -> None:
    turns = due(request_text, *tools)
    assert [(turn.request, len(turn.steps)) for turn in turns] == [(request_text, len(tools))]


@pytest.mark.parametrize("turns", [[], [Turn("Dim the lights and play jazz", (), "It is done")]])
def test_what_is_no_prompt_is_left_for_the_renderer_to_refuse(turns: list[Turn]) -> None:
    scorer: Any = _Scorer()
    assert RequestParts(scorer, scorer).due(turns) == turns


def test_a_part_whose_tool_is_far_from_the_whole_request_is_none_of_its_own() -> None:
    scorer: Any = _Scorer(others=1e-4)
    turns = [Turn("Dim the lights and play jazz")]
    assert RequestParts(scorer, scorer).due(turns) == turns


def test_a_request_is_read_once_for_all_its_steps() -> None:
    scorer: Any = _Scorer()
    parts = RequestParts(scorer, scorer)
    for tools in ((), ("lights",)):
        parts.due([Turn("Dim the lights and play jazz", tuple(TakenStep(tool, "{}", "ok") for tool in tools))])
    assert scorer.read == ["Dim the lights and play jazz", "Dim the lights", "play jazz"]
