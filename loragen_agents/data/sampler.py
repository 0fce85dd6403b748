"""Draws registries of tools and requests to them: the training data as the trainer sees it.

`RegistrySampler.episode(index)` is a pure function of the data, the options, the seed and the index. So a run resumes
exactly where it was killed, and any number of processes draw the same episodes as one. Requests are drawn by
source and by tool, not by row. The sampler knows nothing of tokens, models or losses.
"""

import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace

from loragen_agents.conversation.prompts import TakenStep, Turn
from loragen_agents.conversation.react import format_action_input
from loragen_agents.data import wording
from loragen_agents.data.episodes import Episode, Sample, SampleKind
from loragen_agents.data.options import SamplerOptions
from loragen_agents.data.overlap import Overlap
from loragen_agents.data.records import Call, CallRecord, DataSet, Split, repair
from loragen_agents.data.request_noise import noisy
from loragen_agents.data.views import View, draw_views, weighted
from loragen_agents.errors import ArgumentError, DataError
from loragen_agents.registry import InputFormat, ToolRegistry

MAX_QUERY = 600  # characters of a training request
# Characters of a metatool request that may stand as an argument: longer ones would teach copying only.
MAX_QUERY_ARGUMENT = 120


def _is_debris(query: str) -> bool:
    """Whether a request is a fragment of a damaged row: it opens with a brace, or closes what it never opened."""
    return (
        query.lstrip()[:1] in ("{", "[") or query.count("]") > query.count("[") or query.count("}") > query.count("{")
    )


def _without_vague(rows: Sequence[CallRecord]) -> list[CallRecord]:
    """Leave out requests that call other tools in other rows ("Is there anything else?"), debris, and long ones."""
    wanted: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for record in rows:
        wanted[record.query.casefold()].add(tuple(call.tool for call in record.calls))
    return [
        record
        for record in rows
        if len(wanted[record.query.casefold()]) == 1 and len(record.query) <= MAX_QUERY and not _is_debris(record.query)
    ]


class RegistrySampler:
    """Episodes drawn from a data set.

    Args:
        data: tools and requests of all sources and both splits, as `load_data` reads them.
        seed: together with an episode's index it decides everything about the episode.
        split: "train" never shows a tool that is of split dev or that a dev request calls; "dev" asks dev requests,
            with other tools drawn from both splits.
        options: how to draw.
        name_key: where given, the names of a registry differ in this key too (for example in their first token).

    Raises:
        DataError: the data has no request of this split.
    """

    def __init__(
        self,
        data: DataSet,
        *,
        seed: int = 0,
        split: Split = "train",
        options: SamplerOptions | None = None,
        name_key: Callable[[str], Hashable] | None = None,
    ) -> None:
        self.seed, self.split, self.options = seed, split, options or SamplerOptions()
        self._name_key = name_key or str.casefold
        held_out = data.held_out_tools() if split == "train" else frozenset()
        data = repair(data)
        self._tools = {tool_id: tool for tool_id, tool in data.tools.items() if tool_id not in held_out}
        rows = [
            record
            for record in data.calls
            if record.split == split and record.calls and all(call.tool in self._tools for call in record.calls)
        ]
        if split == "train":
            rows = _without_vague(rows)
        self._rows: dict[str, list[CallRecord]] = defaultdict(list)
        by_source: dict[str, set[str]] = defaultdict(set)
        for record in rows:
            for tool_id in {call.tool for call in record.calls}:
                self._rows[tool_id].append(record)
                by_source[record.source].add(tool_id)
        weights = {source: self.options.sources.get(source, self.options.other_sources) for source in by_source}
        self._sources = {source: weight for source, weight in weights.items() if weight > 0}
        if not self._sources:
            raise DataError(f"no requests of split {split!r} for any of the sources {', '.join(self.options.sources)}")
        self._callable = {source: sorted(by_source[source]) for source in self._sources}
        self._ids = sorted(self._tools)
        self._near: dict[tuple[str, str], list[str]] = defaultdict(list)
        for tool_id in self._ids:
            tool = self._tools[tool_id]
            for key in {tool.domain, tool.domain.split("/")[0]}:
                self._near[tool.source, key].append(tool_id)
        # Requests tell what tools do; those of both splits where nothing is learnt from them.
        self._overlap = Overlap(self._tools, rows if split == "train" else data.calls, data.alike)

    def episode(self, index: int) -> Episode:
        """Draw episode `index`.

        It holds `options.requests` samples, fewer only where its tools have too few different requests.
        """
        for attempt in itertools.count():
            episode = self._draw_episode(random.Random(f"{self.seed}/{self.split}/{index}/{attempt}"))
            if episode.samples:
                return episode
        raise AssertionError("unreachable")

    def _draw_episode(self, rng: random.Random) -> Episode:
        size = self._draw_size(rng)
        golds, rows, missing = self._draw_golds(size, rng)
        ids = self._fill(golds, missing, size, rng)
        rng.shuffle(ids)
        form: InputFormat = "csv" if rng.random() < self.options.csv else "json"
        views = self._draw_views(ids, rows, form, rng)
        if form == "csv" and not (
            all(view.takes_csv for view in views.values()) and any(self._expressible(row, views, form) for row in rows)
        ):
            form = "json"
        rows = [row for row in rows if self._expressible(row, views, form)]
        registry = ToolRegistry([views[tool_id].tool for tool_id in ids], input_format=form)
        samples: list[Sample] = []
        asked: set[tuple[Turn, ...]] = set()
        for _ in range(20 * self.options.requests):
            if len(samples) == self.options.requests:
                break
            sample = self._draw_sample(rows, views, missing, form, rng)
            if sample is not None and sample.turns not in asked:
                asked.add(sample.turns)
                samples.append(sample)
        return Episode(registry, tuple(ids), tuple(samples))

    # What is in the registry

    def _draw_size(self, rng: random.Random) -> int:
        low, high, _ = rng.choices(self.options.tools, [weight for *_, weight in self.options.tools])[0]
        return rng.randint(low, high)

    def _draw_tool(self, source: str | None, rng: random.Random) -> str:
        return rng.choice(self._callable[source or weighted(self._sources, rng)])

    def _draw_golds(self, size: int, rng: random.Random) -> tuple[list[str], list[CallRecord], list[str]]:
        """Gold tools, the rows that they serve alone, and tools left out so that their requests are irrelevant."""
        source = None if rng.random() < self.options.mixed_sources else weighted(self._sources, rng)
        low, high = self.options.gold_tools
        wanted = min(size, rng.randint(low, high))
        golds: list[str] = []
        rows: list[CallRecord] = []
        for _ in range(10 * size):
            # Some sources have a request or two for a tool: then more tools are asked for.
            supply = sum(len(self._rows[tool_id]) for tool_id in golds)
            if len(golds) >= wanted and supply >= self.options.requests:
                break
            # A neighbour of a gold tool makes the choice between them a question of reading.
            if golds and rng.random() < 0.3:
                near = [tool_id for tool_id in self._neighbours(golds[0]) if tool_id in self._rows]
                tool_id = rng.choice(near) if near else self._draw_tool(source, rng)
            else:
                tool_id = self._draw_tool(source, rng)
            row = rng.choice(self._rows[tool_id])
            new = [call.tool for call in row.calls if call.tool not in golds]
            if not new or len(golds) + len(set(new)) > size:
                continue
            if any(self._overlap.conflict(one, two) for one in new for two in golds):
                continue
            golds += list(dict.fromkeys(new))
            rows.append(row)
        if not golds:
            return self._draw_golds(size, rng)
        known = set(golds)
        for tool_id in golds:
            pool = [row for row in self._rows[tool_id] if {call.tool for call in row.calls} <= known]
            rows += rng.sample(pool, min(len(pool), self.options.requests))
        rows = list({id(row): row for row in rows}.values())
        missing: list[str] = []
        if self.options.kinds.get("irrelevant"):
            for _ in range(20):
                near_gold = rng.random() < 0.6
                near = [t for t in self._neighbours(rng.choice(golds)) if t in self._rows] if near_gold else []
                tool_id = rng.choice(near) if near else self._draw_tool(None, rng)
                if tool_id not in known and not any(self._overlap.serves(gold, tool_id) for gold in golds):
                    missing.append(tool_id)
                if len(missing) == 2:
                    break
        return golds, rows, missing

    def _neighbours(self, tool_id: str) -> Sequence[str]:
        tool = self._tools[tool_id]
        exact = self._near[tool.source, tool.domain]
        return exact if len(exact) > 3 else self._near[tool.source, tool.domain.split("/")[0]]

    def _fill(self, golds: list[str], missing: list[str], size: int, rng: random.Random) -> list[str]:
        ids = list(golds)
        for _ in range(60 * size):
            if len(ids) >= size:
                break
            if rng.random() < self.options.near:
                gold = self._tools[rng.choice(golds)]
                tool_id = rng.choice(self._neighbours(gold.id))
                if tool_id in ids and gold.source != "metatool":
                    tool_id = rng.choice(self._callable.get(gold.source, self._ids))
            else:
                tool_id = rng.choice(self._ids)
            if tool_id in ids or tool_id in missing:
                continue
            if any(self._overlap.conflict(tool_id, gold) for gold in golds):
                continue
            if any(self._overlap.serves(tool_id, lost) for lost in missing):
                continue
            ids.append(tool_id)
        return ids

    def _draw_views(
        self, ids: list[str], rows: list[CallRecord], form: InputFormat, rng: random.Random
    ) -> dict[str, View]:
        given: dict[str, list[Iterable[str]]] = defaultdict(list)
        values: list[str] = []
        for row in rows:
            for call in row.calls:
                given[call.tool].append(call.arguments)
                values += [value for value in call.arguments.values() if isinstance(value, str)]
        records = [self._tools[tool_id] for tool_id in ids]
        return draw_views(records, given, form, self.options, self._name_key, rng, values)

    # What is asked

    def _expressible(self, row: CallRecord, views: Mapping[str, View], form: InputFormat) -> bool:
        for call in row.calls:
            view = views[call.tool]
            copies = self.split == "train" and view.record.source == "metatool" and view.argument_names
            if copies and len(row.query) > MAX_QUERY_ARGUMENT:
                return False
            try:
                format_action_input(view.tool, view.gold(call).arguments, form)
            except ArgumentError:
                return False
        return True

    def _draw_sample(
        self,
        rows: list[CallRecord],
        views: Mapping[str, View],
        missing: list[str],
        form: InputFormat,
        rng: random.Random,
    ) -> Sample | None:
        kind = weighted(self.options.kinds, rng)
        if kind == "chat":
            request, answer = wording.small_talk(rng)
            return Sample(self._with_history(Turn(request), rows, views, form, rng), answer, kind, "chat")
        if kind == "irrelevant":
            if not missing:
                return None
            row = rng.choice(self._rows[rng.choice(missing)])
            if len(row.calls) > 1:
                return None
            turns = self._with_history(Turn(self._typed(row, rng)), rows, views, form, rng)
            return Sample(turns, wording.irrelevant_answer(rng), kind, row.source)
        if not rows:
            return None
        asked = self._draw_row(rows, kind, rng)
        if asked is None:
            return None
        row = asked
        if kind == "call":
            taken: tuple[TakenStep, ...] = ()
        else:
            count = len(row.calls) if kind == "final_answer" else rng.randint(1, len(row.calls) - 1)
            failed = kind == "final_answer" and rng.random() < self.options.failed
            taken = self._take(row.calls[:count], views, form, failed, rng)
            if kind == "final_answer":
                answer = wording.final_answer([step.observation for step in taken], failed, rng)
                turns = self._with_history(Turn(row.query, taken), rows, views, form, rng)
                return Sample(turns, answer, kind, row.source)
        call = row.calls[len(taken)]
        gold = views[call.tool].gold(call)
        referring = self._referring(row, rows, views, form, rng) if kind == "call" else None
        turns = referring or self._with_history(Turn(self._typed(row, rng), taken), rows, views, form, rng)
        return Sample(turns, gold, kind, row.source, call.tool)

    def _typed(self, row: CallRecord, rng: random.Random) -> str:
        """A row's request, with some probability as people type it."""
        # Without a share nothing is drawn, so that episodes stay what they were.
        if not self.options.noise or rng.random() >= self.options.noise:
            return row.query
        return noisy(row.query, [value for call in row.calls for value in call.arguments.values()], rng)

    def _referring(
        self, row: CallRecord, rows: list[CallRecord], views: Mapping[str, View], form: InputFormat, rng: random.Random
    ) -> tuple[Turn, ...] | None:
        """Turns of which an earlier one holds a value of the call, said by the user or reported by a tool."""
        if not self.options.referred or len(row.calls) > 1 or rng.random() >= self.options.referred:
            return None
        values = [value for value in row.calls[0].arguments.values() if isinstance(value, str) and len(value) > 2]
        made = wording.referred(row.query, rng.choice(values), rng) if values else None
        if made is None:
            return None
        request, (said, answer), (observed, told) = made
        before = rng.choice(rows)
        if rng.random() < 0.5 or len(before.calls) > 1 or before.query == row.query:
            return (Turn(said, (), answer), Turn(request))
        (step,) = self._take(before.calls, views, form, False, rng)
        return (Turn(before.query, (replace(step, observation=observed),), told), Turn(request))

    def _draw_row(self, rows: list[CallRecord], kind: SampleKind, rng: random.Random) -> CallRecord | None:
        """A row for a sample of this kind, by tool first and then by row."""
        by_tool: dict[str, list[CallRecord]] = defaultdict(list)
        for row in rows:
            by_tool[row.calls[0].tool].append(row)
        several = [row for row in rows if len(row.calls) > 1]
        if kind == "next_call" or (kind == "final_answer" and rng.random() < 0.3):
            if several and rng.random() >= self.options.joined:
                return rng.choice(several)
            singles = [pool for pool in ([r for r in p if len(r.calls) == 1] for p in by_tool.values()) if pool]
            if len(singles) < 2:
                return rng.choice(several) if several else None
            first, second = (rng.choice(pool) for pool in rng.sample(singles, 2))
            query = wording.joined_request(first.query, second.query, rng)
            return replace(first, query=query, calls=first.calls + second.calls)
        return rng.choice(by_tool[rng.choice(list(by_tool))])

    def _take(
        self, calls: Sequence[Call], views: Mapping[str, View], form: InputFormat, failed: bool, rng: random.Random
    ) -> tuple[TakenStep, ...]:
        steps = []
        for position, call in enumerate(calls):
            view = views[call.tool]
            gold = view.gold(call)
            error = failed and position == len(calls) - 1
            result = wording.tool_result(view.record.name, view.record.description, call.arguments, rng, error=error)
            steps.append(TakenStep(gold.name, format_action_input(view.tool, gold.arguments, form), result))
        return tuple(steps)

    def _with_history(
        self, turn: Turn, rows: list[CallRecord], views: Mapping[str, View], form: InputFormat, rng: random.Random
    ) -> tuple[Turn, ...]:
        """The open turn, with some probability behind one earlier turn: small talk, a file, or a request dealt with."""
        if rng.random() >= self.options.history:
            return (turn,)
        draw = rng.random()
        if draw < 0.35 or not rows:
            request, answer = wording.small_talk(rng)
            return (Turn(request, (), answer), turn)
        if draw < 0.55:
            request, answer = wording.received_file(rng)
            return (Turn(request, (), answer), turn)
        row = rng.choice(rows)
        if row.query == turn.request or len(row.calls) > 1:
            return (turn,)
        taken = self._take(row.calls, views, form, False, rng)
        answer = wording.final_answer([step.observation for step in taken], False, rng)
        return (Turn(row.query, taken, answer), turn)
