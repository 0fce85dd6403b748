"""What the tool head learns from: texts to read, requests with the tool they call, and registries drawn from all tools.

Everything is read once by the frozen edge LM; a step of training draws registries from what was read. Knows records and
words; no model and no loss.
"""

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from loragen_agents.conversation.prompts import TakenStep, Turn
from loragen_agents.data.augmentation import STYLES, invented_name
from loragen_agents.data.records import Call, CallRecord, DataSet, Split, ToolRecord
from loragen_agents.data.wording import joined_request, small_talk, tool_result
from loragen_agents.errors import ArgumentError
from loragen_agents.generator.tool_texts import TextKind, as_request, in_words, request_texts
from loragen_agents.registry import Tool
from loragen_agents.registry.arguments import format_action_input
from loragen_agents.training.head_recipe import HeadRecipe

CHAT = "chat"
_JOINED = 0.75


@dataclass(frozen=True)
class Asked:
    """A request, or what is due behind the steps of one.

    Attributes:
        text: index of what is read.
        tool: index of the tool that is to be called, None where none is.
        never: tools that no registry holds beside it, because they could serve the request, too.
    """

    text: int
    tool: int | None
    never: frozenset[int]
    source: str
    split: Split


@dataclass
class HeadExamples:
    """Texts, tools and requests; tools and texts are named by their index.

    Attributes:
        texts: what is read, each once.
        tools: records of all tools.
        tool_texts: for each tool and kind of text, the index of the text, or -1.
        invented: texts that are invented names.
        asked: the requests.
    """

    texts: list[Turn] = field(default_factory=list)
    tools: list[ToolRecord] = field(default_factory=list)
    tool_texts: list[list[int]] = field(default_factory=list)
    invented: list[int] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    _known: dict[Turn, int] = field(default_factory=dict, repr=False)

    def add(self, turn: Turn) -> int:
        """The index of a text, which is new or was there before."""
        index = self._known.setdefault(turn, len(self.texts))
        if index == len(self.texts):
            self.texts.append(turn)
        return index


def build_examples(data: DataSet, recipe: HeadRecipe) -> HeadExamples:
    """Choose requests of each tool, and make what no data set has: small talk, joined requests, later steps."""
    rng = random.Random(f"head/{recipe.seed}")
    made = HeadExamples()
    by_tool: dict[str, dict[str, CallRecord]] = defaultdict(dict)
    for record in data.calls:
        if record.calls and len(record.query) <= recipe.max_characters:
            by_tool[record.calls[0].tool].setdefault(record.query.casefold(), record)
    chosen = {
        tool: rng.sample(sorted(rows.values(), key=lambda row: row.query), min(recipe.requests, len(rows)))
        for tool, rows in sorted(by_tool.items())
    }
    uncalled = sorted(data.tools.keys() - chosen.keys())
    kept = [*chosen, *rng.sample(uncalled, min(recipe.uncalled_tools, len(uncalled)))]
    kept += sorted({call.tool for rows in chosen.values() for row in rows for call in row.calls} - set(kept))
    place = {tool: index for index, tool in enumerate(kept)}
    alike: dict[int, set[int]] = defaultdict(set)
    for group in data.alike:
        members = {place[tool] for tool in group if tool in place}
        for member in members:
            alike[member] |= members
    for key in kept:
        tool = data.tools[key]
        texts = request_texts(tool.as_tool())
        made.tools.append(tool)
        made.tool_texts.append([made.add(Turn(texts[kind])) if kind in texts else -1 for kind in TextKind])
    names = (invented_name(rng, rng.choice(STYLES)) for _ in range(recipe.invented_names))
    made.invented = [made.add(Turn(as_request(in_words(name)))) for name in names]

    def ask(turn: Turn, due: Sequence[str], source: str, split: Split) -> None:
        golds = [place[tool] for tool in due]
        never = frozenset(golds).union(*(alike[gold] for gold in golds))
        made.asked.append(Asked(made.add(turn), golds[0] if golds else None, never, source, split))

    rows = [row for tool in chosen.values() for row in tool]
    for row in rows:
        ask(Turn(row.query), [call.tool for call in row.calls], row.source, row.split)
    for turn, due, row in _later(rows, data.tools, recipe.later_steps, rng):
        ask(turn, due, row.source, row.split)
    for number in range(recipe.small_talk):
        ask(Turn(small_talk(rng)[0]), (), CHAT, "dev" if number % 5 == 0 else "train")
    return made


def _later(
    rows: Sequence[CallRecord], tools: Mapping[str, ToolRecord], count: int, rng: random.Random
) -> list[tuple[Turn, list[str], CallRecord]]:
    """Requests with several calls, most of them two requests in one, and what is due after some of these calls."""
    groups: dict[tuple[str, Split], list[CallRecord]] = defaultdict(list)
    for row in rows:
        groups[row.source, row.split].append(row)
    found: list[tuple[Turn, list[str], CallRecord]] = []
    for _ in range(count):
        first = rng.choice(rows)
        calls = list(first.calls)
        request = first.query
        if len(calls) == 1 and rng.random() < _JOINED:
            second = rng.choice(groups[first.source, first.split])
            if second.query != first.query:
                request, calls = joined_request(first.query, second.query, rng), [*calls, *second.calls]
        several = range(len(calls)) if len(calls) > 1 else ()
        taken = rng.choice([*several, *several, len(calls)])
        own = {call.tool: tools[call.tool].as_tool() for call in calls[:taken]}
        steps = taken_steps(own, calls[:taken], rng)
        if steps is not None:
            found.append((Turn(request, steps), [call.tool for call in calls[taken:]], first))
    return found


def taken_steps(tools: Mapping[str, Tool], calls: Sequence[Call], rng: random.Random) -> tuple[TakenStep, ...] | None:
    """The steps that take these calls, with a made-up result each; None where one can't be written."""
    steps = []
    for call in calls:
        tool, arguments = tools[call.tool], dict(call.arguments)
        try:
            written = format_action_input(tool, arguments, "json")
        except ArgumentError:
            return None
        steps.append(TakenStep(tool.name, written, tool_result(tool.name, tool.description, arguments, rng)))
    return tuple(steps)
