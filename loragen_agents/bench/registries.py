"""Draws the realistic registries of `bench calls`: whole applications, parts of them, and mixtures.

A registry serves many requests, so that a figure over 300 of them takes few readings of tools. What an application is
depends on the source (`application_of`). Knows nothing of models and scores; the registries that training draws are
`data.sampler`'s part.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from loragen_agents.bench.tasks import BenchSample
from loragen_agents.conversation.prompts import THOUGHT_QUESTION, TakenStep, Turn
from loragen_agents.conversation.react import answer_text, format_action_input, tool_step_text
from loragen_agents.data import wording
from loragen_agents.data.options import NameMode, SamplerOptions
from loragen_agents.data.overlap import Overlap
from loragen_agents.data.records import CallRecord, DataSet, ToolRecord, repair
from loragen_agents.data.views import View, draw_views
from loragen_agents.errors import ArgumentError, DataError
from loragen_agents.registry import InputFormat, ToolRegistry

Scheme = Literal["whole", "part", "mixed"]
SCHEMES: tuple[Scheme, ...] = ("whole", "part", "mixed")

# Sources that hold several applications, each in a domain of its own. Every other source is one application: slurp is
# one home assistant, thingpedia one phone assistant, metatool one store of plug-ins.
_BY_DOMAIN = frozenset({"luis-skills", "polyai", "star", "sgd", "taskmaster4", "computer"})
# Domains of seal-tools are fields and their branches ("Sports/Cycling"); an application serves a field.
_BY_FIELD = frozenset({"seal-tools"})


def application_of(tool: ToolRecord) -> str:
    """The application that a tool belongs to, as `source` or `source/domain`."""
    if tool.source in _BY_DOMAIN:
        return f"{tool.source}/{tool.domain}"
    if tool.source in _BY_FIELD:
        return f"{tool.source}/{tool.domain.split('/')[0]}"
    return tool.source


@dataclass(frozen=True)
class Draw:
    """How registries and requests are drawn.

    Attributes:
        scheme: "whole" (all tools of an application), "part" (`size` of them) or "mixed" (`size` tools of all sources).
        size: tools in a registry; "whole" does without.
        requests: requests of each source; of all sources together where they are mixed.
        per_registry: requests to one registry, as far as its tools have them.
        irrelevant: share of the requests that no tool of the registry serves.
        steps: calls that a request takes, each made behind the observations of those before.
        names: where the tools' names come from; see `NameMode`.
    """

    scheme: Scheme
    size: int
    requests: int
    per_registry: int
    irrelevant: float = 0.0
    steps: int = 1
    names: NameMode = "real"
    input_format: InputFormat = "json"

    def __post_init__(self) -> None:
        if not 0 <= self.irrelevant <= 1:
            raise DataError(f"The share of irrelevant requests is {self.irrelevant}; expected 0 to 1.")
        for name in ("size", "requests", "per_registry", "steps"):
            if getattr(self, name) < 1:
                raise DataError(f"{name.replace('_', ' ')} is {getattr(self, name)}; expected 1 or more.")


class RegistryDrawer:
    """Draws samples by a seed; equal arguments give equal samples.

    Args:
        data: the tools that registries are made of, and the requests that may be asked.
        draw: how.
        near_duplicates: groups of tool ids that could answer the same request. A registry holds at most one of a group
            (the one with the most requests in whole applications), and a tool of a group is no reason to turn down a
            request for another one.
        name_key: names of a registry differ in this key.
    """

    def __init__(
        self,
        data: DataSet,
        draw: Draw,
        *,
        seed: int = 0,
        near_duplicates: Iterable[Sequence[str]] = (),
        name_key: Callable[[str], Hashable] | None = None,
    ) -> None:
        data = repair(data)
        self._tools, self._draw, self._seed = data.tools, draw, seed
        self._name_key = name_key or str.casefold
        self._groups: dict[str, set[int]] = {tool_id: set() for tool_id in self._tools}
        for number, group in enumerate(near_duplicates):
            for tool_id in self._tools.keys() & set(group):
                self._groups[tool_id].add(number)
        clear = _unambiguous(data.calls)
        self._rows = [row for row in clear if len(row.calls) == draw.steps]
        self._single: dict[str, list[CallRecord]] = defaultdict(list)
        for row in clear:
            if len(row.calls) == 1:
                self._single[row.calls[0].tool].append(row)
        self._requests = Counter(call.tool for row in clear for call in row.calls)
        self._overlap = Overlap(self._tools, data.calls)
        self._members: dict[str, list[str]] = defaultdict(list)
        for tool in self._tools.values():
            self._members[application_of(tool)].append(tool.id)

    def samples(self) -> list[BenchSample]:
        """Draw all samples; those of one registry stand together.

        Raises:
            DataError: no request takes as many calls as asked for, or there are too few.
        """
        if not self._rows:
            raise DataError(f"No request of these calls takes {self._draw.steps} calls.")
        sources = sorted({row.source for row in self._rows})
        draw, samples = self._draw, []
        for source in ["mixed"] if draw.scheme == "mixed" else sources:
            rng = random.Random(f"{self._seed}/{draw.scheme}/{source}")
            plan: Iterable[tuple[list[str], int]]
            if draw.scheme == "whole":
                plan = self._whole(source)
            else:
                # Around one row's tools, so that it can be asked; the other tools have requests, too, or don't.
                seeds = self._turns_of_tools([source] if draw.scheme == "part" else sources, rng)
                fill = self._part if draw.scheme == "part" else self._mixed
                served = draw.per_registry - round(draw.irrelevant * draw.per_registry)
                plan = ((fill(golds, rng), served) for golds in seeds)
            samples += self._ask(source, plan, rng)
        return samples

    # Which tools stand in a registry

    def _whole(self, source: str) -> list[tuple[list[str], int]]:
        """The applications of a source, and how many requests to each: every tool gets equally many where it can."""
        registries = []
        for _, members in sorted(self._members.items()):
            if self._tools[members[0]].source == source:
                kept = set(self._compatible([], sorted(members, key=lambda tool_id: -self._requests[tool_id])))
                registries.append([tool_id for tool_id in members if tool_id in kept])
        supplies = [
            Counter(row.calls[0].tool for row in self._rows if all(call.tool in ids for call in row.calls))
            for ids in map(set, registries)
        ]
        wanted = self._draw.requests - round(self._draw.requests * self._draw.irrelevant)
        quotas, level = [0] * len(registries), 0
        while sum(quotas) < wanted and any(level < count for supply in supplies for count in supply.values()):
            level += 1
            for place, supply in enumerate(supplies):
                more = sum(count >= level for count in supply.values())
                quotas[place] += min(more, wanted - sum(quotas))
        return list(zip(registries, quotas, strict=True))

    def _turns_of_tools(self, sources: Sequence[str], rng: random.Random) -> Iterator[list[str]]:
        """Tools of one row after another, without end: every tool that is asked for has its turn."""
        rows: dict[str, list[CallRecord]] = defaultdict(list)
        for row in self._rows:
            if row.source in sources and len({call.tool for call in row.calls}) <= self._draw.size:
                rows[row.calls[0].tool].append(row)
        while rows:
            for tool_id in rng.sample(sorted(rows), len(rows)):
                yield list(dict.fromkeys(call.tool for call in rng.choice(rows[tool_id]).calls))

    def _part(self, golds: list[str], rng: random.Random) -> list[str]:
        """A part of the application of `golds`; small applications are filled up from their source, then from all."""
        source, siblings = self._tools[golds[0]].source, self._members[application_of(self._tools[golds[0]])]
        ids = golds
        for pool in (
            siblings,
            [tool.id for tool in self._tools.values() if tool.source == source],
            list(self._tools),
        ):
            if len(ids) < self._draw.size:
                ids = self._compatible(ids, rng.sample(pool, len(pool)), self._draw.size)
        return self._shuffled(ids, rng)

    def _mixed(self, golds: list[str], rng: random.Random) -> list[str]:
        """Tools of all sources; each source gives as many as the others, or all it has.

        Where irrelevant requests are to be asked, their share of the tools that have requests is left out.
        """
        pools: dict[str, list[str]] = defaultdict(list)
        for tool in self._tools.values():
            if not (self._requests[tool.id] and rng.random() < self._draw.irrelevant):
                pools[tool.source].append(tool.id)
        for pool in pools.values():
            rng.shuffle(pool)
        ids = golds
        while pools and len(ids) < self._draw.size:
            for source in sorted(pools):
                size = len(ids) + 1
                while pools[source] and len(ids) < size <= self._draw.size:
                    ids = self._compatible(ids, [pools[source].pop()])
                if not pools[source]:
                    del pools[source]
        return self._shuffled(ids, rng)

    def _shuffled(self, ids: list[str], rng: random.Random) -> list[str]:
        if len(ids) < self._draw.size:
            raise DataError(
                f"Of these tools {len(ids)} can stand in one registry, not {self._draw.size}: name more with --tools."
            )
        rng.shuffle(ids)
        return ids

    def _compatible(self, ids: Sequence[str], more: Iterable[str], size: int | None = None) -> list[str]:
        """`ids`, and of `more` all that leave no doubt which tool serves a request; `size` of them in all."""
        kept = list(ids)
        taken = {group for tool_id in kept for group in self._groups[tool_id]}
        for tool_id in more:
            if size is not None and len(kept) >= size:
                break
            if tool_id in kept or self._groups[tool_id] & taken:
                continue
            if any(self._conflict(tool_id, other) for other in kept):
                continue
            kept.append(tool_id)
            taken |= self._groups[tool_id]
        return kept

    def _conflict(self, one: str, two: str) -> bool:
        # Tools without requests may be alike: no answer depends on them. Those of one application are apart already.
        if not (self._requests[one] or self._requests[two]) or self._same_application(one, two):
            return False
        return self._overlap.conflict(one, two)

    def _same_application(self, one: str, two: str) -> bool:
        return application_of(self._tools[one]) == application_of(self._tools[two])

    # What is asked

    def _ask(self, source: str, plan: Iterable[tuple[list[str], int]], rng: random.Random) -> list[BenchSample]:
        """Requests to the registries of `plan`, each with so many that it serves, and irrelevant ones in proportion.

        No request is asked twice as one that is served, nor as one that isn't.
        """
        total_lost = round(self._draw.requests * self._draw.irrelevant)
        total = self._draw.requests - total_lost
        asked: set[str] = set()
        turned_down: set[str] = set()
        samples: list[BenchSample] = []
        fruitless, patience = 0, 3 if self._draw.scheme == "mixed" else len(self._requests)
        for index, (ids, due) in enumerate(plan):
            rows = self._served(ids, source, min(due, total - len(asked)), asked, rng)
            asked |= {row.query for row in rows}
            lost_by_now = (
                round(total_lost * len(asked) / total) if total else len(turned_down) + self._draw.per_registry
            )
            count = min(lost_by_now, total_lost) - len(turned_down)
            lost = self._irrelevant(ids, count, turned_down, rng)
            turned_down |= {row.query for row in lost}
            if rows or lost:
                samples += self._registry_samples(f"{source}/{index}", source, ids, rows, lost, rng)
            # Endless plans come to tools whose requests were all asked: one round without any is the end.
            fruitless = 0 if rows or lost else fruitless + 1
            if (len(asked), len(turned_down)) == (total, total_lost) or fruitless > patience:
                break
        for kind, wanted, found, hint in (
            ("requests", total, asked, ""),
            ("irrelevant requests", total_lost, turned_down, ", or name tools and calls of further sources"),
        ):
            if len(found) < wanted:
                raise DataError(f"Source {source!r} gives {len(found)} {kind}, not {wanted}: ask for fewer{hint}.")
        return samples

    def _served(
        self, ids: Sequence[str], source: str, count: int, asked: set[str], rng: random.Random
    ) -> list[CallRecord]:
        """Rows that the registry serves, dealt out over its tools in rounds."""
        members = set(ids)
        pools: dict[str, list[CallRecord]] = defaultdict(list)
        for row in self._rows:
            fits = all(call.tool in members for call in row.calls) and source in ("mixed", row.source)
            if fits and row.query not in asked:
                pools[row.calls[0].tool].append(row)
        return _in_rounds(pools, count, rng)

    def _irrelevant(self, ids: Sequence[str], count: int, asked: set[str], rng: random.Random) -> list[CallRecord]:
        """Rows that no tool of the registry serves: where it is a part of an application, of that one's other tools.

        Near-duplicates, and tools of other applications that are much alike in words, might serve them.
        """
        groups = {group for tool_id in ids for group in self._groups[tool_id]}
        siblings: dict[str, list[CallRecord]] = {}
        others: dict[str, list[CallRecord]] = {}
        for tool_id, rows in self._single.items():
            if tool_id in ids or self._groups[tool_id] & groups:
                continue
            sibling = any(self._same_application(tool_id, other) for other in ids)
            if self._draw.scheme == "whole" and sibling:
                continue
            pool = siblings if self._draw.scheme == "part" and sibling else others
            pool[tool_id] = [row for row in rows if row.query not in asked]
        found = _in_rounds(siblings, count, rng)
        unlike: dict[str, list[CallRecord]] = {}
        for tool_id in rng.sample(sorted(others), len(others)):
            if len(found) + len(unlike) >= count:
                break
            strangers = [other for other in ids if not self._same_application(other, tool_id)]
            if others[tool_id] and not any(self._overlap.serves(other, tool_id) for other in strangers):
                unlike[tool_id] = others[tool_id]
        return found + _in_rounds(unlike, count - len(found), rng)

    def _registry_samples(
        self,
        name: str,
        source: str,
        ids: Sequence[str],
        rows: Sequence[CallRecord],
        lost: Sequence[CallRecord],
        rng: random.Random,
    ) -> list[BenchSample]:
        draw = self._draw
        given: dict[str, list[Iterable[str]]] = defaultdict(list)
        for row in rows:
            for call in row.calls:
                given[call.tool].append(call.arguments)
        options = SamplerOptions.evaluation(tools=len(ids), names=draw.names, input_format=draw.input_format)
        records = [self._tools[tool_id] for tool_id in ids]
        views = draw_views(records, given, draw.input_format, options, self._name_key, rng)
        registry = ToolRegistry([views[tool_id].tool for tool_id in ids], input_format=draw.input_format)
        samples = [_sample(f"{name}/{number}", row, registry, views, rng) for number, row in enumerate(rows)]
        for number, row in enumerate(lost, len(rows)):
            gold = THOUGHT_QUESTION + answer_text(wording.irrelevant_answer(rng))
            # Counted with the source whose registry they are to be turned down in.
            counted = row.source if draw.scheme == "mixed" else source
            samples.append(BenchSample(f"{name}/{number}", counted, "irrelevant", registry, (Turn(row.query),), gold))
        return samples


def _sample(
    sample_id: str, row: CallRecord, registry: ToolRegistry, views: Mapping[str, View], rng: random.Random
) -> BenchSample:
    calls = tuple(views[call.tool].gold(call) for call in row.calls)
    due = []
    for call, gold in zip(row.calls, calls, strict=True):
        view = views[call.tool]
        try:
            action_input = format_action_input(view.tool, gold.arguments, registry.input_format)
        except ArgumentError as error:
            raise DataError(
                f"The call {call} can't be written as {registry.input_format} ({error}); use --input-format json."
            ) from error
        report = wording.tool_result(view.record.name, view.record.description, call.arguments, rng)
        due.append(TakenStep(gold.name, action_input, report))
    steps = [f"{THOUGHT_QUESTION}{tool_step_text(step.action, step.action_input)}" for step in due]
    reports = [f" {step.observation}\n" for step in due[:-1]]
    gold_text = "".join(part for pair in zip(steps, [*reports, ""], strict=True) for part in pair)
    kind = "call" if len(calls) == 1 else f"{len(calls)} calls"
    return BenchSample(
        sample_id, row.source, kind, registry, (Turn(row.query),), gold_text, calls=calls, due=tuple(due)
    )


def _unambiguous(rows: Iterable[CallRecord]) -> list[CallRecord]:
    """Rows that call something, without those whose words call other tools in another row."""
    rows = [row for row in rows if row.calls]
    wanted: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for row in rows:
        wanted[row.query.casefold()].add(tuple(call.tool for call in row.calls))
    seen: set[str] = set()
    kept = []
    for row in rows:
        query = row.query.casefold()
        if len(wanted[query]) == 1 and query not in seen:
            seen.add(query)
            kept.append(row)
    return kept


def _in_rounds(pools: Mapping[str, Sequence[CallRecord]], count: int, rng: random.Random) -> list[CallRecord]:
    """`count` rows or all there are, one of each tool, then another of each, and so on."""
    shuffled = {tool_id: rng.sample(rows, len(rows)) for tool_id, rows in sorted(pools.items()) if rows}
    rows: list[CallRecord] = []
    while shuffled and len(rows) < count:
        for tool_id in rng.sample(sorted(shuffled), len(shuffled)):
            if len(rows) < count:
                rows.append(shuffled[tool_id].pop())
            if not shuffled[tool_id]:
                del shuffled[tool_id]
    return rows
