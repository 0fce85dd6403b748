"""Episodes: their samples parse back, repeat exactly, and never show what is held out."""

import itertools
import random
from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loragen_agents.conversation.react import Answer, ToolStep, parse_step
from loragen_agents.data import augmentation as augment
from loragen_agents.data import wording
from loragen_agents.data.episodes import Episode, target_parts, target_text
from loragen_agents.data.options import SamplerOptions
from loragen_agents.data.overlap import Overlap
from loragen_agents.data.records import Call, CallRecord, DataSet, ToolRecord
from loragen_agents.data.request_noise import noisy
from loragen_agents.data.sampler import RegistrySampler
from loragen_agents.data.views import draw_names
from loragen_agents.errors import DataError

WORDS = ("lamp", "river", "train", "cake", "photo", "letter", "garden", "song", "window", "market", "hotel", "coin")


def own_words(tool_id: str) -> str:
    """Words that no other tool has: they keep it apart from all others."""
    return " ".join(augment.invented_word(random.Random(f"{tool_id} {part}"), 3) for part in range(4))


def make_tool(number: int, source: str, domain: str, split: str = "train") -> ToolRecord:
    word = WORDS[number % len(WORDS)]
    own = own_words(f"{source}/{number}")
    properties = {
        "object": {"type": "string", "description": f"which {word}"},
        "count": {"type": "integer", "description": "how many"},
        "mode": {"type": "string", "enum": ["fast", "slow"]},
        "note": {"type": "string"},
    }
    return ToolRecord(
        id=f"{source}/{number}",
        name=f"find{word.capitalize()}{number}",
        description=f"Find a {word} for {own}. It also works at night.",
        domain=domain,
        source=source,
        split=split,  # type: ignore[arg-type]
        parameters={
            "type": "object",
            "properties": dict(list(properties.items())[: number % 5]),
            "required": list(properties)[: min(1, number % 5)],
        },
    )


def make_calls(tool: ToolRecord, rng: random.Random) -> list[CallRecord]:
    values = {
        "object": lambda: rng.choice(["a, b", 'the "old" one', "x", "42", "true", "line\nbreak", "ü ö", " spaced"]),
        "count": lambda: rng.randint(-3, 99),
        "mode": lambda: rng.choice(["fast", "slow"]),
        "note": lambda: rng.choice(["now", "Action: stop", "{}", "None, or all"]),
    }
    calls = []
    for index in range(6):
        given = {name: values[name]() for name in tool.properties if name in tool.required or rng.random() < 0.6}
        calls.append(CallRecord(f"{own_words(tool.id)} {index}", (Call(tool.id, given),), tool.source, tool.split))
    return calls


@cache
def small_data() -> DataSet:
    rng = random.Random(0)
    tools = [make_tool(number, f"source{number % 3}", f"domain{number % 4}") for number in range(36)]
    tools += [make_tool(number, "source0", "held", "dev") for number in range(40, 44)]
    calls = [call for tool in tools for call in make_calls(tool, rng)]
    for first, second in itertools.pairwise(tools[:10]):
        steps = (calls[6 * tools.index(first)].calls[0], calls[6 * tools.index(second)].calls[0])
        calls.append(CallRecord(f"First {first.id} then {second.id}", steps, first.source, "train"))
    # A dev request of a training tool: from then on no training sample may hold that tool.
    calls.append(CallRecord("Check", (calls[6 * 20].calls[0],), tools[20].source, "dev"))
    return DataSet({tool.id: tool for tool in tools}, tuple(calls))


@cache
def sampler(split: str = "train") -> RegistrySampler:
    return RegistrySampler(small_data(), seed=5, split=split)  # type: ignore[arg-type]


def content(episode: Episode) -> tuple:
    return episode.registry.fingerprint, episode.tool_ids, episode.samples


@settings(max_examples=150, deadline=None)
@given(index=st.integers(0, 10**9))
def test_samples_parse_back_to_the_calls_they_were_made_from(index):
    episode = sampler().episode(index)
    for sample in episode.samples:
        step = parse_step(target_text(sample, episode.registry), episode.registry)
        if isinstance(sample.gold, str):
            assert isinstance(step, Answer)
            assert step.text == sample.gold
            continue
        assert isinstance(step, ToolStep), step
        assert (step.action, step.arguments) == (sample.gold.name, sample.gold.arguments)
        # Argument names differ between registries, values and their number do not.
        assert episode.tool_ids[episode.registry.names.index(sample.gold.name)] == sample.tool
        asked = [call.arguments for call in small_calls(sample.tool)]
        assert sorted(map(repr, step.arguments.values())) in [sorted(map(repr, given.values())) for given in asked]


def small_calls(tool_id: str | None) -> list[Call]:
    return [call for record in small_data().calls for call in record.calls if call.tool == tool_id]


@settings(max_examples=60, deadline=None)
@given(index=st.integers(0, 10**6))
def test_the_earlier_steps_of_a_sample_parse_too(index):
    episode = sampler().episode(index)
    for sample in episode.samples:
        for taken in (step for turn in sample.turns for step in turn.steps):
            text = f" Yes\nAction: {taken.action}\nAction Input: {taken.action_input}\nObservation:"
            assert isinstance(parse_step(text, episode.registry), ToolStep)
            assert taken.observation
            assert "\n" not in taken.observation
        assert [turn.answer is None for turn in sample.turns] == [False] * (len(sample.turns) - 1) + [True]


def test_episodes_repeat_exactly():
    again = RegistrySampler(small_data(), seed=5)
    drawn = [content(sampler().episode(index)) for index in range(6)]
    assert [content(again.episode(index)) for index in reversed(range(6))] == drawn[::-1]
    assert content(RegistrySampler(small_data(), seed=6).episode(0)) != drawn[0]


def test_training_never_shows_a_held_out_tool_and_dev_asks_for_nothing_else():
    held_out = small_data().held_out_tools()
    assert len(held_out) == 5
    for index in range(150):
        assert not held_out & set(sampler().episode(index).tool_ids)
    gold = {sample.tool for index in range(60) for sample in sampler("dev").episode(index).samples} - {None}
    assert gold
    assert gold <= held_out


def test_every_kind_format_and_size_comes_up():
    kinds: Counter[str] = Counter()
    formats: Counter[str] = Counter()
    sizes = set()
    for index in range(200):
        episode = sampler().episode(index)
        kinds.update(sample.kind for sample in episode.samples)
        formats[episode.registry.input_format] += 1
        sizes.add(len(episode.registry))
        assert len(episode.samples) == 8
        assert len({sample.turns for sample in episode.samples}) == 8
    assert set(kinds) == {"call", "next_call", "final_answer", "irrelevant", "chat"}
    assert min(kinds.values()) > 20
    assert formats["csv"] > 20
    assert formats["json"] > 60
    assert min(sizes) <= 3
    assert max(sizes) >= 25


def test_a_request_is_irrelevant_only_where_its_tool_is_missing():
    served = {record.query: {call.tool for call in record.calls} for record in small_data().calls}
    for index in range(150):
        episode = sampler().episode(index)
        for sample in episode.samples:
            if sample.kind == "irrelevant":
                assert sample.tool is None
                assert not served[sample.turns[-1].request] & set(episode.tool_ids)


def test_evaluation_options_fix_size_names_and_kinds():
    options = SamplerOptions.evaluation(tools=12, names="real", irrelevant=0.5, sources={"source0": 1.0})
    drawn = RegistrySampler(small_data(), split="dev", options=options)
    names = {tool.id: tool.name for tool in small_data().tools.values()}
    kinds: Counter[str] = Counter()
    for index in range(40):
        episode = drawn.episode(index)
        assert len(episode.registry) == 12
        assert [names[tool_id] for tool_id in episode.tool_ids] == list(episode.registry.names)
        kinds.update(sample.kind for sample in episode.samples)
    assert set(kinds) == {"call", "irrelevant"}
    assert 0.3 < kinds["call"] / kinds.total() < 0.7


def test_invented_names_differ_in_their_key_and_share_nothing_with_the_tools():
    options = SamplerOptions.evaluation(tools=24, names="invented", sources={"source0": 1.0})
    drawn = RegistrySampler(small_data(), split="dev", options=options, name_key=lambda name: name[:2].casefold())
    for index in range(10):
        names = drawn.episode(index).registry.names
        assert len({name[:2].casefold() for name in names}) == 24
        assert not any(word in name.lower() for name in names for word in WORDS)


def test_swapped_names_stand_at_other_tools():
    options = SamplerOptions(names={"swapped": 1.0}, mixed_names=0.0, tools=((6, 6, 1.0),))
    drawn = RegistrySampler(small_data(), seed=1, options=options)
    own = {tool.id: tool.name for tool in small_data().tools.values()}
    for index in range(20):
        episode = drawn.episode(index)
        names = dict(zip(episode.tool_ids, episode.registry.names, strict=True))
        assert all(names[tool_id] != own[tool_id] for tool_id in names)
        assert sorted(names.values()) == sorted(own[tool_id] for tool_id in names)


def test_parts_make_up_the_target():
    for index in range(40):
        episode = sampler().episode(index)
        for sample in episode.samples:
            parts = target_parts(sample, episode.registry)
            assert "".join(part.text for part in parts) == target_text(sample, episode.registry)
            expected = ["decision", "format", "answer"]
            if not isinstance(sample.gold, str):
                expected = ["decision", "format", "name", "format", "arguments", "format"]
            assert [part.part for part in parts] == expected


def test_tools_with_list_arguments_are_shown_with_json_inputs():
    parameters = {"type": "object", "properties": {"names": {"type": "array", "items": {"type": "string"}}}}
    tool = ToolRecord("a/sort", "sort", "Sort names.", "a", "a", "train", parameters)
    calls = [CallRecord(f"Sort {i}", (Call("a/sort", {"names": ["b", "a"]}),), "a", "train") for i in range(9)]
    drawn = RegistrySampler(DataSet({tool.id: tool}, tuple(calls)), options=SamplerOptions(csv=1.0))
    assert {drawn.episode(index).registry.input_format for index in range(5)} == {"json"}


def test_data_without_requests_is_refused():
    with pytest.raises(DataError, match="no requests of split 'train'"):
        RegistrySampler(DataSet(small_data().tools, ()))


def test_sister_services_conflict_and_other_services_do_not():
    def service(domain: str, name: str) -> ToolRecord:
        return ToolRecord(f"sgd/{domain}.{name}", name, f"{name} something", domain, "sgd", "train", {})

    tools = [service(*pair) for pair in (("Hotels_1", "Find"), ("Hotels_1", "Book"), ("Hotels_2", "Find"))]
    tools += [service("Buses_1", "Find"), service("Media_1", "Find"), service("Movies_2", "Find")]
    overlap = Overlap({tool.id: tool for tool in tools}, [])
    assert not overlap.conflict("sgd/Hotels_1.Find", "sgd/Hotels_1.Book")
    assert overlap.conflict("sgd/Hotels_1.Find", "sgd/Hotels_2.Find")
    assert overlap.conflict("sgd/Media_1.Find", "sgd/Movies_2.Find")
    assert not overlap.conflict("sgd/Hotels_1.Find", "sgd/Buses_1.Find")
    assert overlap.serves("sgd/Hotels_1.Book", "sgd/Hotels_1.Find")
    assert not overlap.serves("sgd/Buses_1.Find", "sgd/Hotels_1.Find")


@settings(deadline=None)
@given(seed=st.integers(), words=st.permutations(WORDS).map(lambda words: words[:4]))
def test_names_keep_their_words_in_every_style(seed, words):
    for style in augment.STYLES:
        name = augment.join_words(words, style)
        assert "".join(words) == name.lower().replace("_", "").replace("-", "").replace(" ", "")
        if style not in ("flat",):
            assert augment.split_words(name) == words
    mapping = augment.renamed_arguments(words, random.Random(seed))
    assert list(mapping) == words
    assert len({name.casefold() for name in mapping.values()}) == len(words)


@settings(deadline=None)
@given(seed=st.integers(), size=st.integers(2, len(WORDS)))
def test_shuffled_apart_leaves_nothing_in_place(seed, size):
    items = WORDS[:size]
    moved = augment.shuffled_apart(items, random.Random(seed))
    assert sorted(moved) == sorted(items)
    assert all(one != other for one, other in zip(moved, items, strict=True))


def test_shortened_descriptions_stay_within_the_first_sentence():
    text = "Search and preview millions of assets, for games and AR. Powered by X."
    assert augment.first_sentence(text) == "Search and preview millions of assets, for games and AR."
    for seed in range(30):
        assert text.startswith(augment.shortened(text, random.Random(seed)))
    assert augment.useful_when("Get the weather.", ["city", "startDate"]) == (
        "useful when you want to get the weather. The input to this tool should be a comma separated string of 2, "
        "representing the city and the start date."
    )


def test_every_phrase_can_be_filled():
    rng = random.Random(0)
    for _ in range(500):
        request, answer = wording.small_talk(rng)
        assert request
        assert answer
        assert "{" not in request + answer
        assert "\n" not in request + answer
        result = wording.tool_result("getThing", "Get it.", {"a": "b"} if rng.random() < 0.5 else {}, rng)
        assert result
        assert "\n" not in result
        assert "{first}" not in wording.joined_request("Do this.", "Show me that", rng)


def test_two_requests_are_joined_as_people_join_them() -> None:
    rng = random.Random(0)
    drawn = {wording.joined_request("Play it.", "Show me Rome", rng) for _ in range(200)}
    assert {"Play it and show me Rome", "Play it, then show me Rome", "Play it. After that, show me Rome"} <= drawn
    asked = {wording.joined_request("Play it", "Is it late?", rng) for _ in range(200)}
    assert all(request.startswith(("Play it. ", "First", "Two")) for request in asked)  # a question is no clause


def test_new_names_hold_numbers_or_begin_like_values_where_that_is_asked_for():
    records = list(small_data().tools.values())[:12]

    def names(numbered: float, echoed: float) -> list[str]:
        options = SamplerOptions(names={"invented": 1.0}, mixed_names=0.0, numbered_names=numbered, echoed_names=echoed)
        return draw_names(records, options, str.casefold, random.Random(3), ["Lisbon or", "42 Marble"])[0]

    plain = names(0.0, 0.0)
    assert not any(letter.isdigit() for letter in "".join(plain))
    assert {name[:1].casefold() for name in plain} - {"l", "m"}
    assert all(any(letter.isdigit() for letter in name) for name in names(1.0, 0.0))
    assert {name[:1].casefold() for name in names(0.0, 1.0)} == {"l", "m"}


def test_tools_that_the_data_calls_alike_never_share_a_registry():
    data = small_data()
    ids = sorted(tool.id for tool in data.tools.values() if tool.split == "train")
    groups = (frozenset(ids[:8]), frozenset(ids[8:14]))
    drawn = RegistrySampler(replace(data, alike=groups), seed=2, options=SamplerOptions(tools=((6, 8, 1.0),)))
    for index in range(30):
        golds = {sample.tool for sample in drawn.episode(index).samples} - {None}
        held = set(drawn.episode(index).tool_ids)
        for gold in golds:
            assert not any((held - {gold}) & group for group in groups if gold in group)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=60)
def test_noise_leaves_values_whole_and_changes_the_rest(seed):
    request, values = "Send the Draft Report to Anna Keller on Friday.", ["Draft Report", "Anna Keller", 5, ["Friday"]]
    typed = noisy(request, values, random.Random(seed))
    assert all(value in typed for value in ("Draft Report", "Anna Keller", "Friday"))
    assert abs(len(typed) - len(request)) < 30


def test_noise_changes_most_requests():
    request = "Send the Draft Report to Anna Keller on Friday."
    typed = {noisy(request, ["Anna Keller"], random.Random(seed)) for seed in range(50)}
    assert len(typed - {request}) > 10
    assert any(text[:4].islower() for text in typed)


def test_a_request_may_point_to_a_value_that_an_earlier_turn_holds():
    tools, calls = {}, []
    for number in range(4):
        tool = make_tool(number, "s", "d")
        tool = replace(tool, parameters={"type": "object", "properties": {"object": {"type": "string"}}})
        tools[tool.id] = tool
        calls += [CallRecord(f"{own_words(tool.id)} {w}", (Call(tool.id, {"object": w}),), "s", "train") for w in WORDS]
    options = SamplerOptions(referred=1.0, kinds={"call": 1.0}, history=0.0, sources={"s": 1.0}, tools=((3, 4, 1.0),))
    drawn = RegistrySampler(DataSet(tools, tuple(calls)), seed=3, options=options)
    pointing = []
    for sample in (sample for index in range(6) for sample in drawn.episode(index).samples):
        assert not isinstance(sample.gold, str)
        (earlier, asked), (value,) = sample.turns, sample.gold.arguments.values()
        held = " ".join([earlier.request, *(step.observation for step in earlier.steps)])
        assert value in held
        assert value not in asked.request.split()
        pointing.append(bool(earlier.steps))
    assert set(pointing) == {True, False}


def test_a_value_is_pointed_to_only_where_it_stands_once():
    rng = random.Random(0)
    assert wording.referred("move it from hall to hall", "hall", rng) is None
    assert wording.referred("paint the hallway", "hall", rng) is None
    made = wording.referred("paint the hall red", "hall", rng)
    assert made is not None
    request, (said, _), (observed, told) = made
    assert "hall" not in request
    assert "hall" in said
    assert "hall" in observed
    assert "hall" in told
