"""Arithmetic as people write it, and units.

`15% of 240`, `sqrt of 144`, `3.5 times 12 plus 8`, `(17 + 5) * 3 / 2`. A small parser of its own, so that nothing is
ever executed; units are pint's.
"""

import math
import operator
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from loragen_agents.assistant.results import Result
from loragen_agents.assistant.tools.context import Context, ToolError


def tools(context: Context) -> dict[str, Callable[..., Result]]:
    return {"calculator": calculator, "convert_units": convert_units}


def calculator(expression: str) -> Result:
    value = evaluate(expression)
    return Result(f"{expression.strip().rstrip('=? ')} = {number_text(value)}")


def evaluate(expression: str) -> float:
    """The value of an arithmetic expression.

    Raises:
        ToolError: it can't be read or has no value; says which part.
    """
    if len(expression) > 500:
        raise ToolError("the expression is longer than 500 characters")
    try:
        value = _Parser(_tokens(expression), expression).whole()
    except (ArithmeticError, ValueError) as error:
        raise ToolError(f"{expression!r} has no value: {error}") from error
    except RecursionError as error:
        raise ToolError(f"{expression!r} is nested too deeply") from error
    if not math.isfinite(value):
        raise ToolError(f"{expression!r} has no finite value")
    return value


def number_text(value: float) -> str:
    """A number as people write it: 12 digits at most, no `.0`."""
    if isinstance(value, int):
        return str(value) if abs(value) < 10**40 else f"{value:.12e}"
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else f"{value:.12g}"


# Words to signs; longer phrases first. "of" is a product: 15% of 240, half of 50.
_PHRASES = (
    (r"(?:what(?:'s| is| are)|how much is|calculate|compute|work out|the (?:sum|result|value) of)\b", " "),
    (r"\b(?:the )?square root(?: of)?|√|\bsqrt of\b", " sqrt "),
    (r"\b(?:the )?cube root(?: of)?|\bcbrt of\b", " cbrt "),
    (r"\b(?:a )?half(?: of)?\b", " 0.5 * "),
    (r"\b(?:a )?third(?: of)\b", " 1/3 * "),
    (r"\b(?:a )?quarter(?: of)\b", " 0.25 * "),
    (r"\bto the power (?:of )?|\braised to\b", "^"),
    (r"\bdivided by\b|\bover\b|÷", "/"),
    (r"\bmultiplied by\b|\btimes\b|\u00d7|\u00b7|\bof\b(?=\s*\(?-?[\d.])", "*"),
    (r"(?<=[\d)])\s*x\s*(?=[\d(])", "*"),
    (r"\bplus\b|\badded to\b", "+"),
    (r"\bminus\b|\bless\b|[\u2212\u2013]", "-"),
    (r"\bper\s?cent\b", "%"),
    (r"\bmod(?:ulo)?\b", " mod "),
    (r"\bsquared\b", "^2"),
    (r"\bcubed\b", "^3"),
    (r"\b(?:twice|double)\b", " 2 * "),
    (r"\bthe\b", " "),
    (r"[$€£]", ""),
)
NUMBER_WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
_TOKEN = re.compile(r"\s*(?:(\d+(?:\.\d*)?(?:e[-+]?\d+)?|\.\d+)|(\*\*|//|[-+*/^%!(),])|([a-z]+))")
_FUNCTIONS: dict[str, Callable[[float], float]] = {
    "sqrt": math.sqrt,
    "cbrt": lambda x: math.copysign(abs(x) ** (1 / 3), x),
    "abs": abs,
    "round": round,
    "floor": math.floor,
    "ceil": math.ceil,
    "log": math.log10,
    "ln": math.log,
    "exp": math.exp,
    "sin": math.sin,
    "cos": math.cos,
    "tan": math.tan,
}
_CONSTANTS = {"pi": math.pi, "e": math.e}


def _tokens(expression: str) -> list[str]:
    text = expression.strip().rstrip("=?. ").lower()
    text = re.sub(r"(?<=\d)[,_'](?=\d{3}\b)", "", text)  # 1,250,000
    for pattern, sign in _PHRASES:
        text = re.sub(pattern, sign, text)
    text = re.sub(r"[a-z]+", lambda m: _word_number(m[0]), text)
    tokens, place = [], 0
    while text[place:].strip():
        match = _TOKEN.match(text, place)
        if match is None:
            raise ToolError(f"{expression!r} can't be read at {text[place:].strip()[:12]!r}")
        tokens.append(match[0].strip())
        place = match.end()
    return tokens


def _word_number(word: str) -> str:
    return str(NUMBER_WORDS.index(word)) if word in NUMBER_WORDS else word


class _Parser:
    """Precedence climbing: sums, products, signs, powers, then what stands alone."""

    def __init__(self, tokens: list[str], expression: str) -> None:
        self.tokens, self.place, self.expression = tokens, 0, expression

    def whole(self) -> float:
        if not self.tokens:
            raise ToolError("there is nothing to work out")
        value, _ = self.sum()
        if self.place < len(self.tokens):
            raise ToolError(f"{self.expression!r} can't be read at {self.tokens[self.place]!r}")
        return value

    def peek(self) -> str:
        return self.tokens[self.place] if self.place < len(self.tokens) else ""

    def take(self, *wanted: str) -> str:
        """The next token if it is one of `wanted`, else an empty text."""
        token = self.peek()
        if token in wanted:
            self.place += 1
            return token
        return ""

    # Each gives a value and whether it is a bare percentage: 200 + 10% is 220, as on a pocket calculator.

    def sum(self) -> tuple[float, bool]:
        value, percent = self.product()
        while sign := self.take("+", "-"):
            other, other_percent = self.product()
            if other_percent and not percent:
                other *= value
            value = value + other if sign == "+" else value - other
            percent = percent and other_percent
        return value, percent

    def product(self) -> tuple[float, bool]:
        value, percent = self.signed()
        while sign := self.take("*", "/", "//", "mod") or ("*" if self.peek() == "(" else ""):
            other, _ = self.signed()
            percent = False
            if sign == "*":
                value = value * other
            elif sign == "/":
                exact = isinstance(value, int) and isinstance(other, int) and other != 0 and value % other == 0
                value = value // other if exact else value / other
            else:
                value = operator.floordiv(value, other) if sign == "//" else value % other
        return value, percent

    def signed(self) -> tuple[float, bool]:
        if sign := self.take("-", "+"):
            value, percent = self.signed()
            return (-value if sign == "-" else value), percent
        return self.power()

    def power(self) -> tuple[float, bool]:
        base, percent = self.single()
        if self.take("^", "**"):
            exponent, _ = self.signed()
            if abs(exponent) > 1000 or abs(base) > 1e6:
                raise ValueError("the power is too large")
            if base < 0 and not float(exponent).is_integer():
                raise ValueError("the root of a negative number is not real")
            return base**exponent, False
        return base, percent

    def single(self) -> tuple[float, bool]:
        value = self.atom()
        while sign := self.take("!", "%"):
            if sign == "!":
                if not 0 <= value <= 200 or value != int(value):
                    raise ValueError("a factorial needs a whole number from 0 to 200")
                value = math.factorial(int(value))
            elif self._percent_ends():
                return value / 100, True
            else:  # 17 % 5: a remainder, as programmers write it
                value = value % self.atom()
        return value, False

    def _percent_ends(self) -> bool:
        return not (self.peek()[:1].isdigit() or self.peek() == "(")

    def atom(self) -> float:
        token = self.peek()
        self.place += 1
        if token == "(":
            value, _ = self.sum()
            if not self.take(")"):
                raise ToolError(f"{self.expression!r} lacks a closing bracket")
            return value
        if token in _FUNCTIONS:
            return _FUNCTIONS[token](self.power()[0])
        if token in _CONSTANTS:
            return _CONSTANTS[token]
        if token[:1].isdigit() or token[:1] == ".":
            return int(token) if token.isdigit() else float(token)
        raise ToolError(f"{self.expression!r} can't be read " + (f"at {token!r}" if token else "to its end"))


# What people write where pint means something else (C is a coulomb there, F a farad) or nothing.
_UNITS = {
    "c": "degC", "°c": "degC", "celsius": "degC", "centigrade": "degC", "degrees celsius": "degC",
    "f": "degF", "°f": "degF", "fahrenheit": "degF", "degrees fahrenheit": "degF", "k": "kelvin", "kelvins": "kelvin",
    "lbs": "pound", "pounds": "pound", "stones": "stone", "feet": "foot", "mph": "mile/hour", "kph": "kilometer/hour",
    "kmh": "kilometer/hour", "kilos": "kilogram", "kilo": "kilogram", "gb": "gigabyte", "mb": "megabyte",
    "kb": "kilobyte", "tb": "terabyte", "tbsp": "tablespoon", "tsp": "teaspoon", "l": "liter", "g": "gram",
    "m": "meter", "h": "hour", "fl oz": "fluid_ounce", "fluid ounces": "fluid_ounce", "sq ft": "foot**2",
    "sqm": "meter**2", "sq m": "meter**2", "nautical miles": "nautical_mile", "calories": "calorie",
}  # fmt: skip


def convert_units(value: float, from_unit: str, to_unit: str) -> Result:
    import pint

    registry = _unit_registry()
    try:
        quantity = registry.Quantity(value, _unit(from_unit)).to(_unit(to_unit))
    except pint.errors.DimensionalityError as error:
        raise ToolError(f"{from_unit} can't be converted to {to_unit}: they measure different things") from error
    except Exception as error:  # pint's parser lets errors of several kinds through
        raise ToolError(f"{from_unit!r} or {to_unit!r} is not a unit: {error}") from error
    return Result(f"{number_text(value)} {from_unit} = {number_text(_rounded(quantity.magnitude))} {to_unit}")


def _rounded(value: float) -> float:
    """Six significant digits: more would pretend a precision that measured values don't have."""
    return float(f"{float(value):.6g}")


def _unit(given: str) -> str:
    text = " ".join(given.strip().lower().rstrip(".").split())
    if text in _UNITS:
        return _UNITS[text]
    for word, power in (("square ", "**2"), ("cubic ", "**3")):
        if text.startswith(word):
            return f"({_unit(text.removeprefix(word))}){power}"
    if " per " in text:
        above, below = text.split(" per ", 1)
        return f"({_unit(above)})/({_unit(below)})"
    if not re.fullmatch(r"[\w°µ%/*^ .-]{1,40}", given.strip()):
        raise ValueError(f"{given!r} is no unit")
    # Pint knows "metres" and "MB" by their own spelling, "Miles" by the lower one.
    return given.strip() if len(given.strip()) <= 3 else text.replace(" ", "_")


@lru_cache(maxsize=1)
def _unit_registry() -> Any:
    import pint

    return pint.UnitRegistry(autoconvert_offset_to_baseunit=True)
