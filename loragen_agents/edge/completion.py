"""What decoding takes and gives: prompts that were read, and completions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from loragen_agents.edge.kv_cache import History, Snapshot

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Completion:
    """What was generated behind one prompt.

    Attributes:
        text: without stop string, stop token and, for a tool call held to a grammar, the closing `Observation:`.
        token_ids: all generated tokens, those included.
        finish_reason: "stop" (a stop token or string, or the grammar's end), "length" or "cancelled".
        prompt_tokens, cached_tokens: length of the prompt, and how many of its tokens were not read anew.
        first_token_seconds, seconds: until the first token was known, and the last.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    first_token_seconds: float
    seconds: float


@dataclass(frozen=True, eq=False)
class PrefilledPrompt:
    """A prompt that was read: its tokens, their keys and values, and the logits (vocabulary,) of what comes next.

    Decode from it or score behind it as often as you like; nothing of it is read again.
    activations: inputs of `down_proj` at its last token in the layers that were asked for, with shape
        (layers, intermediate size), or None.
    history: the updates that its tokens were read with.
    """

    token_ids: tuple[int, ...]
    states: Snapshot
    logits: Tensor
    cached_tokens: int
    activations: Tensor | None = None
    history: History = ()


def prompt_tokens(prompt: Sequence[int] | PrefilledPrompt) -> Sequence[int]:
    return prompt.token_ids if isinstance(prompt, PrefilledPrompt) else prompt
