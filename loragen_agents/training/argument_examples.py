"""What the argument head learns from: requests with the tool that they call, and what each of their tokens stands for.

Knows records, prompts and tokens; no model and no loss.
"""

import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loragen_agents.conversation.prompts import PromptRenderer, Turn
from loragen_agents.data.records import Call, CallRecord, DataSet, Split, repair
from loragen_agents.data.wording import final_answer, joined_request
from loragen_agents.registry import Tool
from loragen_agents.training.argument_recipe import ArgumentRecipe
from loragen_agents.training.head_examples import taken_steps

# What a token stands for: none of the arguments, or not known.
NONE, UNKNOWN = 0, -100


@dataclass(frozen=True)
class ArgumentExample:
    """A request, and the call that is due.

    Attributes:
        ids: tokens of the prompt.
        stands: of each token, `NONE`, `UNKNOWN`, or 1 + the place of the argument whose value it belongs to.
        tool: index of the tool.
        given: whether the call gives each argument.
        request: the first token of the request, and the one behind its last.
        source, split: where it is from.
    """

    ids: list[int]
    stands: list[int]
    request: tuple[int, int]
    tool: int
    given: tuple[bool, ...]
    source: str
    split: Split


@dataclass(frozen=True)
class ArgumentExamples:
    """Tools, and requests that call them. sources: of the tools."""

    tools: list[Tool]
    sources: list[str]
    requests: list[ArgumentExample]


def build_argument_examples(data: DataSet, renderer: PromptRenderer, recipe: ArgumentRecipe) -> ArgumentExamples:
    """Choose requests of each tool, join some in pairs, and put an earlier turn before others.

    Of a request with several calls one is due, drawn at random, behind the steps of those before it.
    """
    rng, data = random.Random(f"argument head/{recipe.seed}"), repair(data)
    due: dict[tuple[str, Split], dict[str, list[tuple[CallRecord, int]]]] = defaultdict(lambda: defaultdict(list))
    for record in data.calls:
        if record.calls and len(record.query) <= recipe.max_characters:
            number = rng.randrange(len(record.calls))
            if data.tools[record.calls[number].tool].properties:
                due[record.source, record.split][record.calls[number].tool].append((record, number))
    chosen: dict[tuple[str, Split], list[tuple[CallRecord, int]]] = {}
    for key, own in sorted(due.items()):
        rows = [row for _, rows in sorted(own.items()) for row in rng.sample(rows, min(recipe.requests, len(rows)))]
        chosen[key] = rng.sample(rows, min(recipe.of_source, len(rows)))
    called = {call.tool for rows in chosen.values() for row, _ in rows for call in row.calls}
    tools = {name: data.tools[name].as_tool() for name in sorted(called)}
    place = {name: index for index, name in enumerate(tools)}
    made: list[ArgumentExample] = []

    def add(turns: Sequence[Turn], call: Call, row: CallRecord) -> None:
        tool = tools[call.tool]
        ids, stands, request = token_labels(renderer, turns, tool, call.arguments)
        given = tuple(name in call.arguments for name in tool.argument_names)
        made.append(ArgumentExample(ids, stands, request, place[call.tool], given, row.source, row.split))

    for rows in chosen.values():
        for row, number in rows:
            if (steps := taken_steps(tools, row.calls[:number], rng)) is not None:
                add([Turn(row.query, steps)], row.calls[number], row)
    single = [
        [row for row, _ in rows if len(row.calls) == 1] for (_, split), rows in chosen.items() if split == "train"
    ]
    single = [rows for rows in single if len(rows) > 1]
    for _ in range(recipe.joined if single else 0):
        first, second = rng.sample(rng.choice(single), 2)
        request = joined_request(first.query, second.query, rng)
        steps = taken_steps(tools, first.calls, rng)
        if first.calls[0].tool != second.calls[0].tool and steps is not None:
            taken, row = rng.choice([((), first), (steps, second)])
            add([Turn(request, taken)], row.calls[0], row)
    for _ in range(recipe.earlier if single else 0):
        first, second = rng.sample(rng.choice(single), 2)
        if (steps := taken_steps(tools, first.calls, rng)) is not None:
            answer = final_answer([step.observation for step in steps], False, rng)
            add([Turn(first.query, steps, answer), Turn(second.query)], second.calls[0], second)
    return ArgumentExamples(list(tools.values()), [data.tools[name].source for name in tools], made)


# Names that say nothing, as some APIs have them.
_PLAIN_NAMES = ("value", "x", "arg", "param", "field", "a", "p", "item", "input", "data", "option", "val")


def reworded(tool: Tool, rng: random.Random) -> list[tuple[Tool, list[int]]]:
    """A tool in other words, each with the places that its arguments have there: registries differ in what they say.

    Twice its arguments stand in another order: without descriptions, and with names that say nothing for those that
    have a description.
    """
    properties: dict[str, Any] = tool.parameters["properties"]
    made = []
    for named in (True, False):
        order = rng.sample(list(properties), len(properties))
        changed: dict[str, Any] = {}
        for name in order:
            schema = properties[name]
            described = isinstance(schema, Mapping) and bool(schema.get("description"))
            if described and named:
                schema = {key: value for key, value in schema.items() if key != "description"}
            elif described:
                name = f"{rng.choice(_PLAIN_NAMES)}{len(changed)}"
            while name in changed:
                name += "_"
            changed[name] = schema
        parameters = {**tool.parameters, "properties": changed, "required": []}
        places = [order.index(name) for name in properties]
        made.append((tool.model_copy(update={"parameters": parameters}), places))
    return made


def token_labels(
    renderer: PromptRenderer, turns: Sequence[Turn], tool: Tool, arguments: Mapping[str, Any]
) -> tuple[list[int], list[int], tuple[int, int]]:
    """Tokens of an open conversation's prompt, what each stands for, and the request's, as in `ArgumentExample`.

    A value is looked for in the last request as it is written, case aside; its first place counts, and others are
    unknown. Where a value is not found, as one that was converted, nobody knows of the other tokens whether they stand
    for it.
    """
    ids, text, starts = renderer.user_turn_with_starts(turns)
    begin, end = renderer.request_place(turns)
    folded = text.casefold()
    ends = [*starts[1:], len(text)]
    inside = [n for n in range(len(ids)) if starts[n] < end and ends[n] > begin]
    place = (inside[0], inside[-1] + 1) if inside else (0, 0)
    if begin == end or len(folded) != len(text):
        return ids, [UNKNOWN] * len(ids), place
    found: list[tuple[int, int, int]] = []  # begin, end, label
    whole = True
    for number, name in enumerate(tool.argument_names, 1):
        values = _texts(arguments[name]) if name in arguments else ()
        for value in values:
            places = _places(folded, value, begin, end)
            whole = whole and bool(places)
            found += [(*places[0], number)] if places else []
            found += [(*other, UNKNOWN) for other in places[1:]]
        whole = whole and (bool(values) or name not in arguments)
    rest = NONE if whole else UNKNOWN
    stands = [rest] * len(ids)
    for first, last, label in sorted(found, key=lambda span: span[2] != UNKNOWN):
        for index in range(len(ids)):
            if starts[index] < last and ends[index] > first:
                stands[index] = label
    # The prompt's own tokens come in every request.
    return ids, [label if begin <= starts[n] < end else UNKNOWN for n, label in enumerate(stands)], place


def _texts(value: Any) -> Sequence[str]:
    """What may stand in a request of a value; nothing of a boolean or an object."""
    values = value if isinstance(value, list) else [value]
    return [str(one) for one in values if isinstance(one, str | int | float) and not isinstance(one, bool)]


def _places(folded: str, value: str, begin: int, end: int) -> list[tuple[int, int]]:
    """Where a value stands as words of their own."""
    value = value.casefold().strip()
    pattern = rf"(?<!\w){re.escape(value)}(?!\w)" if value else r"(?!)"
    return [(begin + m.start(), begin + m.end()) for m in re.finditer(pattern, folded[begin:end])]
