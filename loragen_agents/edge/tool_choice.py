"""Which tool a request calls for: all names scored in one batch behind `Action:`.

It costs no prompt tokens and gives a probability for every tool, and for calling none. Where weights say little of the
tools, names win that are likely as text; a share of each name's prior (its score behind requests that call for nothing)
can be taken off for that. Knows a decoder and prompts; not how steps are generated.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loragen_agents.edge.decoding import Decoder, ReadPrompt
from loragen_agents.prompting import PromptRenderer, Turn
from loragen_agents.registry import ToolRegistry

NEUTRAL_REQUESTS = ("", "Hello!", "Please help me.")

_YES, _NO, _CALL = " Yes", " No", " Yes\nAction:"


@dataclass(frozen=True)
class ToolProbabilities:
    """calls_tool: probability that a tool is called at all. tools: probability of each tool, given that one is."""

    calls_tool: float
    tools: dict[str, float]

    @property
    def best(self) -> str:
        """The likeliest tool."""
        return max(self.tools, key=self.tools.__getitem__)


class ToolScorer:
    """Scores the tools of one registry with the decoder of its specialised model. Safe to use from several threads.

    prior_weight: the share of a name's prior that is taken off its score. With the generator that ships, none is best
        for real names.
    priors: what `priors` of an earlier scorer of the same specialisation gave; worked out when first needed otherwise.
    """

    def __init__(
        self,
        decoder: Decoder,
        renderer: PromptRenderer,
        registry: ToolRegistry,
        *,
        prior_weight: float = 0.0,
        priors: Sequence[float] | None = None,
    ) -> None:
        self.prior_weight = prior_weight
        self._decoder, self._renderer, self._registry = decoder, renderer, registry
        self._call = renderer.encode_text(_CALL)
        self._yes, self._no = (renderer.encode_text(text)[0] for text in (_YES, _NO))
        # The token behind a name tells "find" from "find_all".
        head = len(self._call)
        self._names = [renderer.encode_text(f"{_CALL} {name}\n")[head:] for name in registry.names]
        self._priors = list(priors) if priors is not None else None

    @property
    def priors(self) -> list[float]:
        """Mean log-probability of each name behind neutral requests, in the registry's order."""
        if self._priors is None:
            scores = torch.tensor(
                [self._scores(self._renderer.user_turn([Turn(request)])) for request in NEUTRAL_REQUESTS]
            )
            self._priors = scores.mean(dim=0).tolist()
        return self._priors

    def __call__(self, prompt: ReadPrompt) -> ToolProbabilities:
        """Probabilities behind a prompt that ends in `THOUGHT_QUESTION`."""
        decision = torch.softmax(prompt.logits[[self._yes, self._no]].float(), dim=0)[0].item()
        scores = torch.tensor(self._scores(prompt.token_ids))
        if self.prior_weight:
            scores -= self.prior_weight * torch.tensor(self.priors)
        shares = torch.softmax(scores, dim=0).tolist()
        return ToolProbabilities(decision, dict(zip(self._registry.names, shares, strict=True)))

    def _scores(self, prompt: Sequence[int]) -> list[float]:
        return self._decoder.score([*prompt, *self._call], self._names)
