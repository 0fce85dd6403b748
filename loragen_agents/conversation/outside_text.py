"""Keeps text from outside from looking like the model's own steps.

A step is a few lines, each with a label at its beginning (`Thought:`, `Action:`, ...). Requests, observations and old
answers are free text and may hold such lines too. They get a quote mark in front: `> Thought: ...`. All other text
stays as it is, character by character. Knows nothing of tokens and templates.
"""

import re
import unicodedata
from collections.abc import Iterator
from itertools import islice

from loragen_agents.conversation.react import LINE_LABELS

QUOTE_MARK = "> "

# Everything that some tokenizer, reader or model may take for a line break. "<0x0A>" is how vocabularies with byte
# fallback spell the byte; a few of them read the spelling as the byte itself.
_BREAK = re.compile(r"\r\n|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]|<0x0[ad]>", re.IGNORECASE)
_LABELS = tuple(label.replace(" ", "").casefold() for label in LINE_LABELS)
_LONGEST = max(map(len, _LABELS))
# Control, mark and separator characters, which tokenizers may drop or change, as they may the two characters below.
_DROPPED_CATEGORIES = "CMZ"
_DROPPED_CHARACTERS = "\ufffd\u2581"


def quote_steps(text: str, *, at_line_start: bool = False) -> str:
    """Put `QUOTE_MARK` in front of every line that begins like a line of a step.

    Case, spaces, invisible characters and compatibility forms (such as full-width letters) make no difference.

    Args:
        text: text from outside.
        at_line_start: whether the prompt has a line break before `text`, so that its first line counts too.

    Returns:
        `text` itself where no line begins like a step.
    """
    marked = [begin for begin, end in _lines(text) if (begin or at_line_start) and _begins_like_step(text, begin, end)]
    parts = [text[begin:end] for begin, end in zip([0, *marked], [*marked, len(text)], strict=True)]
    return QUOTE_MARK.join(parts)


def one_line(text: str) -> str:
    """`text` with a space in the place of every line break."""
    return _BREAK.sub(" ", text)


def _lines(text: str) -> Iterator[tuple[int, int]]:
    """Where each line begins and ends, its line break left out."""
    begin = 0
    for match in _BREAK.finditer(text):
        yield begin, match.start()
        begin = match.end()
    yield begin, len(text)


def _begins_like_step(text: str, begin: int, end: int) -> bool:
    visible = (
        text[place]
        for place in range(begin, end)
        if unicodedata.category(text[place])[0] not in _DROPPED_CATEGORIES and text[place] not in _DROPPED_CHARACTERS
    )
    beginning = unicodedata.normalize("NFKC", "".join(islice(visible, _LONGEST)))
    return beginning.casefold().startswith(_LABELS)
