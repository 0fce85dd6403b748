"""Episodes from GPT4Tools' files or GPT4Tools-mini: what a training run on that family of tools sees.

Rows are drawn by the tool that is due, the registry around them is put together anew for every episode (the tools that
they need, and others of the data), so that a registry serves many requests and has to be read. A share of the
registries has invented names. Like `RegistrySampler`, `episode(index)` is a pure function of data, seed and index.
Knows nothing of tokens, models or losses.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from loragen_agents.conversation.prompts import TakenStep, Turn
from loragen_agents.conversation.react import THOUGHT_QUESTION, Answer, bind_arguments, format_action_input, parse_step
from loragen_agents.data import augmentation as augment
from loragen_agents.data.episodes import Episode, GoldCall, Sample, SampleKind
from loragen_agents.data.gpt4tools_files import GPT4ToolsSample, read_gpt4tools
from loragen_agents.data.gpt4tools_mini_rows import mini_rows
from loragen_agents.data.options import GPT4ToolsOptions, checked_options
from loragen_agents.data.records import Split
from loragen_agents.errors import ArgumentError, DataError
from loragen_agents.registry import Tool, ToolRegistry

SOURCE = "gpt4tools"
MINI = "gpt4tools-mini"
# One row in so many is kept for the dev split.
_DEV_EVERY = 12


class EpisodeSource(Protocol):
    """Anything that draws episodes by number."""

    def episode(self, index: int) -> Episode: ...


class GPT4ToolsSampler:
    """Episodes drawn from GPT4Tools rows.

    Args:
        rows: as `read_gpt4tools` gives them. Outputs of several steps become a sample for each.
        seed: together with an episode's index it decides everything about the episode.
        split: "dev" draws from every twelfth row, "train" from the others.
        options: how they are drawn.

    Raises:
        DataError: no row of this split can be used.
    """

    def __init__(
        self,
        rows: Sequence[GPT4ToolsSample],
        *,
        seed: int = 0,
        split: Split = "train",
        options: GPT4ToolsOptions | None = None,
    ) -> None:
        self.seed, self.split, self.options = seed, split, options or GPT4ToolsOptions()
        self._tools: dict[str, Tool] = {}
        self._samples: dict[str, list[Sample]] = defaultdict(list)  # by the tool that is due, "" where none is
        for number, row in enumerate(rows):
            for tool in row.registry:
                self._tools.setdefault(tool.name, tool)
            if (number % _DEV_EVERY == 0) == (split == "dev"):
                for sample in _samples(row):
                    self._samples[sample.tool or ""].append(sample)
        if not self._samples:
            raise DataError(f"The GPT4Tools data has no row for the {split} split; it has {len(rows)} rows in all.")
        self._names = sorted(self._tools)

    def episode(self, index: int) -> Episode:
        """Draw episode `index`."""
        rng = random.Random(f"{self.seed}/{self.split}/{index}")
        samples = [rng.choice(self._samples[self._draw_due(rng)]) for _ in range(self.options.requests)]
        needed = list(dict.fromkeys(name for sample in samples for name in _needed(sample)))
        size = max(len(needed), rng.randint(*self.options.tools))
        others = [name for name in self._names if name not in needed]
        names = needed + rng.sample(others, min(len(others), size - len(needed)))
        rng.shuffle(names)
        shown = dict(zip(names, names, strict=True))
        if rng.random() < self.options.invented:
            style, taken = augment.draw_style(rng), set[object]()
            for name in names:
                shown[name] = augment.distinct_name(
                    lambda: augment.invented_name(rng, style), taken, str.casefold, tries=100
                )
        tools = [self._tools[name].model_copy(update={"name": shown[name]}) for name in names]
        registry = ToolRegistry(tools, input_format="csv")
        return Episode(registry, tuple(names), tuple(_renamed(sample, shown) for sample in samples))

    def _draw_due(self, rng: random.Random) -> str:
        tools = [name for name in sorted(self._samples) if name]
        if "" in self._samples and (not tools or rng.random() < self.options.answered):
            return ""
        return rng.choice(tools)


def _samples(row: GPT4ToolsSample) -> list[Sample]:
    """One sample for every step that the row's output takes, and one for the answer where it ends in one.

    Steps whose input the tool's schema doesn't take are no lesson; the row ends before the first of them.
    """
    *earlier, last = row.turns
    found: list[Sample] = []
    for step in row.due:
        if step.action not in row.registry:
            return found
        tool = row.registry[step.action]
        try:
            arguments = bind_arguments(tool, step.action_input, "csv")
            written = format_action_input(tool, arguments, "csv")
        except ArgumentError:
            return found
        kind: SampleKind = "next_call" if last.steps else "call"
        found.append(Sample((*earlier, last), GoldCall(tool.name, arguments), kind, SOURCE, tool.name))
        last = replace(last, steps=(*last.steps, TakenStep(tool.name, written, step.observation)))
    tail = row.output.rpartition(THOUGHT_QUESTION)[2]
    answer = parse_step(tail.strip("\n").rstrip(), row.registry)
    if isinstance(answer, Answer) and all(step.action in row.registry for step in last.steps):
        found.append(Sample((*earlier, last), answer.text, "final_answer" if last.steps else "chat", SOURCE))
    return found


def _needed(sample: Sample) -> list[str]:
    due = [sample.gold.name] if isinstance(sample.gold, GoldCall) else []
    return due + [step.action for step in sample.turns[-1].steps]


def _renamed(sample: Sample, shown: dict[str, str]) -> Sample:
    *earlier, last = sample.turns
    steps = tuple(replace(step, action=shown[step.action]) for step in last.steps)
    gold = sample.gold if isinstance(sample.gold, str) else replace(sample.gold, name=shown[sample.gold.name])
    return replace(sample, turns=(*earlier, Turn(last.request, steps)), gold=gold)


def gpt4tools_samplers(
    data: Sequence[str], settings: dict[str, Any], seed: int
) -> tuple[EpisodeSource, dict[str, EpisodeSource]] | None:
    """The training sampler and the dev samplers (real and invented names) of a recipe whose data is GPT4Tools'.

    Args:
        data: "gpt4tools-mini" (its training part) and GPT4Tools files; other data gives None.
        settings: the recipe's sampler settings: those of `GPT4ToolsOptions`.

    Raises:
        DataError: GPT4Tools data beside data folders, a damaged file, or settings that can't be used.
    """
    own = [name for name in data if name == MINI or Path(name).suffix == ".json"]
    if not own:
        return None
    if len(own) < len(data):
        raise DataError(f"GPT4Tools data ({', '.join(own)}) can't be mixed with data folders; name one kind.")
    options = checked_options(GPT4ToolsOptions, settings)
    rows: list[GPT4ToolsSample] = []
    for name in own:
        rows += mini_rows("train") if name == MINI else read_gpt4tools(name)
    dev: dict[str, EpisodeSource] = {}
    for names, share in (("real", 0.0), ("invented", 1.0)):
        shown = replace(options, requests=4, invented=share)
        dev[names] = GPT4ToolsSampler(rows, seed=1, split="dev", options=shown)
    return GPT4ToolsSampler(rows, seed=seed, options=options), dev
