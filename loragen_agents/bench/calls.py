"""`bench calls`: which tool a model calls and with which arguments, on any registry and requests.

Reads the project's intermediate format (`tools.jsonl`, `calls_*.jsonl`), draws registries with a seed and judges the
first call of each request. Knows nothing of models; how registries are drawn is the training sampler's part.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from loragen_agents.bench.tasks import BenchSample, Task
from loragen_agents.conversation.prompts import THOUGHT_QUESTION, TakenStep, Turn
from loragen_agents.conversation.react import Answer, InvalidStep, Step, ToolStep, format_action_input
from loragen_agents.data.episodes import GoldCall, Kind, Sample, target_text
from loragen_agents.data.options import NameMode, SamplerOptions
from loragen_agents.data.records import CallRecord, DataSet, ToolRecord
from loragen_agents.data.sampler import RegistrySampler
from loragen_agents.data.wording import tool_result
from loragen_agents.errors import ArgumentError, DataError
from loragen_agents.registry import InputFormat, ToolRegistry

METRICS: dict[str, str] = {
    "tool": "Tool",
    "arguments_exact": "Args exact",
    "arguments": "Args",
    "call": "Whole call",
    "no_call": "No call",
}


def calls_task(
    tools: Mapping[str, ToolRecord],
    calls: Sequence[CallRecord],
    *,
    registry_size: int = 8,
    requests: int = 40,
    seed: int = 0,
    names: NameMode = "real",
    unserved: float = 0.0,
    input_format: InputFormat = "json",
    name_key: Callable[[str], Hashable] | None = None,
) -> Task:
    """Draw a task: for every source of `calls`, `requests` requests in registries of `registry_size` tools.

    Args:
        tools, calls: as `training.data.read_tools` and `read_calls` give them; wrong tools come from all of `tools`.
        seed: with the other arguments it decides every registry and every request.
        names: "real", or "invented" for a made-up word in place of every tool's name (and the sampler's other modes).
        unserved: share of the requests whose tool is left out of the registry, so that no call is right.
        name_key: where given, the names of a registry differ in this key too (for example in their first token).

    Raises:
        DataError: no calls, or too few to draw `requests` of them for some source.
    """
    split = {record.split for record in calls}
    if len(split) != 1:
        found = ", ".join(sorted(split)) or "none"
        raise DataError(f"The calls must be of one split, for example calls_dev.jsonl; found: {found}.")
    if not 0 <= unserved < 1:
        raise DataError(f"The share of requests served by no tool is {unserved}; expected 0 to below 1.")
    data = DataSet(dict(tools), tuple(calls))
    sources = sorted({record.source for record in calls})
    samples: list[BenchSample] = []
    for source in sources:
        options = SamplerOptions.evaluation(
            tools=registry_size,
            names=names,
            sources={other: float(other == source) for other in sources},
            unserved=unserved,
            input_format=input_format,
        )
        sampler = RegistrySampler(data, seed=seed, split=calls[0].split, options=options, name_key=name_key)
        samples += _draw(sampler, source, requests, unserved)
    settings = {
        "registry_size": registry_size,
        "requests_per_source": requests,
        "seed": seed,
        "names": names,
        "unserved": unserved,
        "input_format": input_format,
    }
    title = f"Calls, {registry_size} tools a registry" + (f", {names} names" if names != "real" else "")
    return Task("calls", title, METRICS, "call", samples, score_call, settings)


def registry_task(registry: ToolRegistry, calls: Sequence[CallRecord], name: str) -> Task:
    """A task of all `calls` on one registry as it stands; a call's `tool` is the name of one of its tools.

    A request with several calls gives a sample for each of them, with the right calls before it taken and a made-up
    result of each (`next_call`); one without calls is one that no tool serves.

    Raises:
        DataError: no calls, or one that the registry's schemas don't allow.
    """
    if not calls:
        raise DataError("There are no requests; expected at least one row with 'query' and 'calls'.")
    samples: list[BenchSample] = []
    for number, record in enumerate(calls, 1):
        taken: list[TakenStep] = []
        rng = random.Random(f"{name}/{number}")
        golds: list[GoldCall | str] = [GoldCall(call.tool, call.arguments) for call in record.calls]
        for place, gold in enumerate(golds or ["Sorry, none of my tools can do that."]):
            kind: Kind = "unserved" if isinstance(gold, str) else "next_call" if place else "call"
            kind_of_request = "two calls, first" if kind == "call" and len(golds) > 1 else kind
            sample = Sample((Turn(record.query, tuple(taken)),), gold, kind, record.source)
            try:
                drawn = _bench_sample(f"{record.source}/{number}/{place}", record.source, sample, registry)
                if isinstance(gold, GoldCall):
                    written = format_action_input(registry[gold.name], gold.arguments, registry.input_format)
                    result = tool_result(gold.name, registry[gold.name].description, gold.arguments, rng)
                    taken.append(TakenStep(gold.name, written, result))
            except (KeyError, ArgumentError) as error:
                raise DataError(f"row {number}, {record.query!r}: {str(error).strip(chr(34))}") from error
            samples.append(replace(drawn, kind=kind_of_request))
    title = f"Calls, the {len(registry)} tools of {name}"
    return Task("calls", title, METRICS, "call", samples, score_call, {"registry": name})


def _draw(sampler: RegistrySampler, source: str, requests: int, unserved: float) -> list[BenchSample]:
    left = {True: round(requests * unserved)}  # by whether no call is due
    left[False] = requests - left[True]
    drawn: list[BenchSample] = []
    asked: set[tuple[str, str]] = set()
    # Small sources run out of new requests: then the task says so instead of asking one twice.
    for index in range(20 * requests):
        episode = sampler.episode(index)
        for number, sample in enumerate(episode.samples):
            key = (sample.turns[-1].request, episode.registry.fingerprint)
            if key not in asked and left[isinstance(sample.gold, str)]:
                asked.add(key)
                left[isinstance(sample.gold, str)] -= 1
                drawn.append(_bench_sample(f"{source}/{index}/{number}", source, sample, episode.registry))
        if not any(left.values()):
            return drawn
    raise DataError(f"Source {source!r} gives {len(drawn)} requests only; ask for fewer than {requests}.")


def _bench_sample(sample_id: str, source: str, sample: Sample, registry: ToolRegistry) -> BenchSample:
    gold = THOUGHT_QUESTION + target_text(sample, registry)
    call = None if isinstance(sample.gold, str) else sample.gold
    return BenchSample(sample_id, source, sample.kind, registry, sample.turns, gold, call=call)


def score_call(sample: BenchSample, generated: str, step: Step) -> dict[str, float]:
    """The metrics of one sample, each in [0, 1].

    Where a call is due: `tool` (its name is right), `arguments_exact` and `arguments` (share of right arguments among
    all that the gold call or the predicted one gives, by `==` and by `normalised`; 0 for a wrong tool), `call` (tool
    and all arguments, normalised). Where none is due: `no_call` (an answer was written). An argument that the schema
    requires and the gold call leaves out is not judged: the request doesn't say what it is.
    """
    gold = sample.call
    if gold is None:
        return {"no_call": float(isinstance(step, Answer))}
    action = None if isinstance(step, Answer) else step.action
    if action != gold.name:
        return {"tool": 0.0, "arguments_exact": 0.0, "arguments": 0.0, "call": 0.0}
    arguments = step.arguments if isinstance(step, ToolStep) else _legible(step)
    if arguments is None:
        return {"tool": 1.0, "arguments_exact": 0.0, "arguments": 0.0, "call": 0.0}
    unjudged = sample.registry[gold.name].required - gold.arguments.keys()
    given = {name: value for name, value in arguments.items() if name not in unjudged}
    exact = _share(gold.arguments, given, lambda a, b: type(a) is type(b) and a == b)
    close = _share(gold.arguments, given, lambda a, b: normalised(a) == normalised(b))
    valid = isinstance(step, ToolStep)
    return {"tool": 1.0, "arguments_exact": exact, "arguments": close, "call": float(valid and close == 1.0)}


def _legible(step: Step) -> dict[str, Any] | None:
    """The arguments of a call that its schema refuses: they count one by one, though the call as a whole is wrong."""
    try:
        value = json.loads(step.action_input or "") if isinstance(step, InvalidStep) else None
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _share(gold: Mapping[str, Any], given: Mapping[str, Any], same: Callable[[Any, Any], bool]) -> float:
    names = gold.keys() | given.keys()
    right = sum(name in gold and name in given and same(gold[name], given[name]) for name in names)
    return right / len(names) if names else 1.0


_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBER_WORDS = {word: float(number) for number, word in enumerate(_WORDS)}
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = re.compile(r"[^\w\s.:/@+-]|[.:,](?=\s|$)")


def normalised(value: Any) -> Any:
    """An argument value as it is compared loosely.

    Text: case, articles, quotes, closing punctuation and the amount of white space don't count. Numbers and truth
    values are the same as text and as values, number words up to ten are numbers, 2.0 is 2. Lists and objects by their
    items.
    """
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, (int, float)):
        return _number(float(value))
    if isinstance(value, Mapping):
        return tuple(sorted((str(key), normalised(item)) for key, item in value.items()))
    if isinstance(value, (list, tuple)):
        return tuple(normalised(item) for item in value)
    text = " ".join(_PUNCTUATION.sub(" ", str(value).casefold()).split())
    text = " ".join(_ARTICLES.sub(" ", text).split()) or text
    if text in _NUMBER_WORDS:
        return _number(_NUMBER_WORDS[text])
    try:
        return _number(float(text))
    except ValueError:
        return text


def _number(value: float) -> Any:
    return value if math.isfinite(value) else str(value)
