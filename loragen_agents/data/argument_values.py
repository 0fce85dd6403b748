"""Values of arguments: whether they fit a schema's type, can be converted to it, and are stated in a request.

Knows neither tools nor records.
"""

import re
from collections.abc import Mapping
from typing import Any

_JSON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}
_NUMBER_WORDS = dict(
    zip(
        ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"],
        range(1, 13),
        strict=True,
    )
)


def fits_type(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether `value` is of the JSON type (and among the values) that an argument's schema names."""
    if "enum" in schema and value not in schema["enum"]:
        return False
    kind = schema.get("type")
    if not isinstance(kind, str) or kind not in _JSON_TYPES:
        return True
    if isinstance(value, bool) and kind != "boolean":
        return False
    return isinstance(value, _JSON_TYPES[kind])


def coerced(value: Any, schema: Mapping[str, Any]) -> Any:
    """`value` in the schema's type where nothing is lost by it, else `value` itself."""
    kind = schema.get("type")
    if kind == "string" and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if kind == "integer" and isinstance(value, str) and re.fullmatch(r"-?\d{1,15}", value.strip()):
        return int(value)
    if kind == "integer" and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind == "number" and isinstance(value, str) and re.fullmatch(r"-?\d{1,15}(\.\d+)?", value.strip()):
        return float(value) if "." in value else int(value)
    if kind == "boolean" and isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    return value


def states(query: str, value: Any) -> bool:
    """Whether a request's words state an argument's value; a rough check that lets other spellings pass.

    A number must be in the request; thousands separators and a trailing .0 don't count. Of a text, one word of three
    or more letters or one number must be. Truth values always pass: requests seldom spell them.
    """
    if isinstance(value, bool):
        return True
    text = query.lower()
    if isinstance(value, (int, float)):
        plain = f"{value:g}" if abs(value) < 1e15 else str(value)
        exact = str(int(value)) if float(value).is_integer() else str(value)
        return any(form in text.replace(",", "") for form in (plain, exact)) or (float(value) in _spelt_numbers(text))
    words = re.findall(r"[a-z]{3,}|\d+", str(value).lower())
    if not words:
        return str(value).lower() in text
    return any(word.lstrip("0") in text for word in words)


def _spelt_numbers(text: str) -> set[float]:
    return {float(_NUMBER_WORDS[word]) for word in re.findall(r"[a-z]+", text) if word in _NUMBER_WORDS}
