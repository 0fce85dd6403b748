"""What the argument head learns from: requests with the tool that they call, and what each of their tokens stands for.

Knows records, prompts and tokens; no model and no loss.
"""

import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loragen_agents.conversation.prompts import PromptRenderer, TakenStep, Turn
from loragen_agents.data.records import Call, CallRecord, DataSet, Split, ToolRecord, repair
from loragen_agents.data.wording import joined_request, tool_result
from loragen_agents.errors import ArgumentError
from loragen_agents.registry import Tool
from loragen_agents.registry.arguments import format_action_input
from loragen_agents.training.argument_recipe import ArgumentRecipe

# What a token stands for: none of the arguments; or nobody knows.
NONE, UNKNOWN = 0, -100


@dataclass(frozen=True)
class ArgumentExample:
    """A request, and the call that is due.

    Attributes:
        ids: tokens of the prompt.
        stands: of each token, `NONE`, `UNKNOWN`, or 1 + the place of the argument whose value it belongs to.
        tool: index of the tool.
        given: whether the call gives each argument.
        source, split: where it is from.
    """

    ids: list[int]
    stands: list[int]
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
    """Choose requests with one call for each tool, and join some of them in pairs."""
    rng, data = random.Random(f"argument head/{recipe.seed}"), repair(data)
    by_tool: dict[tuple[str, Split], dict[str, list[CallRecord]]] = defaultdict(lambda: defaultdict(list))
    for record in data.calls:
        one_call = len(record.calls) == 1 and len(record.query) <= recipe.max_characters
        if one_call and data.tools[record.calls[0].tool].properties:
            by_tool[record.source, record.split][record.calls[0].tool].append(record)
    chosen: dict[tuple[str, Split], list[CallRecord]] = {}
    for key, own in sorted(by_tool.items()):
        rows = [row for _, rows in sorted(own.items()) for row in rng.sample(rows, min(recipe.requests, len(rows)))]
        chosen[key] = rng.sample(rows, min(recipe.of_source, len(rows)))
    names = sorted({row.calls[0].tool for rows in chosen.values() for row in rows})
    place = {name: index for index, name in enumerate(names)}
    tools = {name: _tool(data.tools[name]) for name in names}
    made = []

    def add(turn: Turn, call: Call, row: CallRecord) -> None:
        tool = tools[call.tool]
        ids, stands = token_labels(renderer, turn, tool, call.arguments)
        given = tuple(name in call.arguments for name in tool.argument_names)
        made.append(ArgumentExample(ids, stands, place[call.tool], given, row.source, row.split))

    for rows in chosen.values():
        for row in rows:
            add(Turn(row.query), row.calls[0], row)
    train = [rows for (_, split), rows in chosen.items() if split == "train" and len(rows) > 1]
    for _ in range(recipe.joined if train else 0):
        first, second = rng.sample(rng.choice(train), 2)
        turn = Turn(joined_request(first.query, second.query, rng))
        if first.calls[0].tool == second.calls[0].tool:
            continue
        if rng.random() < 0.5:
            add(turn, first.calls[0], first)
        elif (step := _step(tools[first.calls[0].tool], first.calls[0].arguments, rng)) is not None:
            add(Turn(turn.request, (step,)), second.calls[0], second)
    return ArgumentExamples([tools[name] for name in names], [data.tools[name].source for name in names], made)


def _tool(record: ToolRecord) -> Tool:
    return Tool(name=record.name, description=record.description, parameters=record.parameters)


def _step(tool: Tool, arguments: Mapping[str, Any], rng: random.Random) -> TakenStep | None:
    try:
        written = format_action_input(tool, dict(arguments), "json")
    except ArgumentError:
        return None
    return TakenStep(tool.name, written, tool_result(tool.name, tool.description, dict(arguments), rng))


def token_labels(
    renderer: PromptRenderer, turn: Turn, tool: Tool, arguments: Mapping[str, Any]
) -> tuple[list[int], list[int]]:
    """Tokens of an open turn's prompt, and what each stands for, as in `ArgumentExample`.

    A value is looked for as it is written, case aside; its first place counts, and others are unknown. Where a value
    is not found, as one that was converted, nobody knows of the other tokens whether they stand for it.
    """
    ids, text, starts = renderer.user_turn_with_starts([turn])
    begin = max(text.find(turn.request), 0)
    end = begin + len(turn.request)
    folded = text.casefold()
    if len(folded) != len(text):
        return ids, [UNKNOWN] * len(ids)
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
    ends = [*starts[1:], len(text)]
    stands = [rest] * len(ids)
    for first, last, label in sorted(found, key=lambda span: span[2] != UNKNOWN):
        for index in range(len(ids)):
            if starts[index] < last and ends[index] > first:
                stands[index] = label
    # The prompt's own tokens come in every request.
    return ids, [label if begin <= starts[n] < end else UNKNOWN for n, label in enumerate(stands)]


def _texts(value: Any) -> Sequence[str]:
    """What may stand in a request of a value; nothing of a boolean or an object."""
    values = value if isinstance(value, list) else [value]
    return [str(one) for one in values if isinstance(one, str | int | float) and not isinstance(one, bool)]


def _places(folded: str, value: str, begin: int, end: int) -> list[tuple[int, int]]:
    """Where a value stands as words of their own."""
    value = value.casefold().strip()
    pattern = rf"(?<!\w){re.escape(value)}(?!\w)" if value else r"(?!)"
    return [(begin + m.start(), begin + m.end()) for m in re.finditer(pattern, folded[begin:end])]
