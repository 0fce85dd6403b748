"""Tells the model, while it writes a text or a number, which words of the request the argument reader takes for it.

A small model often writes the words of another argument, or too few of the right ones; the reader, which sees the whole
request at once, says how likely each stretch of words is the value, or none of them. Both are heard: at each token of a
value, the reader's log-probabilities are added to the model's (shallow fusion, as speech recognition does it with a
second model). Nothing is forced; a value that the request does not have is still the model's own.

The reader looks at each argument alone. What words belong to is settled between them: words that are likely the value
of one argument are less so that of another.

Knows tokens, words and probabilities; no models.
"""

import json
import math
import re
import weakref
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from loragen_agents.adapter.argument_reader import FoundArguments
from loragen_agents.conversation.prompts import PromptRenderer, Turn
from loragen_agents.registry import Tool

# Chosen on held-out requests of four sources: calls whose tool and arguments are known come out right in 73 to 83% for
# `slurp`, 80 to 88% for sgd, and 64 to 74% for Seal-Tools, with 1 to 2 here and 1 to 4 below.
_WEIGHT = 1.5
# How much less likely than the reader says the model's own words are, and the least that they ever are.
_OWN_WORDS, _LEAST_OWN = -4.0, -12.0
# Each token that is written as the request has it makes it less likely that the model's own words begin so by chance.
_SETTLES = 0.5
# What a call gives seldom stands nowhere in the request, and a model's own words for it are worse than some of its.
_MOST_ABSENT = 0.8
# Words may after all be the value of two arguments.
_EXCLUSIVE = 0.9
_ROUNDS = 4
# Arguments that are likelier than this to be given lay claim to words.
_CLAIMS = 0.5
# Stretches of words that are looked at for one value.
_CANDIDATES = 8
_LONGEST = 40  # words
# What a schema may say beside its type; whatever asks for another spelling is the grammar's business.
_PLAIN = {"title", "description", "default", "examples", "minimum", "maximum", "minLength", "maxLength"}
_COPIED_FORMATS = {"email", "hostname", "ipv4", "ipv6", "uri", "uuid"}
# Behind the name of a property.
_NAMED = re.compile(r'"((?:[^"\\]|\\.)*)":$')
_WORD, _PART = re.compile(r"\S+"), re.compile(r"[^/\-]+")
_NUMBERS = {"integer": re.compile(r"\d+"), "number": re.compile(r"\d+(\.\d+)?")}
_POSSESSIVE = ("'s", "\N{RIGHT SINGLE QUOTATION MARK}s")
_AROUND_WORDS, _BRACKETS = ".,!?;:\"'", "()[]{}"
_AROUND_NUMBERS = "$%#\N{EURO SIGN}\N{POUND SIGN}"


def copied_types(tool: Tool) -> dict[str, str]:
    """The arguments of a tool whose values may be copied, plain texts and numbers, with their JSON types."""
    types = {name: _plain_type(schema) for name, schema in tool.parameters["properties"].items()}
    return {name: known for name, known in types.items() if known is not None}


def _plain_type(schema: object) -> str | None:
    """The one type of a plain text or number, `null` aside; None for all other schemas."""
    if not isinstance(schema, dict):
        return None
    beside = {key: value for key, value in schema.items() if key != "anyOf"}
    if isinstance(branches := schema.get("anyOf"), list):
        some = [branch for branch in branches if branch != {"type": "null"}]
        return _plain_type(beside | some[0]) if len(some) == 1 and isinstance(some[0], dict) else None
    named = schema.get("type")
    types = [one for one in (named if isinstance(named, list) else [named]) if one != "null"]
    if schema.keys() - _PLAIN - {"type", "format"} or schema.get("format", "uri") not in _COPIED_FORMATS:
        return None
    return types[0] if len(types) == 1 and types[0] in ("string", *_NUMBERS) else None


def copied_values(
    tool: Tool,
    turns: Sequence[Turn],
    renderer: PromptRenderer,
    tokenizer: PreTrainedTokenizerFast,
    found: FoundArguments,
) -> "CopiedValues | None":
    """What the last request of a conversation may have of the values of a tool's call; None where nothing is copied.

    Args:
        found: what the reader found in `renderer.user_turn(turns)`.
    """
    types = copied_types(tool)
    if not types:
        return None
    begin, end = renderer.request_place(turns)
    if begin == end:
        return None
    _, text, starts = renderer.user_turn_with_starts(turns)
    claims = [name for name, likely in found.given.items() if likely >= _CLAIMS or name in tool.required]
    likely = RequestText(text, starts, begin, end).likeliest(found, list(types), claims)
    return CopiedValues(types, likely, renderer, tokenizer)


@dataclass(frozen=True)
class Likely:
    """The stretches of a request that are most likely an argument's value, and that it is none: log-probabilities."""

    texts: dict[str, float]
    absent: float


@dataclass(frozen=True)
class RequestText:
    """A request inside a prompt.

    Attributes:
        text: the whole prompt.
        starts: place in it of the first character of each token.
        begin, end: where the request stands in it.
    """

    text: str
    starts: Sequence[int]
    begin: int
    end: int

    @cached_property
    def words(self) -> tuple[list[int], list[int]]:
        """Where a value may begin and where it may end, in characters.

        At words with and without brackets, at parts of them between slashes and hyphens, and before a possessive `'s`.
        """
        begins, ends = set[int](), set[int]()
        for found in _WORD.finditer(self.text, self.begin, self.end):
            for around in (_AROUND_WORDS, _AROUND_WORDS + _BRACKETS):
                core = found.group().strip(around)
                if not core:
                    continue
                first = found.start() + found.group().index(core)
                begins |= {first, *(first + part.start() for part in _PART.finditer(core))}
                ends |= {first + len(core), *(first + part.end() for part in _PART.finditer(core))}
                if core.endswith(_POSSESSIVE) and len(core) > 2:
                    ends.add(first + len(core) - 2)
        return sorted(begins), sorted(ends)

    def likeliest(
        self, found: FoundArguments, arguments: Sequence[str], claims: Sequence[str] = ()
    ) -> dict[str, Likely]:
        """What each argument's value may be.

        Args:
            found: what the reader found in the prompt.
            arguments: whose values are asked for.
            claims: arguments whose words are less likely those of another.
        """
        begins, ends = self.words
        if not begins:
            return {}
        first, last = self._tokens(begins), self._tokens([end - 1 for end in ends])
        read = {name: found.spans(name, first, last) for name in dict.fromkeys([*claims, *arguments])}
        begun = torch.tensor(first)[:, None] <= torch.tensor(last)
        settled = dict(read)
        for _ in range(_ROUNDS if len(claims) > 1 else 1):
            for name in read:
                others = [settled[other][0].exp() for other in claims if other != name]
                settled[name] = _without(read[name], others, begun)
        return {name: Likely(self._texts(settled[name][0]), settled[name][1]) for name in arguments}

    def _texts(self, spans: Tensor) -> dict[str, float]:
        begins, ends = self.words
        texts: dict[str, float] = {}
        values, places = spans.flatten().topk(min(2 * _CANDIDATES, spans.numel()))
        for value, place in zip(values.tolist(), places.tolist(), strict=True):
            begin, end = begins[place // len(ends)], ends[place % len(ends)]
            text = self.text[begin:end]
            # Of a token that two words share, either may begin or end there.
            if end > begin and value > float("-inf") and len(text.split()) <= _LONGEST and len(texts) < _CANDIDATES:
                texts.setdefault(text, value)
        return texts

    def _tokens(self, characters: Sequence[int]) -> list[int]:
        """The tokens in which characters stand."""
        return [bisect_right(self.starts, at) - 1 for at in characters]


def _without(read: tuple[Tensor, float], others: Sequence[Tensor], begun: Tensor) -> tuple[Tensor, float]:
    """Log-probabilities of an argument's stretches where those of other arguments lay claim to the words (mean field).

    Args:
        read: of the argument alone, as `FoundArguments.spans` gives it.
        others: probabilities of the same stretches for each of the others.
        begun: whether each beginning lies at or before each end, with shape (begins, ends).
    """
    spans, absent = read
    for other in others:
        # Another value has words of this one unless it ends before it or begins behind it.
        overlap = other.sum(dim=1) @ begun.float() - ((~begun).float() @ other.sum(dim=0))[:, None]
        spans = spans + torch.log1p(-_EXCLUSIVE * overlap.clamp(0.0, 1.0))
    # That the value does not stand there at all is not for other arguments to say.
    absent = min(absent, math.log(_MOST_ABSENT))
    return spans - spans.logsumexp(dim=(0, 1)) + math.log(-math.expm1(absent)), absent


@dataclass(frozen=True)
class _Candidate:
    """A value as tokens, with the blank before it, and its log-probability."""

    tokens: tuple[int, ...]
    likely: float


class CopiedValues:
    """What one request may have of one tool's values, for any number of sequences.

    Args:
        types: arguments that are copied, with their JSON types.
        likely: what their values may be.
        renderer, tokenizer: of the model that writes.
    """

    def __init__(
        self,
        types: Mapping[str, str],
        likely: Mapping[str, Likely],
        renderer: PromptRenderer,
        tokenizer: PreTrainedTokenizerFast,
    ) -> None:
        self._types, self._likely, self._renderer, self.tokenizer = types, likely, renderer, tokenizer
        self.marks = _marks(tokenizer)
        self._made: dict[str, _Value] = {}

    def guide(self) -> "CopyGuide":
        """What goes along with one sequence."""
        return CopyGuide(self)

    def of(self, argument: str) -> "_Value | None":
        """What an argument's value may be, as tokens; None where nothing is known of it."""
        if argument not in self._likely:
            return None
        if argument not in self._made:
            likely, kind = self._likely[argument], self._types[argument]
            own = max(likely.absent + _OWN_WORDS, _LEAST_OWN)
            closing = self.marks.quotes if kind == "string" else self.marks.delimiters
            opening = len(self._renderer.encode_text(' "')) if kind == "string" else 0
            self._made[argument] = _Value(tuple(self._candidates(likely.texts, kind)), own, closing, opening)
        return self._made[argument]

    def _candidates(self, texts: Mapping[str, float], kind: str) -> Iterator[_Candidate]:
        for text, likely in texts.items():
            if kind == "string":
                written = json.dumps(text, ensure_ascii=False)[:-1]  # what closes it may be one token with what follows
            else:
                written = text.strip(_AROUND_NUMBERS).replace(",", "")
                if not _NUMBERS[kind].fullmatch(written):
                    continue
            yield _Candidate(tuple(self._renderer.encode_text(f" {written}")), likely)


@dataclass(frozen=True)
class _Value:
    """What one value may be.

    Attributes:
        own: the log-probability of other words.
        closing: tokens that may come behind it.
        opening: number of tokens before its first word.
    """

    candidates: tuple[_Candidate, ...]
    own: float
    closing: Tensor
    opening: int


class CopyGuide:
    """Follows one sequence, and adds to its logits inside a value."""

    def __init__(self, values: CopiedValues) -> None:
        self._values = values
        self._tokens: list[int] = []
        self._value: _Value | None = None
        # Of its candidates, those that begin as what is written, and how many of their tokens that is.
        self._open: tuple[_Candidate, ...] = ()
        self._written = 0

    def accept(self, token: int) -> None:
        """Take note of the next token."""
        self._tokens.append(token)
        if self._open:
            at = self._written
            self._open = tuple(one for one in self._open if len(one.tokens) > at and one.tokens[at] == token)
            self._written += 1
        elif token in self._values.marks.colons:
            name = _NAMED.search(str(self._values.tokenizer.decode(self._tokens)))
            self._value = self._values.of(json.loads(f'"{name.group(1)}"')) if name else None
            self._open, self._written = self._value.candidates if self._value else (), 0

    def add(self, logits: Tensor) -> None:
        """Add to the logits of the next token, of shape (vocabulary,), in place."""
        if self._value is None or not self._open:
            return
        own = max(self._value.own - _SETTLES * max(0, self._written - self._value.opening), _LEAST_OWN)
        nexts: dict[int, list[float]] = {}
        # What a request gives is hardly ever an empty text.
        complete = [own if self._written != self._value.opening else _LEAST_OWN]
        for one in self._open:
            if len(one.tokens) > self._written:
                nexts.setdefault(one.tokens[self._written], []).append(one.likely)
            else:
                complete.append(one.likely)
        # What is the same for all tokens changes nothing, so only what differs from the model's own words is added.
        closing = self._value.closing
        logits[closing[closing < len(logits)].to(logits.device)] += _WEIGHT * (_summed(complete) - own)
        for token, likely in nexts.items():
            logits[token] += _WEIGHT * (_summed(likely) - own)


def _summed(likely: Sequence[float]) -> float:
    """log Σ exp."""
    return float(torch.tensor(likely).logsumexp(dim=0))


@dataclass(frozen=True)
class _Marks:
    """Tokens that begin with a quote mark, that begin as what stands behind a number, and that end with a colon."""

    quotes: Tensor
    delimiters: Tensor
    colons: frozenset[int]


_MARKS: "weakref.WeakKeyDictionary[PreTrainedTokenizerFast, _Marks]" = weakref.WeakKeyDictionary()


def _marks(tokenizer: PreTrainedTokenizerFast) -> _Marks:
    """Looked up once for each tokenizer."""
    if tokenizer not in _MARKS:
        written = [text or "" for text in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))]
        quotes, delimiters = (
            torch.tensor([n for n, text in enumerate(written) if text.startswith(marks)], dtype=torch.long)
            for marks in (('"',), (",", "}"))
        )
        _MARKS[tokenizer] = _Marks(quotes, delimiters, frozenset(n for n, t in enumerate(written) if t.endswith(":")))
    return _MARKS[tokenizer]
