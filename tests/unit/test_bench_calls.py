"""Drawing and judging calls, on a small data set of our own."""

from typing import Any

import pytest

from loragen_agents.bench import everyday_calls
from loragen_agents.bench.call_scores import METRICS, normalised, score_call, score_choice
from loragen_agents.bench.calls import calls_task, registry_task
from loragen_agents.bench.costs import TurnCost
from loragen_agents.bench.tasks import BenchSample, Written
from loragen_agents.conversation.prompts import THOUGHT_QUESTION, Turn
from loragen_agents.conversation.react import parse_step
from loragen_agents.data.episodes import GoldCall
from loragen_agents.data.records import Call, CallRecord, ToolRecord, read_call_records
from loragen_agents.errors import DataError
from loragen_agents.registry import Tool, ToolRegistry
from loragen_agents.support.content import content_folder

TOPICS = {
    "north": ("alarms", "boats", "cheese", "dance", "engines", "flowers", "glass", "hats"),
    "south": ("ink", "jam", "kites", "lamps", "maps", "nails", "opera", "paint"),
}


def data() -> tuple[dict[str, ToolRecord], list[CallRecord]]:
    tools, calls = {}, []
    for source, topics in TOPICS.items():
        for topic in topics:
            parameters = {"type": "object", "properties": {"count": {"type": "integer"}}, "required": ["count"]}
            tool_id = f"{source}/{topic}"
            tools[tool_id] = ToolRecord(
                tool_id, f"{topic}_finder", f"{topic.title()}!", topic, source, "dev", parameters
            )
            calls += [
                CallRecord(f"{count} {topic}?", (Call(tool_id, {"count": count}),), source, "dev") for count in range(6)
            ]
    return tools, calls


def test_drawn_task_is_a_function_of_its_arguments() -> None:
    tools, calls = data()
    task = calls_task(tools, calls, registry_size=4, requests=12, seed=3)
    assert task.fingerprint == calls_task(tools, calls, registry_size=4, requests=12, seed=3).fingerprint
    assert task.fingerprint != calls_task(tools, calls, registry_size=4, requests=12, seed=4).fingerprint
    assert [sample.source for sample in task.samples] == ["north"] * 12 + ["south"] * 12
    for sample in task.samples:
        assert len(sample.registry) == 4 and sample.calls[0].name in sample.registry
        step = parse_step(sample.gold.removeprefix(THOUGHT_QUESTION), sample.registry)
        assert set(task.score(sample, written(""), [step]).values()) == {1.0}
    assert len({(sample.turns, sample.registry.fingerprint) for sample in task.samples}) == 24


def test_invented_names_and_requests_that_no_tool_serves() -> None:
    tools, calls = data()
    task = calls_task(tools, calls, registry_size=4, requests=12, names="invented", irrelevant=0.5)
    real = {tool.name for tool in tools.values()}
    assert not any(name in real for sample in task.samples for name in sample.registry.names)
    for source in ("north", "south"):
        assert sum(not sample.calls for sample in task.samples if sample.source == source) == 6
    for sample in task.samples:
        if not sample.calls:
            topic = sample.turns[-1].request.split()[1].strip("?")
            assert not any(topic.title() in tool.description for tool in sample.registry)


def test_the_everyday_requests_fit_the_assistants_tools() -> None:
    registry = ToolRegistry.from_yaml(content_folder("tools") / "assistant.yaml")
    records = read_call_records(everyday_calls())
    assert sorted(len(record.calls) for record in records) == [0] * 10 + [1] * 40 + [2] * 10
    task = registry_task(registry, records, "assistant")
    kinds = [sample.kind for sample in task.samples]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "call": 40,
        "irrelevant": 10,
        "two calls, first": 10,
        "next_call": 10,
    }
    for sample in task.samples:
        assert sample.registry == registry
        assert len(sample.turns[-1].steps) == (sample.kind == "next_call")
        step = parse_step(sample.gold.removeprefix(THOUGHT_QUESTION), registry)
        assert set(task.score(sample, written(""), [step]).values()) == {1.0}


def test_requests_that_a_registry_does_not_fit_are_errors() -> None:
    wrong = [
        (Call("rent", {}), "row 1, 'Go.': no tool 'rent'"),
        (Call("book", {"city": 3}), "row 1, 'Go.': tool 'book'"),
    ]
    for call, message in wrong:
        with pytest.raises(DataError, match=message):
            registry_task(REGISTRY, [CallRecord("Go.", (call,), "own", "dev")], "own")
    with pytest.raises(DataError, match="no requests"):
        registry_task(REGISTRY, [], "own")


def test_impossible_draws_are_errors() -> None:
    tools, calls = data()
    with pytest.raises(DataError, match="one split"):
        calls_task(tools, [])
    with pytest.raises(DataError, match="expected 0 to below 1"):
        calls_task(tools, calls, irrelevant=1.0)


REGISTRY = ToolRegistry(
    [
        Tool(
            name="book",
            description="Books a room.",
            parameters={
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "nights": {"type": "integer"},
                    "pets": {"type": "boolean"},
                    "guests": {"type": "array", "items": {"type": "string"}},
                },
                "required": ["city", "nights"],
            },
        ),
        Tool(name="cancel", description="Cancels a booking."),
    ]
)


def written(text: str, tools: dict[str, float] | None = None) -> Written:
    return Written("", text, "stop", TurnCost(1, 0, 1, 0.1, 0.1), tools)


def judged(gold: dict[str, Any] | None, text: str) -> dict[str, float]:
    calls = () if gold is None else (GoldCall("book", gold),)
    sample = BenchSample("1", "own", "call", REGISTRY, (Turn("?"),), "", calls=calls)
    return score_call(sample, written(text), [parse_step(text, REGISTRY)])


def call_text(arguments: str, name: str = "book") -> str:
    return f" Yes\nAction: {name}\nAction Input: {arguments}\nObservation:"


@pytest.mark.parametrize(
    ("gold", "arguments", "expected"),
    [
        ({"city": "Oslo", "nights": 2}, '{"city": "Oslo", "nights": 2}', (1, 1, 1, 1)),
        ({"city": "Oslo", "nights": 2}, '{"city": "the  oslo.", "nights": 2}', (1, 0.5, 1, 1)),
        ({"city": "Oslo", "nights": 2}, '{"city": "Oslo", "nights": 3}', (1, 0.5, 0.5, 0)),
        ({"city": "Oslo", "nights": 2}, '{"city": "Oslo", "nights": 2, "pets": true}', (1, 2 / 3, 2 / 3, 0)),
        # The schema asks for nights, the gold call doesn't say how many: not judged.
        ({"city": "Oslo"}, '{"city": "Oslo", "nights": 7}', (1, 1, 1, 1)),
        ({"city": "Oslo", "nights": 2, "pets": True}, '{"city": "Oslo", "nights": 2}', (1, 2 / 3, 2 / 3, 0)),
        (
            {"city": "Oslo", "nights": 2, "guests": ["Ann", "Bo"]},
            '{"city": "Oslo", "nights": 2, "guests": ["ann", "bo"]}',
            (1, 2 / 3, 1, 1),
        ),
        ({"city": "Oslo", "nights": 2}, "Oslo for two nights", (1, 0, 0, 0)),
        # A call without an argument that the schema requires is no call, but what it has right counts.
        ({"city": "Oslo", "nights": 2}, '{"city": "Oslo"}', (1, 0.5, 0.5, 0)),
        ({"city": "Oslo"}, '{"city": "Oslo"}', (1, 1, 1, 0)),
    ],
)
def test_calls_by_the_rules(gold: dict[str, Any], arguments: str, expected: tuple[float, ...]) -> None:
    result = judged(gold, call_text(arguments))
    keys = ("tool", "arguments_exact", "arguments", "call")
    assert tuple(result[key] for key in keys) == pytest.approx(expected)
    assert set(result) <= set(METRICS)


def test_wrong_tool_and_missing_call() -> None:
    nothing = {"tool": 0.0, "arguments_exact": 0.0, "arguments": 0.0, "call": 0.0}
    assert judged({"city": "Oslo"}, call_text("{}", "cancel")) == {"called": 1.0, **nothing}
    assert judged({"city": "Oslo"}, " No\nAI: Which city?") == {"called": 0.0, **nothing}
    assert judged({"city": "Oslo"}, "rubbish") == {"called": 0.0, **nothing}


def test_several_calls_are_right_in_any_order_and_only_together() -> None:
    golds = (GoldCall("book", {"city": "Oslo", "nights": 2}), GoldCall("cancel", {}))
    sample = BenchSample("1", "own", "2 calls", REGISTRY, (Turn("?"),), "", calls=golds)
    book = parse_step(call_text('{"city": "Oslo", "nights": 2}'), REGISTRY)
    other = parse_step(call_text('{"city": "Rome", "nights": 2}'), REGISTRY)
    cancel = parse_step(call_text("{}", "cancel"), REGISTRY)
    expected = {"called": 1.0, "tool": 1.0, "arguments_exact": 1.0, "arguments": 1.0, "call": 1.0}
    assert score_call(sample, written(""), [book, cancel]) == expected
    assert score_call(sample, written(""), [cancel, book]) == expected
    assert score_call(sample, written(""), [cancel, other]) == {
        "called": 1.0, "tool": 1.0, "arguments_exact": 0.75, "arguments": 0.75, "call": 0.0
    }  # fmt: skip
    for steps in ([book], [book, book], [book, parse_step(" No\nAI: Done.", REGISTRY)]):
        result = score_call(sample, written(""), steps)
        assert (result["tool"], result["call"], result["arguments"]) == (0.0, 0.0, 0.5)


def test_a_choice_is_judged_by_its_tool_and_by_the_likeliest() -> None:
    due = BenchSample("1", "own", "call", REGISTRY, (Turn("?"),), "", calls=(GoldCall("book", {}),))
    none_due = BenchSample("2", "own", "irrelevant", REGISTRY, (Turn("?"),), "")
    right, wrong = {"book": 0.7, "cancel": 0.3}, {"book": 0.3, "cancel": 0.7}

    def choice(sample: BenchSample, text: str, tools: dict[str, float]) -> dict[str, float]:
        return score_choice(sample, written(text, tools), [parse_step(text, REGISTRY)])

    assert choice(due, " Yes\nAction: book", right) == {"tool": 1.0, "best": 1.0, "called": 1.0}
    assert choice(due, " Yes\nAction: cancel", wrong) == {"tool": 0.0, "best": 0.0, "called": 1.0}
    assert choice(due, " No\nAI:", right) == {"tool": 0.0, "best": 1.0, "called": 0.0}
    assert choice(none_due, " No\nAI:", right) == {"no_call": 1.0}
    assert choice(none_due, " Yes\nAction: book", right) == {"no_call": 0.0}


def test_no_call() -> None:
    assert judged(None, " No\nAI: I can't do that.") == {"no_call": 1.0}
    assert judged(None, call_text("{}", "cancel")) == {"no_call": 0.0}
    assert judged(None, "I can't do that.") == {"no_call": 0.0}


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("The Big House", "big house."),
        ("2", 2),
        (2, 2.0),
        ("two", 2),
        ("2.50", 2.5),
        ("True", True),
        ("$45.2", 45.2),
        ("'Oslo'", "oslo"),
        ("Oslo,  Norway", "oslo norway"),
        (["A", "b"], ["a", "B"]),
        ({"x": "A"}, {"x": "a"}),
    ],
)
def test_normalised_alike(a: object, b: object) -> None:
    assert normalised(a) == normalised(b)


@pytest.mark.parametrize(
    ("a", "b"),
    [("11:30", "11:31"), ("Oslo", "Osla"), (2, 3), ("nan", 1), (["a"], "a"), (True, 1), ("(5+3)*12", "5+3*12")],
)
def test_normalised_apart(a: object, b: object) -> None:
    assert normalised(a) != normalised(b)
