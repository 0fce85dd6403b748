"""Words for the parts of a sample that no data set has: tool results, answers, refusals and small talk.

The phrases stand in `phrases/*.yaml`; this module draws from them. It knows nothing of registries or prompts.
"""

import random
import re
import string
from collections.abc import Mapping
from typing import Any

from loragen_agents.data.augmentation import split_words
from loragen_agents.data.phrases import phrases

_OPENERS = frozenset(phrases("words")["openers"].split())
_JOINED_CLAUSES, _MAX_CLAUSE = 0.7, 90


def irrelevant_answer(rng: random.Random) -> str:
    """Draw what to say where no tool serves a request."""
    return rng.choice(phrases("answers")["irrelevant"])


def final_answer(results: list[str], failed: bool, rng: random.Random) -> str:
    """Draw what to say once the tools have given `results`, the last of them an error where `failed`."""
    template = rng.choice(phrases("answers")["failed" if failed else "reported"])
    return template.format(result=results[-1] if failed else " ".join(results)).strip()


def joined_request(first: str, second: str, rng: random.Random) -> str:
    """Draw one request that asks for two things, one after the other.

    Two short requests that are no questions mostly become one sentence, as people say them: "dim the lights and play
    jazz".
    """
    if _is_clause(first) and _is_clause(second) and rng.random() < _JOINED_CLAUSES:
        made = rng.choice(phrases("answers")["joined_clauses"])
        return str(made.format(first=first.strip().rstrip(".!"), second=_without_capital(second)))
    template = rng.choice(phrases("answers")["joined"])
    if not template.startswith(("First", "Two", "{first} {second}")):
        second = _without_capital(second)
    first = first if first.rstrip()[-1:] in ".!?" else first.rstrip() + "."
    return template.format(first=first, second=second)


def _is_clause(request: str) -> bool:
    """Whether a request can be part of a sentence: it is short, and neither a question nor several sentences."""
    return len(request) <= _MAX_CLAUSE and re.search(r"[?\n]|[.!]\s", request.strip()) is None


def _without_capital(request: str) -> str:
    """A name or "I" keeps its capital; ordinary opening words lose theirs."""
    words = request.split(maxsplit=1)
    return request[0].lower() + request[1:] if words and words[0].lower() in _OPENERS else request


def received_file(rng: random.Random) -> tuple[str, str]:
    """Draw an earlier turn in which the user hands over a file, and what the assistant said to it."""
    entry = rng.choice(phrases("answers")["received"])
    suffix = "png" if "image" in entry["request"] else rng.choice(("png", "jpg", "pdf", "txt", "csv", "wav"))
    folder = "image" if suffix in ("png", "jpg") else "files"
    name = f"{folder}/{''.join(rng.choices(string.ascii_lowercase, k=8))}.{suffix}"
    return entry["request"].format(file=name), entry["answer"]


def small_talk(rng: random.Random) -> tuple[str, str]:
    """Draw a request that takes no tool, and its answer."""
    group = rng.choice(phrases("chat")["groups"])
    slots = rng.choice(group.get("slots", [{}]))
    user, answer = (rng.choice(group[side].splitlines()) for side in ("user", "ai"))
    return user.format(**slots), answer.format(**slots)


def referred(request: str, value: str, rng: random.Random) -> tuple[str, tuple[str, str], tuple[str, str]] | None:
    """Let a request point to a value that an earlier turn holds.

    Returns:
        The request with a pointer in the value's place, what the user said before and the answer to it, and the same
        value as a tool's result and the answer that tells it; None where the value does not stand in the request once.
    """
    book = phrases("referred")
    if len(re.findall(rf"(?<!\w){re.escape(value)}(?!\w)", request)) != 1:
        return None
    pointing = re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", rng.choice(book["pointers"]), request)
    said, answer = (text.format(value=value) for text in rng.choice(book["said"]))
    observed, told = (rng.choice(book[part]).format(value=value) for part in ("observed", "told"))
    return pointing, (said, answer), (observed, told)


def _kind(name: str, description: str) -> str:
    verbs: Mapping[str, list[str]] = phrases("results")["verbs"]
    for word in [*split_words(name)[:1], *split_words(description)[:1]]:
        for kind, members in verbs.items():
            if word in members or (word.endswith("s") and word[:-1] in members):
                return kind
    return "other"


def tool_result(
    name: str, description: str, arguments: Mapping[str, Any], rng: random.Random, *, error: bool = False
) -> str:
    """Draw a result on one line that a tool of this name and description might give for a call.

    Args:
        error: draw an error message in place of a result.
    """
    book = phrases("results")
    values = [text for text in map(str, arguments.values()) if 0 < len(text) <= 60 and "\n" not in text]
    templates = book["errors"] if error else book["results"][_kind(name, description)]
    template = rng.choice([text for text in templates if values or "{value}" not in text])

    class Slots(dict):
        def __missing__(self, key: str) -> str:
            if key == "value":
                return rng.choice(values)
            if key == "count":
                return str(rng.randint(2, 40))
            if key == "number":
                return str(rng.choice((rng.randint(1, 20), rng.randint(20, 5000), round(rng.uniform(0, 300), 2))))
            if key == "percent":
                return str(rng.randint(1, 99))
            if key == "time":
                return f"{rng.randint(0, 23):02d}:{rng.choice((0, 5, 15, 20, 30, 45)):02d}"
            if key == "code":
                return "".join(rng.choices(string.ascii_uppercase + string.digits, k=rng.randint(4, 8)))
            return rng.choice(book["names"])

    formatter = string.Formatter()
    return formatter.vformat(template, (), Slots()).strip()
