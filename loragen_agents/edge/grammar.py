"""The registry as a token-level grammar: what a model may write after `THOUGHT_QUESTION`.

The grammar holds how a step is spelt; what the tools mean is the weights' business. `grammar_source` writes it,
llguidance's matcher follows it token by token. Where only one text can come next, its tokens are known without asking
the model: the decoder appends them, split the way the tokenizer splits plain text.

Knows neither models nor sampling. Reading the finished text, and checking it against a tool's own schema, is `react`'s
part.
"""

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import llguidance
import llguidance.hf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from loragen_agents.conversation.react import OBSERVATION_STOP
from loragen_agents.conversation.renderers import shared_renderer
from loragen_agents.edge.grammar_source import ToolChoice, grammar_source
from loragen_agents.edge.held_schemas import brief
from loragen_agents.errors import GrammarError
from loragen_agents.registry import ToolRegistry

__all__ = ["GrammarMatcher", "ToolChoice", "ToolGrammar", "llguidance_tokenizer"]


class ToolGrammar:
    """The grammar of one step: ` Yes\\nAction: NAME\\nAction Input: INPUT\\nObservation:` or ` No\\nAI: ANSWER`.

    A tool call is complete, and the matcher finished, once `Observation:` is written; an answer ends with a stop token.
    Objects whose schema lists properties are held to these, unless it sets `additionalProperties`. What a schema asks
    beyond the grammar (`uniqueItems` or `not`, say; a number too large for a float; a key that comes twice) is left for
    the parser to find. In csv inputs only a text that comes last can have commas.

    Args:
        registry: names and argument schemas; its `input_format` says how an input is written.
        tokenizer: a fast Hugging Face tokenizer. Tokens that control the chat can't occur inside the text; where their
            spelling belongs to a name or a constant, it is written in plain tokens.
        tool_choice: "auto" (a call or an answer), "any" (a call), "none" (an answer) or the name of the tool to call.

    Raises:
        GrammarError: an unknown tool choice, a call asked of an empty registry, or a tool that no call can be right
            for, named with its argument.
    """

    def __init__(
        self, registry: ToolRegistry, tokenizer: PreTrainedTokenizerFast, tool_choice: ToolChoice = "auto"
    ) -> None:
        self.registry = registry
        self.tokenizer = tokenizer
        self.tool_choice = tool_choice
        self.closing = OBSERVATION_STOP
        self.source = grammar_source(registry, tool_choice)
        self._lock = threading.Lock()
        self._matchers: dict[tuple[int, tuple[int, ...]], llguidance.LLMatcher] = {}

    def matcher(
        self, vocabulary_size: int | None = None, stop_token_ids: Sequence[int] | None = None
    ) -> "GrammarMatcher":
        """A fresh state for one sequence.

        Args:
            vocabulary_size: width of the model's logits; by default the tokenizer's number of tokens.
            stop_token_ids: tokens that end an answer; by default the tokenizer's eos token.

        Raises:
            GrammarError: llguidance can't build the grammar, or the tokenizer is not a fast one.
        """
        # Some tokenizers know tokens that their model has no logits for, and most models the other way round.
        size = max(len(self.tokenizer), vocabulary_size or 0)
        stops = (self.tokenizer.eos_token_id,) if stop_token_ids is None else stop_token_ids
        key = (size, tuple(sorted(stops)))
        with self._lock:
            if key not in self._matchers:
                self._matchers[key] = _checked_matcher(llguidance_tokenizer(self.tokenizer, *key), self.source)
            matcher = self._matchers[key].deep_copy()
        return GrammarMatcher(matcher, llguidance_tokenizer(self.tokenizer, *key), self._plain_tokens)

    def _plain_tokens(self, text: str) -> list[int]:
        return shared_renderer(self.tokenizer).encode_text(text)


class GrammarMatcher:
    """Where one sequence stands in a grammar. Not to be shared between threads.

    Args:
        matcher: llguidance's own state.
        tokenizer: llguidance's view of the tokenizer.
        plain_tokens: splits text into tokens none of which controls the chat.
    """

    def __init__(
        self,
        matcher: llguidance.LLMatcher,
        tokenizer: llguidance.LLTokenizer,
        plain_tokens: Callable[[str], list[int]],
    ) -> None:
        self._matcher, self._tokenizer, self._plain_tokens = matcher, tokenizer, plain_tokens

    @property
    def finished(self) -> bool:
        """True once nothing can follow: a tool call is complete, or a stop token was accepted."""
        return bool(self._matcher.is_stopped())

    def mask(self, logits: Tensor) -> Tensor:
        """Set the logits of all tokens that can't follow to minus infinity, in place.

        Args:
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
        """Refuse tokens that write only the beginning of the text that must come next, where one can write all of it.

        String values begin with ` "`, which is one token. A model that would rather write a number takes the bare
        space, as it stands before digits; the string that has to follow would then begin as in no training text.
        """
        sure = self._matcher.compute_ff_bytes()
        ids = [self._tokenizer.tokenize_bytes(sure[:length]) for length in range(1, len(sure))]
        parts = [tokens[0] for tokens in ids if len(tokens) == 1 and not refused[tokens[0]]]
        if parts and np.count_nonzero(~refused) > len(parts):
            refused[parts] = True

    def forced_tokens(self) -> list[int]:
        """The tokens that must come next whatever the model says; empty where there is a choice."""
        tokens = list(self._matcher.compute_ff_tokens())
        if any(map(self._tokenizer.is_special_token, tokens)):
            # llguidance takes the spelling of a control token (in a tool's name, say) for the token itself.
            spelt = self._tokenizer.decode_bytes(tokens)
            if self._matcher.compute_ff_bytes().startswith(spelt):
                return self._plain_tokens(spelt.decode(errors="ignore"))
        return tokens

    def accept(self, token_ids: Iterable[int]) -> None:
        """Move past these tokens.

        Raises:
            GrammarError: the grammar does not allow them here.
        """
        tokens = list(token_ids)
        if not self._matcher.consume_tokens(tokens):
            raise GrammarError(
                f"the grammar does not allow the tokens {tokens} here: {brief(self._matcher.get_error())}"
            )

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(f"the grammar can't go on: {brief(self._matcher.get_error())}")


_TOKENIZERS: "weakref.WeakKeyDictionary[Any, dict[tuple[int, tuple[int, ...]], llguidance.LLTokenizer]]" = (
    weakref.WeakKeyDictionary()
)
_TOKENIZERS_LOCK = threading.Lock()


def llguidance_tokenizer(
    tokenizer: PreTrainedTokenizerFast, vocabulary_size: int, stop_token_ids: tuple[int, ...]
) -> llguidance.LLTokenizer:
    """llguidance's view of a tokenizer, built once for each (it takes about a second) and kept while the tokenizer is.

    Args:
        tokenizer: the tokenizer, which has to be a fast one.
        vocabulary_size: width of the model's logits.
        stop_token_ids: tokens that end a text, in ascending order.

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
        raise GrammarError(f"the grammar can't be built: {brief(matcher.get_error())}")
    return matcher
