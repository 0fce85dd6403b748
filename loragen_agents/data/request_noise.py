"""Requests as people type them: small letters, no full stop, a slip of the finger, a polite word. Values stay whole.

Every change keeps what the request asks for. Knows text only.
"""

import random
import re
from collections.abc import Iterable

from loragen_agents.data.phrases import phrases

_LETTERS = re.compile(r"[A-Za-z]{4,}")


def noisy(request: str, values: Iterable[object], rng: random.Random) -> str:
    """The request with one or two changes; characters that a value takes are left as they are.

    Args:
        values: what the gold call gives; a text of them that stands in the request is copied from there.
    """
    changes = rng.sample([_small_letters, _no_stop, _slip, _polite], rng.choice((1, 1, 2)))
    for change in changes:
        request = change(request, _taken(request, values), rng)
    return request


def _taken(request: str, values: Iterable[object]) -> list[tuple[int, int]]:
    """Where values stand in the request."""
    texts = [text for value in values for text in (value if isinstance(value, list) else [value])]
    folded, spans = request.casefold(), []
    if len(folded) != len(request):  # letters that change their number with the case: nothing is sure
        return [(0, len(request))]
    for text in {str(text).casefold() for text in texts} - {""}:
        spans += [(found.start(), found.end()) for found in re.finditer(re.escape(text), folded)]
    return spans


def _free(start: int, end: int, taken: list[tuple[int, int]]) -> bool:
    return all(end <= begin or start >= stop for begin, stop in taken)


def _small_letters(request: str, taken: list[tuple[int, int]], rng: random.Random) -> str:
    return "".join(letter.lower() if _free(index, index + 1, taken) else letter for index, letter in enumerate(request))


def _no_stop(request: str, taken: list[tuple[int, int]], rng: random.Random) -> str:
    ends = request[-1:] in (".", "?", "!") and _free(len(request) - 1, len(request), taken)
    return request[:-1] if ends else request


def _slip(request: str, taken: list[tuple[int, int]], rng: random.Random) -> str:
    """Two letters change places, one is left out, or one comes twice, inside a word of four letters or more."""
    words = [word for word in _LETTERS.finditer(request) if _free(word.start(), word.end(), taken)]
    if not words:
        return request
    word = rng.choice(words)
    place = rng.randrange(word.start() + 1, word.end() - 1)
    pair = request[place : place + 2]
    return request[:place] + rng.choice((pair[::-1], pair[1], pair[0] + pair)) + request[place + 2 :]


def _polite(request: str, taken: list[tuple[int, int]], rng: random.Random) -> str:
    before, after = rng.choice(phrases("polite")["around"])
    small = before and request[1:2].islower() and request[:2] not in ("I ", "I'") and _free(0, 1, taken)
    return f"{before}{request[0].lower() + request[1:] if small else request}{after}"
