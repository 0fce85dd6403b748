"""What a single value of a csv input can be: a scalar whose text has no comma, no line break and no blank around it."""

import json
import re
from typing import Any

# Line breaks of all kinds and control characters but the tab. Part of a character class.
BREAKS = r"\x00-\x08\x0a-\x1f\x7f\x85\u2028\u2029"
_BREAK = re.compile(f"[{BREAKS}]")


def is_scalar(value: Any) -> bool:
    """Whether JSON writes `value` without brackets."""
    return isinstance(value, str | bool | int | float | None)


def scalar_text(value: Any) -> str:
    """A scalar as csv writes it: a string as it is, everything else as in JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def fits_csv(value: Any) -> bool:
    """Whether csv can hold `value` wherever it stands."""
    if not is_scalar(value):
        return False
    text = scalar_text(value)
    return bool(text) and text == text.strip() and "," not in text and not _BREAK.search(text)
