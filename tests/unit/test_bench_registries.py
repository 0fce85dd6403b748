"""Registries of whole applications, parts of them and mixtures, drawn from a small data set of our own."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loragen_agents.bench.calls import application_task, read_data, read_near_duplicates
from loragen_agents.bench.registries import Draw, application_of
from loragen_agents.bench.tasks import BenchSample, Task
from loragen_agents.conversation.prompts import THOUGHT_QUESTION
from loragen_agents.data.records import Call, CallRecord, DataSet, ToolRecord
from loragen_agents.errors import DataError

# Words of their own for every tool, so that tools of two sources are never alike.
WORDS = {
    "north": "alarms boats cheese dance engines flowers",
    "south": "glass hats ink jam kites lamps",
    "polyai": "maps nails opera paint",
}


def data() -> DataSet:
    """Two sources of one application each, and polyai with two; requests of one and of two calls."""
    tools, calls = {}, []
    for source, words in WORDS.items():
        ids = []
        for place, word in enumerate(words.split()):
            domain = f"part {place % 2}"
            parameters = {"type": "object", "properties": {"count": {"type": "integer"}}, "required": ["count"]}
            ids.append(f"{source}/{word}")
            tools[ids[-1]] = ToolRecord(
                ids[-1], f"find_{word}", f"{word.title()}!", domain, source, "train", parameters
            )
            calls += [
                CallRecord(f"{count} {word}?", (Call(ids[-1], {"count": count}),), source, "train")
                for count in range(2 + 2 * place)
            ]
        both = (Call(ids[0], {"count": 1}), Call(ids[2], {"count": 2}))
        calls.append(CallRecord(f"Both of {source}", both, source, "train"))
    calls.append(replace(calls[0], query="What is it?"))
    calls.append(replace(calls[0], query="what is it?", calls=(Call("north/boats", {"count": 1}),)))
    return DataSet(tools, tuple(calls))


def task(scheme: Any = "whole", near_duplicates: Any = (), choice_only: bool = False, **settings: Any) -> Task:
    draw = Draw(**{"scheme": scheme, "size": 3, "requests": 12, "per_registry": 4, **settings})
    return application_task(data(), draw, seed=1, near_duplicates=near_duplicates, choice_only=choice_only)


def words_of(sample: BenchSample) -> set[str]:
    return {name.removeprefix("find_") for name in sample.registry.names}


def asks_for(sample: BenchSample) -> str:
    return sample.turns[-1].request.split()[1].strip("?")


def test_what_an_application_is_depends_on_the_source() -> None:
    tools = data().tools
    assert application_of(tools["north/alarms"]) == "north"
    assert application_of(tools["polyai/maps"]) == "polyai/part 0"
    field = replace(tools["north/alarms"], source="seal-tools", domain="Sports/Cycling")
    assert application_of(field) == "seal-tools/Sports"


def test_whole_applications_stand_in_one_registry_and_every_tool_has_its_turn() -> None:
    whole = task(requests=16)
    assert Counter(sample.source for sample in whole.samples) == {"north": 16, "south": 16, "polyai": 16}
    sizes = {sample.source: len(sample.registry) for sample in whole.samples}
    assert sizes == {"north": 6, "south": 6, "polyai": 2}
    assert len({sample.registry.fingerprint for sample in whole.samples}) == 4
    # Two requests there are for the first tool, more for the others: as even as that allows.
    asked = Counter(asks_for(sample) for sample in whole.samples if sample.source == "north")
    assert asked["alarms"] == 2 and min(asked.values()) == 2 and max(asked.values()) == 3
    assert all(asks_for(sample) in words_of(sample) for sample in whole.samples)
    assert not any("what is it" in sample.turns[-1].request.lower() for sample in whole.samples)
    assert len({sample.turns for sample in whole.samples}) == 48
    assert whole.fingerprint == task(requests=16).fingerprint


def test_of_near_duplicates_the_one_with_most_requests_stays() -> None:
    groups = [["north/alarms", "north/boats", "south/hats"], ["south/glass", "south/ink"]]
    whole = task(near_duplicates=groups)
    for sample in whole.samples:
        if sample.source == "north":
            assert words_of(sample) == {"boats", "cheese", "dance", "engines", "flowers"}
    mixed = task("mixed", near_duplicates=groups, size=9)
    for sample in mixed.samples:
        assert len(words_of(sample) & {"alarms", "boats", "hats"}) <= 1
        assert len(words_of(sample) & {"glass", "ink"}) <= 1


def test_irrelevant_requests_are_of_the_application_s_other_tools() -> None:
    groups = [["north/alarms", "north/boats"]]
    for size in (1, 3):
        part = task("part", near_duplicates=groups, size=size, irrelevant=0.5)
        for source in ("north", "south", "polyai"):
            kinds = Counter(sample.kind for sample in part.samples if sample.source == source)
            assert kinds == {"call": 6, "irrelevant": 6}
        for sample in part.samples:
            assert len(sample.registry) == size
            served = asks_for(sample) in words_of(sample)
            assert served == bool(sample.calls) == (sample.kind == "call")
            pair = {"alarms", "boats"}
            assert served or not (asks_for(sample) in pair and pair & words_of(sample))
            if size == 3 and sample.source == "north":
                assert asks_for(sample) in WORDS["north"]


def test_irrelevant_requests_to_a_whole_application_are_of_others() -> None:
    whole = task(irrelevant=0.5)
    for sample in whole.samples:
        assert (asks_for(sample) in words_of(sample)) == (sample.kind == "call")
    alone = DataSet(data().tools, tuple(row for row in data().calls if row.source == "north"))
    with pytest.raises(DataError, match="0 irrelevant requests, not 6: ask for fewer, or name"):
        application_task(alone, Draw("whole", 1, 12, 4, irrelevant=0.5))


def test_mixed_registries_hold_tools_of_all_sources() -> None:
    mixed = task("mixed", size=9, per_registry=8, irrelevant=0.25)
    assert len(mixed.samples) == 12 and len({s.registry.fingerprint for s in mixed.samples}) <= 3
    for sample in mixed.samples:
        assert len(sample.registry) == 9
        assert all(words_of(sample) & set(words.split()) for words in WORDS.values())
        assert (asks_for(sample) in words_of(sample)) == (sample.kind == "call")
    with pytest.raises(DataError, match="16 can stand in one registry, not 17"):
        task("mixed", size=17)


def test_requests_with_two_calls_have_both_due() -> None:
    both = task("part", steps=2, requests=1, size=2)
    assert [sample.turns[-1].request for sample in both.samples] == ["Both of north", "Both of polyai", "Both of south"]
    for sample in both.samples:
        assert [call.name for call in sample.calls] == [step.action for step in sample.due]
        assert {call.name for call in sample.calls} == set(sample.registry.names)
        assert sample.gold.count(THOUGHT_QUESTION) == 2 and f"Observation: {sample.due[0].observation}\n" in sample.gold
    with pytest.raises(DataError, match="takes 3 calls"):
        task(steps=3)
    with pytest.raises(DataError, match="whole calls"):
        task(steps=2, choice_only=True)


def test_invented_names_and_the_choice_alone() -> None:
    real = {tool.name for tool in data().tools.values()}
    invented = task("part", names="invented", choice_only=True)
    assert not any(name in real for sample in invented.samples for name in sample.registry.names)
    assert invented.choice_only and "best" in invented.metrics and "call" not in invented.metrics


def test_impossible_draws_are_errors() -> None:
    with pytest.raises(DataError, match="gives 42 requests, not 100: ask for fewer"):
        task(requests=100)
    with pytest.raises(DataError, match="per registry is 0; expected 1 or more"):
        task(per_registry=0)
    with pytest.raises(DataError, match="expected 0 to 1"):
        task(irrelevant=1.5)


def test_files_of_several_sources(tmp_path: Path) -> None:
    tools, calls = [], []
    for source in ("a", "b"):
        tool = {"id": f"{source}/t", "name": "t", "description": "T", "domain": "", "source": source, "split": "dev"}
        tools.append(tmp_path / f"tools_{source}.jsonl")
        tools[-1].write_text(json.dumps({**tool, "parameters": {}}) + "\n")
        row = {"query": "?", "calls": [{"tool": f"{source}/t", "arguments": {}}], "source": source, "split": "dev"}
        calls.append(tmp_path / f"calls_{source}.jsonl")
        calls[-1].write_text(json.dumps(row) + "\n")
    found = read_data(tools, calls)
    assert list(found.tools) == ["a/t", "b/t"] and [row.source for row in found.calls] == ["a", "b"]
    groups = tmp_path / "near.json"
    groups.write_text('{"t": ["a/t", "b/t"]}')
    assert read_near_duplicates(groups) == [["a/t", "b/t"]]
    groups.write_text('["a/t"]')
    with pytest.raises(DataError, match="expected an object of lists"):
        read_near_duplicates(groups)
