"""How a call is judged: its tool, its arguments one by one, and whether one was due at all.

Knows nothing of how samples are drawn or who wrote the call.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from loragen_agents.bench.tasks import BenchSample, Written
from loragen_agents.conversation.react import Answer, InvalidStep, Step, ToolStep
from loragen_agents.data.episodes import GoldCall
from loragen_agents.registry import ToolRegistry

METRICS: dict[str, str] = {
    "tool": "Tool",
    "arguments_exact": "Args exact",
    "arguments": "Args",
    "call": "Whole call",
    "called": "Called",
    "no_call": "No call",
}
CHOICE_METRICS: dict[str, str] = {
    "tool": "Tool",
    "best": "Likeliest",
    "called": "Called",
    "no_call": "No call",
}


def score_call(sample: BenchSample, written: Written, steps: Sequence[Step]) -> dict[str, float]:
    """The metrics of one sample, each in [0, 1].

    Where calls are due:
        called: a tool was called first.
        tool: the tools of all calls are right.
        arguments_exact, arguments: share of right arguments among all that the gold call or the predicted one gives, by
            `==` and by `normalised`; 0 for a wrong tool; the mean over the calls.
        call: all tools and all arguments (normalised) are right.
    Where none is due:
        no_call: an answer was written.

    Several calls may come in any order. An argument that the schema requires and the gold call leaves out is not
    judged: the request doesn't say what it is.
    """
    if not sample.calls:
        return {"no_call": float(isinstance(steps[0], Answer))}
    left = list(sample.calls)
    judged = []
    for step in steps:
        candidates = [(_judged(gold, step, sample.registry), place) for place, gold in enumerate(left)]
        if candidates:
            best, place = max(candidates, key=lambda pair: (*pair[0], -pair[1]))
            if best[0]:
                judged.append(best)
                del left[place]
    judged += [(0.0, 0.0, 0.0, 0.0)] * len(left)
    tool, exact, close, call = zip(*judged, strict=True)
    return {
        "called": float(_action(steps[0]) is not None),
        "tool": float(all(tool)),
        "arguments_exact": sum(exact) / len(exact),
        "arguments": sum(close) / len(close),
        "call": float(all(call)),
    }


def score_choice(sample: BenchSample, written: Written, steps: Sequence[Step]) -> dict[str, float]:
    """The metrics of a choice without a call.

    Where a call is due: `tool` (a right tool is called), `best` (a right tool is the likeliest, called or not) and
    `called` (some tool is called). Where none is due: `no_call`.
    """
    action = _action(steps[0])
    if not sample.calls:
        return {"no_call": float(action is None)}
    right = {call.name for call in sample.calls}
    likeliest = max(written.tools, key=written.tools.__getitem__) if written.tools else action
    return {"tool": float(action in right), "best": float(likeliest in right), "called": float(action is not None)}


def _action(step: Step) -> str | None:
    return None if isinstance(step, Answer) else step.action


def _judged(gold: GoldCall, step: Step, registry: ToolRegistry) -> tuple[float, float, float, float]:
    """Tool, share of exact and of normalised arguments, and whether the whole call is right."""
    if isinstance(step, Answer) or step.action != gold.name:
        return 0.0, 0.0, 0.0, 0.0
    arguments = step.arguments if isinstance(step, ToolStep) else _legible(step)
    if arguments is None:
        return 1.0, 0.0, 0.0, 0.0
    unjudged = registry[gold.name].required - gold.arguments.keys()
    given = {name: value for name, value in arguments.items() if name not in unjudged}
    exact = _share(gold.arguments, given, lambda a, b: type(a) is type(b) and a == b)
    close = _share(gold.arguments, given, lambda a, b: normalised(a) == normalised(b))
    return 1.0, exact, close, float(isinstance(step, ToolStep) and close == 1.0)


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
# With digits beside them, brackets, products and powers are arithmetic: (5+3)*12 is not 5+3*12.
_ARITHMETIC = re.compile(r"[^\w\s.:/@+*^()-]|[.:,](?=\s|$)")


def normalised(value: Any) -> Any:
    """An argument value as it is compared loosely.

    Text: case, articles, quotes, closing punctuation and the amount of white space don't count; brackets and operators
    do beside digits. Numbers and truth values are the same as text and as values, number words up to ten are numbers,
    2.0 is 2. Lists and objects by their items.
    """
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, (int, float)):
        return _number(float(value))
    if isinstance(value, Mapping):
        return tuple(sorted((str(key), normalised(item)) for key, item in value.items()))
    if isinstance(value, (list, tuple)):
        return tuple(normalised(item) for item in value)
    text = str(value).casefold()
    dropped = _ARITHMETIC if any(character.isdigit() for character in text) else _PUNCTUATION
    text = " ".join(dropped.sub(" ", text).split())
    text = " ".join(_ARTICLES.sub(" ", text).split()) or text
    if text in _NUMBER_WORDS:
        return _number(_NUMBER_WORDS[text])
    try:
        return _number(float(text))
    except ValueError:
        return text


def _number(value: float) -> Any:
    return value if math.isfinite(value) else str(value)
