"""How the next token is chosen from logits, and when generation stops. Knows nothing of models or grammars."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Candidates that are looked at first for top-p; nearly always they hold enough of the probability.
_LIKELY = 256


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when to stop.

    Args:
        max_tokens: most tokens to generate, forced ones included.
        temperature: 0 takes the likeliest token.
        top_p: sample from the fewest tokens that hold this probability; 1.0 is all.
        top_k: sample from at most so many tokens; 0 is all.
        seed: makes sampling reproducible; each sequence of a batch then draws as if it were alone.
        stop: texts at which generation ends; they are not part of the result.

    Raises:
        ValueError: a value of the wrong kind or outside its range.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not _is_whole(self.max_tokens) or self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens!r}; expected a whole number of at least 1")
        if not _is_number(self.temperature) or self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature!r}; expected a finite number, 0 or more")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p!r}; expected a number of more than 0 and at most 1")
        if not _is_whole(self.top_k) or self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k!r}; expected a whole number, 0 (off) or more")
        if self.seed is not None and not (_is_whole(self.seed) and -(2**63) <= self.seed < 2**64):
            raise ValueError(f"seed is {self.seed!r}; expected a whole number from -2**63 to 2**64 - 1, or None")
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop is {self.stop!r}; expected a tuple of texts, none of them empty")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def pick(scores: Tensor, sampling: Sampling, generator: torch.Generator | None) -> int:
    """Choose a token by float32 scores of shape (vocabulary,); minus infinity rules one out."""
    if sampling.temperature == 0:
        return int(scores.argmax())
    scores = scores.cpu() / sampling.temperature
    if sampling.top_k or sampling.top_p < 1:
        width = min(sampling.top_k or _LIKELY, len(scores))
        best, places = scores.topk(width)
        whole = best if sampling.top_k else scores
        shares = (best - whole.logsumexp(dim=-1)).exp()
        if not sampling.top_k and shares.sum() < sampling.top_p:
            best, places = scores.sort(descending=True, stable=True)
            shares = best.softmax(dim=-1)
        # A token is among the fewest that hold top_p if those before it do not hold it yet.
        likely = shares.cumsum(dim=-1) - shares < sampling.top_p
        return int(places[torch.multinomial(shares * likely, 1, generator=generator)])
    return int(torch.multinomial(scores.softmax(dim=-1), 1, generator=generator))
