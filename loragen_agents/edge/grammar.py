"""The registry as a token-level grammar: what a model may write after `THOUGHT_QUESTION`.

The grammar holds how a step is spelt (the lines of a tool call, the tools' names, each tool's argument schema, or an
answer); what the tools mean is the weights' business. It is written in llguidance's dialect of Lark, where JSON Schema
is understood, and kept up to date token by token by llguidance's matcher. Where only one text can follow, its tokens
are known without asking the model: the decoder appends them unasked, split the way the tokenizer splits plain text.

Knows neither models nor sampling; reading the finished text is `react`'s part, and both must agree on the lines.
"""

import json
import re
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, NoReturn

import llguidance
import llguidance.hf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from loragen_agents.conversation.react import OBSERVATION_STOP
from loragen_agents.errors import GrammarError
from loragen_agents.registry import Tool, ToolRegistry, json_schema
from loragen_agents.registry.arguments import is_free_text

ToolChoice = Literal["auto", "any", "none"] | str

# Written the way `json.dumps(..., ensure_ascii=False)` writes: a model learns one spelling, and the parser's inverse is
# exact. Without \u escapes no half of a surrogate pair can be written.
_JSON_STYLE = {
    "item_separator": ", ",
    "key_separator": ": ",
    "whitespace_flexible": False,
    "json_allowed_escapes": '"\\bfnrt',
}
# Formats that llguidance can hold text to. To JSON Schema a format is a note, so others ("int64", say) are left out.
_FORMATS = frozenset(
    {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown"}
)
_NUMBER_KEYWORDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
# What the grammar of a single csv value has no words for; a text with a pattern is refused too.
_NOT_IN_CSV = ("allOf", "not", "if", "$ref", "$dynamicRef")
_COMBINING = ("allOf", "anyOf", "oneOf", "not", "if", "then", "else", "$ref", "dependentSchemas")
# Line breaks of all kinds and control characters but the tab, which a csv value can't hold. Part of a character class.
_BREAKS = r"\x00-\x08\x0a-\x1f\x7f\x85\u2028\u2029"
_BREAKS_IN_TEXT = re.compile(f"[{_BREAKS}]")


class ToolGrammar:
    """The grammar of one step: ` Yes\\nAction: NAME\\nAction Input: INPUT\\nObservation:` or ` No\\nAI: ANSWER`.

    registry: names and argument schemas; its `input_format` says how an input is written.
    tokenizer: a fast Hugging Face tokenizer; tokens that control the chat can't occur inside the text.
    tool_choice: "auto" (a call or an answer), "any" (a call), "none" (an answer) or the name of the one tool to call.

    A tool call is complete, and the matcher finished, once `Observation:` is written; an answer ends with a stop token.
    Objects whose schema lists properties are held to these, unless it sets `additionalProperties`. Not held to the
    grammar, but to be found by the parser: a number too large for a float (1e999), and in objects without a list of
    properties, a key that comes twice. In csv inputs only a text that comes last can have commas.

    Raises:
        GrammarError: an unknown tool choice, a call asked of an empty registry, or a tool whose schema uses what the
            grammar can't express, named with the tool.
    """

    def __init__(
        self, registry: ToolRegistry, tokenizer: PreTrainedTokenizerFast, tool_choice: ToolChoice = "auto"
    ) -> None:
        self.registry = registry
        self.tokenizer = tokenizer
        self.tool_choice = tool_choice
        self.closing = OBSERVATION_STOP
        self.source = _source(registry, tool_choice)
        self._lock = threading.Lock()
        self._matchers: dict[tuple[int, tuple[int, ...]], llguidance.LLMatcher] = {}

    def matcher(
        self, vocabulary_size: int | None = None, stop_token_ids: Sequence[int] | None = None
    ) -> "GrammarMatcher":
        """A fresh state for one sequence.

        vocabulary_size: width of the model's logits; default: the tokenizer's number of tokens.
        stop_token_ids: tokens that end an answer; default: the tokenizer's eos token.
        """
        # Some tokenizers know tokens that their model has no logits for, and most models the other way round.
        size = max(len(self.tokenizer), vocabulary_size or 0)
        stops = (self.tokenizer.eos_token_id,) if stop_token_ids is None else stop_token_ids
        key = (size, tuple(sorted(stops)))
        with self._lock:
            if key not in self._matchers:
                self._matchers[key] = _checked_matcher(llguidance_tokenizer(self.tokenizer, *key), self.source)
            return GrammarMatcher(self._matchers[key].deep_copy(), llguidance_tokenizer(self.tokenizer, *key))


class GrammarMatcher:
    """Where one sequence stands in a grammar. Not to be shared between threads."""

    def __init__(self, matcher: llguidance.LLMatcher, tokenizer: llguidance.LLTokenizer) -> None:
        self._matcher, self._tokenizer = matcher, tokenizer

    @property
    def finished(self) -> bool:
        """True once nothing can follow: a tool call is complete, or a stop token was accepted."""
        return bool(self._matcher.is_stopped())

    @property
    def may_end(self) -> bool:
        """True where a stop token would be accepted."""
        return bool(self._matcher.is_accepting())

    def mask(self, logits: Tensor) -> Tensor:
        """Set the logits of all tokens that can't follow to minus infinity, in place.

        logits: shape (vocabulary,), of any float dtype, on any device.

        Raises:
            GrammarError: the grammar became too complex for llguidance's limits.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        refused = np.unpackbits(bits, count=len(logits), bitorder="little") == 0
        self._refuse_parts(refused)
        return logits.masked_fill_(torch.from_numpy(refused).to(logits.device), float("-inf"))

    def _refuse_parts(self, refused: np.ndarray) -> None:
        """Refuse tokens that write only a part of the text that must come next, where one can write all of it.

        A text begins with ` "`, one token in all that a model has seen. One that would rather write a number here takes
        the space alone, as it stands before digits, and is then held to texts that begin as no text does.
        """
        sure = self._matcher.compute_ff_bytes()
        ids = [self._tokenizer.tokenize_bytes(sure[:length]) for length in range(1, len(sure))]
        parts = [tokens[0] for tokens in ids if len(tokens) == 1 and not refused[tokens[0]]]
        if parts and np.count_nonzero(~refused) > len(parts):
            refused[parts] = True

    def forced_tokens(self) -> list[int]:
        """The tokens that must come next whatever the model says; empty where there is a choice."""
        return list(self._matcher.compute_ff_tokens())

    def accept(self, token_ids: Iterable[int]) -> None:
        """Move past these tokens.

        Raises:
            GrammarError: the grammar does not allow them here.
        """
        tokens = list(token_ids)
        if not self._matcher.consume_tokens(tokens):
            raise GrammarError(
                f"the grammar does not allow the tokens {tokens} here: {_brief(self._matcher.get_error())}"
            )

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(f"the grammar can't go on: {_brief(self._matcher.get_error())}")


_TOKENIZERS: "weakref.WeakKeyDictionary[Any, dict[tuple[int, tuple[int, ...]], llguidance.LLTokenizer]]" = (
    weakref.WeakKeyDictionary()
)
_TOKENIZERS_LOCK = threading.Lock()


def llguidance_tokenizer(
    tokenizer: PreTrainedTokenizerFast, vocabulary_size: int, stop_token_ids: tuple[int, ...]
) -> llguidance.LLTokenizer:
    """llguidance's view of a tokenizer, built once for each (it takes about a second) and kept while the tokenizer is.

    Raises:
        GrammarError: the tokenizer is not a fast one.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise GrammarError(
            f"{type(tokenizer).__name__} is not a fast tokenizer; use a model with a tokenizer.json to hold it to a "
            "grammar"
        )
    key = (vocabulary_size, stop_token_ids)
    with _TOKENIZERS_LOCK:
        known = _TOKENIZERS.setdefault(tokenizer, {})
        if key not in known:
            known[key] = llguidance.hf.from_tokenizer(
                tokenizer, n_vocab=vocabulary_size, eos_token=list(stop_token_ids)
            )
        return known[key]


def _checked_matcher(tokenizer: llguidance.LLTokenizer, source: str) -> llguidance.LLMatcher:
    matcher = llguidance.LLMatcher(tokenizer, source, log_level=0)
    if matcher.is_error():
        raise GrammarError(f"the grammar can't be built: {_brief(matcher.get_error())}")
    return matcher


def _brief(message: str) -> str:
    """llguidance's message on one line, without its listing of the grammar."""
    lines = [line.strip() for line in message.splitlines()]
    return " ".join(line for line in lines if line and not re.match(r"\d+ \||\^+$", line))


@lru_cache(maxsize=32)
def _source(registry: ToolRegistry, tool_choice: ToolChoice) -> str:
    """The grammar's source; cached, since a registry's schemas are compiled one by one to be checked."""
    if tool_choice == "none":
        tools: tuple[Tool, ...] = ()
    elif tool_choice in ("auto", "any"):
        tools = registry.tools
    elif tool_choice in registry:
        tools = (registry[tool_choice],)
    else:
        raise GrammarError(
            f"unknown tool choice {tool_choice!r}: expected 'auto', 'any', 'none' or one of "
            f"{', '.join(registry.names) or 'no tools'}"
        )
    if tool_choice == "any" and not tools:
        raise GrammarError("tool choice 'any' asks for a call, but the registry has no tools; give it some, or 'auto'")
    rules: list[str] = []
    names: list[str] = []
    for number, tool in enumerate(tools):
        own = _tool_rules(tool, f"t{number}", registry.input_format)
        _check_tool(tool, own, f"t{number}")
        rules += own
        names.append(f"t{number}")
    starts = []
    if tools:
        starts.append("call")
        rules += [
            f"call: {_literal(f' Yes{chr(10)}Action: ')} tool {_literal(OBSERVATION_STOP)}",
            "tool: " + " | ".join(names),
        ]
    if tool_choice in ("auto", "none"):
        starts.append("answer")
        # An answer begins with something to see; what follows is free, line breaks included.
        rules += [f"answer: {_literal(f' No{chr(10)}AI: ')} ANSWER", r"ANSWER: /\S(?s:.)*/"]
    return "\n".join(["%llguidance {}", "start: " + " | ".join(starts), *rules]) + "\n"


def _check_tool(tool: Tool, rules: list[str], start: str) -> None:
    """Compile one tool's rules without a tokenizer, so that an error is known to be this tool's."""
    source = "\n".join(["%llguidance {}", f"start: {start}", *rules])
    message = llguidance.LLMatcher.validate_grammar(llguidance.LLMatcher.grammar_from_lark(source))
    if message:
        brief = _brief(message)
        _refuse(tool, brief.partition("JSON schema: ")[2] or brief)


def _refuse(tool: Tool, cause: str) -> NoReturn:
    raise GrammarError(
        f"tool {tool.name!r}: the grammar can't hold its arguments: {cause}; simplify the schema, or decode without a "
        "grammar"
    )


def _tool_rules(tool: Tool, rule: str, input_format: str) -> list[str]:
    """Lark rules for `NAME\\nAction Input: INPUT` of one tool; `rule` is their top and the beginning of their names."""
    head = f"{rule}: {_literal(f'{tool.name}{chr(10)}Action Input: ')} {rule}_input"
    if input_format == "csv":
        return [head, *_csv_rules(tool, rule)]
    return [head, f"{rule}_input: {_json_rule(_closed(tool.parameters))}"]


def _json_rule(schema: Mapping[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": _JSON_STYLE})


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _closed(schema: Any, *, combined: bool = False) -> Any:
    """`schema` with its objects held to the properties they list, and without formats that are mere notes.

    combined: the schema is one of several that speak of the same object, none of which lists all its properties.
    """
    if not isinstance(schema, Mapping):
        return schema
    result: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "format" and value not in _FORMATS:
            continue
        if key in ("properties", "patternProperties", "$defs", "definitions") and isinstance(value, Mapping):
            result[key] = {name: _closed(inner) for name, inner in value.items()}
        elif key in ("items", "additionalProperties", "contains"):
            result[key] = _closed(value)
        elif key == "prefixItems":
            result[key] = [_closed(inner) for inner in value]
        elif key in ("allOf", "anyOf", "oneOf"):
            shared = combined or key == "allOf" or "properties" in schema
            result[key] = [_closed(inner, combined=shared) for inner in value]
        else:
            result[key] = value
    combined = combined or any(key in schema for key in _COMBINING)
    if "properties" in schema and "patternProperties" not in schema and not combined:
        result.setdefault("additionalProperties", False)
    return result


def _csv_rules(tool: Tool, rule: str) -> Iterator[str]:
    names = tool.argument_names
    schemas = [tool.parameters["properties"][name] for name in names]
    for place, name in enumerate(names):
        # A text keeps its commas where nothing can follow it: a lexer could not tell where else it ends.
        commas = place == len(names) - 1 and is_free_text(tool, name)
        yield from _csv_value_rules(tool, name, schemas[place], f"{rule}_{place}", commas)
    fewest = max((place + 1 for place, name in enumerate(names) if name in tool.required), default=0)
    counts = range(fewest, len(names) + 1)
    lines = [' ", " '.join(f"{rule}_{place}" for place in range(count)) or '""' for count in counts]
    yield f"{rule}_input: " + " | ".join(lines)


def _csv_value_rules(tool: Tool, argument: str, schema: Any, rule: str, commas: bool) -> Iterator[str]:
    """Rules for one value of a csv input: a constant, a number, true, false, null, or text without a line break."""
    choices: list[str] = []
    for number, plain in enumerate(_plain_schemas(tool, argument, schema)):
        values = json_schema.constants(plain)
        if values is not None:
            texts = [value if isinstance(value, str) else json.dumps(value) for value in values if _is_scalar(value)]
            choices += [_literal(text) for text in texts if _fits_csv(text)]
            continue
        kinds = json_schema.admitted_types(plain, tool.parameters)
        numeric = {key: plain[key] for key in _NUMBER_KEYWORDS if key in plain}
        if "number" in kinds:
            choices.append(_json_rule({"type": "number", **numeric}))
        elif "integer" in kinds:
            choices.append(_json_rule({"type": "integer", **numeric}))
        choices += [_literal(word) for word in ("true", "false") if "boolean" in kinds]
        choices += [_literal("null")] * ("null" in kinds)
        if "string" in kinds:
            if "pattern" in plain:
                _refuse(tool, f"the argument {argument!r} has a pattern, which csv inputs can't be held to")
            terminal = f"{rule.upper()}_TEXT{number}"
            yield f"{terminal}: {_text_regex(plain, commas)}"
            choices.append(terminal)
    if not choices:
        _refuse(tool, f"the argument {argument!r} admits no value that csv can hold")
    yield f"{rule}: " + " | ".join(dict.fromkeys(choices))


def _plain_schemas(tool: Tool, argument: str, schema: Any) -> Iterator[Mapping[str, Any]]:
    """The alternatives of a schema, each without anyOf and oneOf."""
    if schema is True:
        schema = {}
    if not isinstance(schema, Mapping):  # the schema `false`: nothing is admitted
        return
    for keyword in _NOT_IN_CSV:
        if keyword in schema:
            _refuse(tool, f"the argument {argument!r} uses {keyword!r}, which csv inputs can't be held to")
    for keyword in ("anyOf", "oneOf"):
        if keyword in schema:
            around = {key: value for key, value in schema.items() if key != keyword}
            for option in schema[keyword]:
                if isinstance(option, Mapping):
                    yield from _plain_schemas(tool, argument, {**around, **option})
                elif option is True:
                    yield from _plain_schemas(tool, argument, around)
            return
    yield schema


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str | bool | int | float | None)


def _fits_csv(text: str) -> bool:
    return bool(text) and text == text.strip() and "," not in text and not _BREAKS_IN_TEXT.search(text)


def _text_regex(schema: Mapping[str, Any], commas: bool) -> str:
    """A value begins and ends with something to see that is no comma, since the parser strips blanks around commas.

    It does not begin with a brace: a model that was trained on both formats would slip into JSON there.
    """
    inner = "" if commas else ","
    regex = rf"/[^\s,{{{_BREAKS}]([^{inner}{_BREAKS}]*[^\s,{_BREAKS}])?/"
    if "minLength" in schema or "maxLength" in schema:
        regex += f" & /(?s:.){{{schema.get('minLength', 0)},{schema.get('maxLength', '')}}}/"
    return regex
