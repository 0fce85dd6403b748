"""Stop texts in a text that arrives in pieces: where to cut it, and how much of its end to hold back."""

from collections.abc import Sequence


def cut_at_first(text: str, stops: Sequence[str], start: int = 0) -> tuple[str, bool]:
    """`text` up to the first of `stops`, and whether there was one.

    Args:
        text: the text so far.
        stops: texts at which it ends, none of them empty.
        start: where in `text` the search begins.
    """
    places = [place for place in (text.find(stop, start) for stop in stops) if place >= 0]
    return (text[: min(places)], True) if places else (text, False)


def held_back(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that is one of `stops`, or with which one of them may begin."""
    for length in range(min(max(map(len, stops), default=0), len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
