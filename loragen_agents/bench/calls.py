"""`bench calls`: which tool a model calls and with which arguments, on any registry and requests.

Makes tasks of the project's intermediate format (`tools.jsonl`, `calls_*.jsonl`). Knows nothing of models. How
registries are drawn is `registries` (whole applications, parts, mixtures) and the training sampler's part (small ones,
with tools that are hard to tell apart).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from loragen_agents.bench.call_scores import CHOICE_METRICS, METRICS, score_call, score_choice
from loragen_agents.bench.registries import Draw, RegistryDrawer
from loragen_agents.bench.tasks import BenchSample, Task
from loragen_agents.conversation.prompts import THOUGHT_QUESTION, TakenStep, Turn
from loragen_agents.conversation.react import format_action_input
from loragen_agents.data.episodes import GoldCall, Sample, SampleKind, target_text
from loragen_agents.data.options import NameMode, SamplerOptions
from loragen_agents.data.records import CallRecord, DataSet, ToolRecord, read_call_records, read_tool_records
from loragen_agents.data.sampler import RegistrySampler
from loragen_agents.data.wording import tool_result
from loragen_agents.errors import ArgumentError, DataError
from loragen_agents.registry import InputFormat, ToolRegistry

_TITLES = {"whole": "whole applications", "part": "{} tools of an application", "mixed": "{} tools of mixed sources"}


def read_data(tools: Iterable[Path], calls: Iterable[Path]) -> DataSet:
    """Tools and calls of several files.

    Raises:
        DataError: a file is missing or damaged, or two define one tool differently.
    """
    data = DataSet()
    for path in tools:
        data = data + DataSet(read_tool_records(path))
    rows = [row for path in calls for row in read_call_records(path, data.tools)]
    return DataSet(data.tools, tuple(rows))


def read_near_duplicates(path: Path) -> list[list[str]]:
    """Groups of tool ids from a JSON object of lists.

    Raises:
        DataError: the file is missing or of another form.
    """
    try:
        groups = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(groups, dict) or not all(
            isinstance(group, list) and all(isinstance(tool_id, str) for tool_id in group) for group in groups.values()
        ):
            raise ValueError('expected an object of lists of tool ids, {"alarm": ["a/set_alarm", ...]}')
    except (OSError, ValueError) as error:
        raise DataError(f"{path} can't be read as groups of near-duplicates: {error}.") from error
    return list(groups.values())


def application_task(
    data: DataSet,
    draw: Draw,
    *,
    seed: int = 0,
    near_duplicates: Iterable[Sequence[str]] = (),
    name_key: Callable[[str], Hashable] | None = None,
    choice_only: bool = False,
) -> Task:
    """Requests to whole applications, parts of them, or mixtures; see `Draw` and `RegistryDrawer`.

    Args:
        choice_only: ask for the tool alone, not for its arguments.

    Raises:
        DataError: the data has too few tools or requests for it, or several calls are asked for of the choice alone.
    """
    if choice_only and draw.steps > 1:
        raise DataError("Several calls a request need whole calls: leave --choice-only out, or --steps.")
    groups = [list(group) for group in near_duplicates]
    samples = RegistryDrawer(data, draw, seed=seed, near_duplicates=groups, name_key=name_key).samples()
    title = _TITLES[draw.scheme].format(draw.size)
    title += f", {draw.steps} calls a request" if draw.steps > 1 else ""
    title += f", {draw.names} names" if draw.names != "real" else ""
    settings = {**asdict(draw), "seed": seed, "near_duplicates": bool(groups)}
    return _task(title, samples, settings, choice_only)


def calls_task(
    tools: Mapping[str, ToolRecord],
    calls: Sequence[CallRecord],
    *,
    registry_size: int = 8,
    requests: int = 40,
    seed: int = 0,
    names: NameMode = "real",
    irrelevant: float = 0.0,
    input_format: InputFormat = "json",
    name_key: Callable[[str], Hashable] | None = None,
    choice_only: bool = False,
) -> Task:
    """Draw a task: for every source of `calls`, `requests` requests in registries of `registry_size` tools.

    Args:
        tools, calls: as `read_tool_records` and `read_call_records` give them; wrong tools come from all of `tools`.
        seed: with the other arguments it decides every registry and every request.
        names: "real", or "invented" for a made-up word in place of every tool's name (and the sampler's other modes).
        irrelevant: share of the requests whose tool is left out of the registry, so that no call is right.
        name_key: where given, the names of a registry differ in this key too (for example in their first token).
        choice_only: ask for the tool alone, not for its arguments.

    Raises:
        DataError: no calls, or too few to draw `requests` of them for some source.
    """
    split = {record.split for record in calls}
    if len(split) != 1:
        found = ", ".join(sorted(split)) or "none"
        raise DataError(f"The calls must be of one split, for example calls_dev.jsonl; found: {found}.")
    if not 0 <= irrelevant < 1:
        raise DataError(f"The share of requests served by no tool is {irrelevant}; expected 0 to below 1.")
    data = DataSet(dict(tools), tuple(calls))
    sources = sorted({record.source for record in calls})
    samples: list[BenchSample] = []
    for source in sources:
        options = SamplerOptions.evaluation(
            tools=registry_size,
            names=names,
            sources={other: float(other == source) for other in sources},
            irrelevant=irrelevant,
            input_format=input_format,
        )
        sampler = RegistrySampler(data, seed=seed, split=calls[0].split, options=options, name_key=name_key)
        samples += _draw(sampler, source, requests, irrelevant)
    settings = {
        "registry_size": registry_size,
        "requests_per_source": requests,
        "seed": seed,
        "names": names,
        "irrelevant": irrelevant,
        "input_format": input_format,
    }
    title = f"{registry_size} tools a registry" + (f", {names} names" if names != "real" else "")
    return _task(title, samples, settings, choice_only)


def registry_task(registry: ToolRegistry, calls: Sequence[CallRecord], name: str, *, choice_only: bool = False) -> Task:
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
            kind: SampleKind = "irrelevant" if isinstance(gold, str) else "next_call" if place else "call"
            sample = Sample((Turn(record.query, tuple(taken)),), gold, kind, record.source)
            try:
                drawn = _bench_sample(f"{record.source}/{number}/{place}", record.source, sample, registry)
                if isinstance(gold, GoldCall):
                    written = format_action_input(registry[gold.name], gold.arguments, registry.input_format)
                    result = tool_result(gold.name, registry[gold.name].description, gold.arguments, rng)
                    taken.append(TakenStep(gold.name, written, result))
            except (KeyError, ArgumentError) as error:
                raise DataError(f"row {number}, {record.query!r}: {str(error).strip(chr(34))}") from error
            first_of_several = kind == "call" and len(golds) > 1
            samples.append(replace(drawn, kind="two calls, first") if first_of_several else drawn)
    return _task(f"the {len(registry)} tools of {name}", samples, {"registry": name}, choice_only)


def _task(title: str, samples: Sequence[BenchSample], settings: Mapping[str, Any], choice_only: bool) -> Task:
    """A task of whole calls, or of the choice alone."""
    if choice_only:
        title = f"Tool choice, {title}"
        return Task("choice", title, CHOICE_METRICS, samples, score_choice, settings, choice_only=True)
    return Task("calls", f"Calls, {title}", METRICS, samples, score_call, settings)


def _draw(sampler: RegistrySampler, source: str, requests: int, irrelevant: float) -> list[BenchSample]:
    left = {True: round(requests * irrelevant)}  # by whether no call is due
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
    calls = () if isinstance(sample.gold, str) else (sample.gold,)
    return BenchSample(sample_id, source, sample.kind, registry, sample.turns, gold, calls=calls)
