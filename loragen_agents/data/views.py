"""How one registry shows its tools: names, descriptions, argument names and their order, augmented or as they are.

`draw_views` turns records into `registry.Tool`s and keeps what it takes to rewrite a gold call accordingly. It knows
nothing of requests beyond which arguments they give.
"""

import random
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from loragen_agents.data import augmentation as augment
from loragen_agents.data.episodes import GoldCall
from loragen_agents.data.options import SamplerOptions
from loragen_agents.data.records import Call, ToolRecord
from loragen_agents.registry import InputFormat, Tool

_CSV_TYPES = frozenset({"null", "boolean", "integer", "number", "string"})
ChoiceT = TypeVar("ChoiceT")


@dataclass(frozen=True)
class View:
    """A tool as one registry shows it: the record behind it, and its arguments' names there by their names here."""

    record: ToolRecord
    tool: Tool
    argument_names: dict[str, str]

    @property
    def takes_csv(self) -> bool:
        """Whether the tool can stand in a registry with csv inputs: no argument is a list or an object."""
        return all(self.tool.types_of(name) & _CSV_TYPES for name in self.tool.argument_names)

    def gold(self, call: Call) -> GoldCall:
        """The call in the words of this registry; arguments that the registry's tool does not have are left out."""
        named = {new: call.arguments[old] for old, new in self.argument_names.items() if old in call.arguments}
        return GoldCall(self.tool.name, named)


def weighted(choices: Mapping[ChoiceT, float], rng: random.Random) -> ChoiceT:
    """Draw a key by its weight."""
    return rng.choices(list(choices), list(choices.values()))[0]


def draw_views(
    records: Sequence[ToolRecord],
    given: Mapping[str, Iterable[Iterable[str]]],
    form: InputFormat,
    options: SamplerOptions,
    name_key: Callable[[str], Hashable],
    rng: random.Random,
    values: Sequence[str] = (),
) -> dict[str, View]:
    """Draw how a registry shows its tools; keyed by tool id, in order.

    Args:
        given: for tools with requests, the argument names that each of their calls gives.
        name_key: names differ in this key.
        values: gold values of the registry's requests, which some names echo.
    """
    names, modes = draw_names(records, options, name_key, rng, values)
    views = {}
    for record, name, mode in zip(records, names, modes, strict=True):
        order = _draw_order(record, given.get(record.id, ()), form, options, rng)
        mapping = {key: key for key in order}
        if order and rng.random() < options.renamed_arguments:
            mapping = augment.renamed_arguments(order, rng)
        schemas: dict[str, dict[str, Any]] = {mapping[key]: record.properties[key] for key in order}
        if rng.random() < options.bare_arguments:
            schemas = augment.drop_argument_descriptions(schemas.items())
        tool = Tool(
            name=name,
            description=_draw_description(record, mode, list(schemas), form, options, rng),
            parameters={
                "type": "object",
                "properties": schemas,
                "required": [mapping[key] for key in order if key in record.required],
            },
        )
        views[record.id] = View(record, tool, mapping)
    return views


def draw_names(
    records: Sequence[ToolRecord],
    options: SamplerOptions,
    name_key: Callable[[str], Hashable],
    rng: random.Random,
    values: Sequence[str] = (),
) -> tuple[list[str], list[str]]:
    """Draw distinct names for the tools of a registry, and where each comes from (`options.NameMode`)."""
    heard = sorted({word for value in values for word in re.findall(r"[^\W_]{3,}", value)})
    mixed = rng.random() < options.mixed_names
    shared, style = weighted(options.names, rng), augment.draw_style(rng)
    taken: set[Hashable] = set()
    modes: list[str] = []
    names: list[str] = []
    for record in records:
        mode = weighted(options.names, rng) if mixed else shared

        def draw(record: ToolRecord = record, mode: str = mode) -> str:
            # Without a share nothing is drawn, so that the registries of an evaluation stay what they were.
            new = mode in ("invented", "restyled", "reworded")
            if new and heard and options.echoed_names and rng.random() < options.echoed_names:
                return augment.echoing_name(rng.choice(heard), rng, style)
            if new and options.numbered_names and rng.random() < options.numbered_names:
                return augment.numbered_name(record.name if mode != "invented" else "", rng, style)
            if mode == "invented":
                return augment.invented_name(rng, style)
            if mode == "restyled":
                return augment.join_words(augment.split_words(record.name) or [record.name], style)
            if mode == "reworded":
                return augment.reworded_name(record.name, record.description, rng, style)
            return record.name

        try:
            name = augment.distinct_name(draw, taken, name_key, tries=200 if mode == "invented" else 4)
        except RuntimeError:
            name = _told_apart(record, taken, name_key, rng)
        names.append(name)
        modes.append(mode)
    swapped = [position for position, mode in enumerate(modes) if mode == "swapped"]
    for position, name in zip(swapped, augment.shuffled_apart([names[p] for p in swapped], rng), strict=True):
        names[position] = name
    return names, modes


def _told_apart(
    record: ToolRecord, taken: set[Hashable], name_key: Callable[[str], Hashable], rng: random.Random
) -> str:
    """A name for a tool whose own is taken: behind words of its domain, else behind an invented word."""
    domain = "_".join(augment.split_words(record.domain)[-2:])
    try:
        return augment.distinct_name(lambda: f"{domain}_{record.name}".strip("_"), taken, name_key, tries=1)
    except RuntimeError:
        return augment.distinct_name(lambda: f"{augment.invented_word(rng)}_{record.name}", taken, name_key, tries=1000)


def _draw_order(
    record: ToolRecord, given: Iterable[Iterable[str]], form: InputFormat, options: SamplerOptions, rng: random.Random
) -> list[str]:
    # metatool's one argument is the request itself: as an argument it would teach little but copying.
    if record.source == "metatool" and rng.random() >= options.query_argument:
        return []
    order = list(record.properties)
    if rng.random() < options.shuffled_arguments:
        rng.shuffle(order)
    if form == "csv":
        # csv can leave arguments out only from the end: those that more of the calls give come first.
        counts: dict[str, int] = defaultdict(int)
        for names in given:
            for name in names:
                counts[name] += 1
        order.sort(key=lambda key: -counts[key])
    return order


def _draw_description(
    record: ToolRecord,
    mode: str,
    arguments: list[str],
    form: InputFormat,
    options: SamplerOptions,
    rng: random.Random,
) -> str:
    text = record.description.strip() or " ".join(augment.split_words(record.name))
    if mode in ("real", "restyled") and rng.random() < options.no_description:
        return " ".join(augment.split_words(record.name)) or record.name
    if rng.random() < options.short_description:
        text = augment.first_sentence(text) if rng.random() < 0.5 else augment.shortened(text, rng)
    # GPT4Tools' wording speaks of a comma separated string: it belongs to csv registries.
    if form == "csv" and rng.random() < options.useful_description:
        text = augment.useful_when(text, arguments)
    return text
