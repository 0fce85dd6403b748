"""Other names, descriptions and argument names for a tool, so that a model has to read definitions to win.

Everything here is a pure function of its inputs and of the `random.Random` that is handed in. It knows tools as words
and schemas only: no registries, no prompts.
"""

import itertools
import random
import re
from collections.abc import Callable, Hashable, Iterable, Sequence

from loragen_agents.data.phrases import phrases

STYLES = ("snake", "camel", "pascal", "title", "kebab", "lower", "flat", "upper")
STYLE_WEIGHTS = (24, 20, 16, 16, 8, 8, 4, 4)

_WORDS = phrases("words")
_SINGLE_ONSETS = tuple("bcdfghjklmnprstvwz")
_CLUSTER_ONSETS = tuple(_WORDS["onset_clusters"].split())
_DOUBLE_VOWELS = ("ai", "ea", "ee", "oo", "ou", "y")
_CODAS = tuple(_WORDS["codas"].split())

_SYNONYMS: dict[str, list[str]] = {word: others.split() for word, others in _WORDS["synonyms"].items()}
_FUNCTION_WORDS = frozenset(_WORDS["function_words"].split())
_VERBS = frozenset(_WORDS["verbs"].split()) | _SYNONYMS.keys()


def split_words(name: str) -> list[str]:
    """Lower-case words of a name in any style: `getHTTPStatus_code` gives get, http, status, code."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]


def join_words(words: Sequence[str], style: str) -> str:
    """Write words in one of STYLES.

    Raises:
        ValueError: `style` is none of STYLES.
    """
    if style == "snake":
        return "_".join(words)
    if style == "kebab":
        return "-".join(words)
    if style == "flat":
        return "".join(words)
    if style == "lower":
        return " ".join(words)
    if style == "upper":
        return "_".join(words).upper()
    capital = [word[:1].upper() + word[1:] for word in words]
    if style == "title":
        return " ".join(capital)
    if style == "pascal":
        return "".join(capital)
    if style == "camel":
        return words[0] + "".join(capital[1:]) if words else ""
    raise ValueError(f"unknown style {style!r}: expected one of {', '.join(STYLES)}")


def draw_style(rng: random.Random) -> str:
    """Draw a style, the common ones more often."""
    return rng.choices(STYLES, STYLE_WEIGHTS)[0]


def invented_word(rng: random.Random, syllables: int | None = None) -> str:
    """Draw a pronounceable word of two or three syllables that is (nearly always) none of any language."""
    count = syllables or rng.choices((2, 3), (65, 35))[0]
    parts = []
    for _ in range(count):
        onset = rng.choice(_SINGLE_ONSETS if rng.random() < 0.8 else _CLUSTER_ONSETS)
        parts.append(onset + rng.choice("aeiou" if rng.random() < 0.85 else _DOUBLE_VOWELS))
    return "".join(parts) + (rng.choice(_CODAS) if rng.random() < 0.45 else "")


def invented_name(rng: random.Random, style: str) -> str:
    """Draw a name of one invented word or, seldom, of two short ones."""
    if rng.random() < 0.15:
        return join_words([invented_word(rng, 2), invented_word(rng, rng.randint(1, 2))], style)
    return join_words([invented_word(rng)], style)


def numbered_name(name: str, rng: random.Random, style: str) -> str:
    """Put a number among the words of a name, or behind an invented word where there is none: `read_v2`, `Make 3D`."""
    words = split_words(name) or [invented_word(rng)]
    digit = rng.randint(1, 9)
    number = rng.choice((f"{digit}", f"{digit}d", f"v{digit}", f"{rng.randint(10, 999)}"))
    words.insert(rng.randint(1, len(words)), number)
    return join_words(words, style)


def echoing_name(word: str, rng: random.Random, style: str) -> str:
    """An invented name that begins with some letters of a word, or with the whole of it."""
    head = word[: rng.randint(1, len(word))] if rng.random() < 0.7 else word
    tail = invented_word(rng, rng.randint(1, 2))
    return join_words([head, tail] if rng.random() < 0.3 else [head + tail], style)


def reworded_name(name: str, description: str, rng: random.Random, style: str) -> str:
    """Draw a name with the same meaning: words replaced by others of the same sense, or taken from the description."""
    words = split_words(name) or [name.lower()]
    content = content_words(description)
    if content and rng.random() < 0.4:
        count = min(len(content), rng.choices((1, 2, 3), (20, 55, 25))[0])
        picked = sorted(rng.sample(range(min(len(content), 8)), min(count, len(content), 8)))
        return join_words([content[index] for index in picked], style)
    replaced: list[str] = []
    for word in words:
        others = _SYNONYMS.get(word)
        replaced += rng.choice(others).split("_") if others and rng.random() < 0.7 else [word]
    if len(replaced) > 2 and rng.random() < 0.25:
        del replaced[rng.randrange(len(replaced))]
    if rng.random() < 0.12:
        replaced.append(rng.choice(("tool", "helper", "service", "api", "action", "op")))
    return join_words(replaced, style)


def content_words(text: str) -> list[str]:
    """Lower-case words of a text without function words and without repetition, in order."""
    words = re.findall(r"[a-z][a-z0-9]+", text.lower())
    return list(dict.fromkeys(word for word in words if word not in _FUNCTION_WORDS))


def distinct_name(
    draw: Callable[[], str], taken: set[Hashable], key: Callable[[str], Hashable], tries: int = 50
) -> str:
    """Draw until the name's `key` is none of `taken`, add the key and return the name.

    Raises:
        RuntimeError: every one of `tries` draws was taken.
    """
    for _ in range(tries):
        name = draw()
        if name and key(name) not in taken:
            taken.add(key(name))
            return name
    raise RuntimeError(f"no free name after {tries} draws; the last was {name!r}")


def shuffled_apart(items: Sequence[str], rng: random.Random) -> list[str]:
    """Shuffle so that no item stays in its place (two items or more; one item stays)."""
    order = list(range(len(items)))
    rng.shuffle(order)
    # Each index takes the place of the next one in a random cycle: a permutation without fixed points.
    result = list(items)
    for here, there in zip(order, order[1:] + order[:1], strict=True):
        result[here] = items[there]
    return result


def first_sentence(description: str) -> str:
    """The text up to the first end of a sentence."""
    return re.split(r"(?<=[.!?])\s+(?=[A-Z])", description.strip(), maxsplit=1)[0]


def shortened(description: str, rng: random.Random) -> str:
    """The first five to eleven words of a description, cut where a new clause starts if there is one."""
    sentence = first_sentence(description)
    clause = re.split(r"[,;:(]| - | \u2013 | including | such as ", sentence, maxsplit=1)[0].strip()
    words = (clause if len(clause.split()) >= 3 else sentence).split()[: rng.randint(5, 11)]
    while len(words) > 3 and words[-1].lower() in _FUNCTION_WORDS:
        words.pop()
    return " ".join(words).rstrip(" .,;:")


def useful_when(description: str, arguments: Sequence[str]) -> str:
    """The description in the wording of GPT4Tools' prompts: what the tool is useful for and what its input holds."""
    text = description.strip().rstrip(".")
    if not text:
        return text
    purpose = text[0].lower() + text[1:] if not text[:2].isupper() else text
    opening = f"useful when you want to {purpose}" if _starts_with_verb(text) else text
    if not arguments:
        return f"{opening}. It takes no input."
    if len(arguments) == 1:
        return f"{opening}. The input to this tool should be a string, representing the {_spaced(arguments[0])}."
    listed = ", ".join(f"the {_spaced(name)}" for name in arguments[:-1]) + f" and the {_spaced(arguments[-1])}"
    count = len(arguments)
    return f"{opening}. The input to this tool should be a comma separated string of {count}, representing {listed}."


def _spaced(name: str) -> str:
    return " ".join(split_words(name)) or name


def _starts_with_verb(text: str) -> bool:
    first = (re.findall(r"[A-Za-z]+", text) or [""])[0].lower()
    return first in _VERBS


def renamed_arguments(names: Sequence[str], rng: random.Random) -> dict[str, str]:
    """Draw new names for a tool's arguments, all in one style: restyled, reworded or, seldom, invented.

    The result maps old names to new, distinct ones; it is the same mapping for the schema and for every gold call.
    """
    style = rng.choice(("snake", "camel", "snake", "camel", "kebab", "flat", "pascal", "lower"))
    mode = rng.choices(("restyled", "reworded", "invented"), (35, 55, 10))[0]
    mapping: dict[str, str] = {}
    taken: set[Hashable] = set()
    for name in names:
        words = split_words(name) or [name]

        def draw(words: list[str] = words) -> str:
            if mode == "invented":
                return join_words([invented_word(rng)], style)
            if mode == "restyled":
                return join_words(words, style)
            new: list[str] = []
            for word in words:
                others = _SYNONYMS.get(word)
                new += rng.choice(others).split("_") if others and rng.random() < 0.8 else [word]
            if len(new) > 1 and rng.random() < 0.3:
                new = new[-1:] if rng.random() < 0.5 else new[:1]
            return join_words(new, style)

        try:
            mapping[name] = distinct_name(draw, taken, str.casefold, tries=5)
        except RuntimeError:
            plain = join_words(words, "snake")
            free = (f"{plain}{number}" for number in itertools.count(2))
            mapping[name] = distinct_name(free.__next__, taken, str.casefold)
    return mapping


def drop_argument_descriptions(properties: Iterable[tuple[str, dict]]) -> dict[str, dict]:
    """The schemas without their descriptions: names and types alone must do."""
    return {name: {k: v for k, v in schema.items() if k != "description"} for name, schema in properties}
