"""Makes it less likely that an answer behind a tool's report says that no tool serves.

Whether a tool serves is decided before, by the tool head; the answer only says so. Where a tool has just reported, a
small model is at times of two minds whether to tell what came or to excuse itself, and rounding tips it over. Knows
tokens and the wording of excuses; no models.
"""

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerFast

from loragen_agents.conversation.prompts import PromptRenderer
from loragen_agents.conversation.react import ANSWER
from loragen_agents.conversation.turns import Turn

# How the answers begin that training has for requests that no tool serves, up to where those behind a report differ.
_OPENINGS = (
    *("I'm sorry", "I'm afraid", "I can't", "I have no", "I don't have", "I'd like", "That is outside", "That isn't"),
    *("Sorry, I can't", "Sorry, that needs", "None of", "Unfortunately", "There is no", "My tools"),
)
# In nats. An excuse that the model is sure of, as for the second half of a request, stays.
_LESS_LIKELY = 2.0


class Excuses:
    """What goes along with answers, for any number of sequences.

    Args:
        renderer, tokenizer: of the model that writes.
    """

    def __init__(self, renderer: PromptRenderer, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        opened = len(renderer.encode_text(ANSWER))
        self._openings = [tuple(renderer.encode_text(f"{ANSWER} {text}")[opened:]) for text in _OPENINGS]

    def guide(self) -> "ExcuseGuide":
        """What goes along with one sequence."""
        return ExcuseGuide(self._openings, self._tokenizer)


class ExcuseGuide:
    """Follows one sequence up to where its answer is no excuse any more.

    Args:
        openings: how excuses begin, as tokens.
        tokenizer: of the model that writes.
    """

    def __init__(self, openings: Sequence[tuple[int, ...]], tokenizer: PreTrainedTokenizerFast) -> None:
        self._openings, self._tokenizer = openings, tokenizer
        self._tokens: list[int] = []
        # Where the answer begins.
        self._begin: int | None = None

    def accept(self, token: int) -> None:
        """Take note of the next token."""
        self._tokens.append(token)
        if self._begin is None and str(self._tokenizer.decode(self._tokens)).endswith(ANSWER):
            self._begin = len(self._tokens)

    def add(self, logits: Tensor) -> None:
        """Lower the logits of the tokens, of shape (vocabulary,), that would make the answer an excuse, in place."""
        if self._begin is None:
            return
        written = tuple(self._tokens[self._begin :])
        for token in {opening[-1] for opening in self._openings if opening[:-1] == written}:
            logits[token] -= _LESS_LIKELY


def reported(turns: Sequence[Turn]) -> bool:
    """Whether a tool has reported since the last request."""
    return bool(turns[-1].steps)
