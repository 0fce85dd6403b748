"""Which tool a request calls for: by the registry's keys, or by how likely the model finds each tool's name.

It costs no prompt tokens and gives a probability for every tool, and for calling none. Knows a decoder and prompts;
not how steps are generated.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from loragen_agents.adapter.tool_keys import ToolKeys
from loragen_agents.conversation.prompts import PromptRenderer
from loragen_agents.conversation.react import ACTION, NO_TOOL, USE_TOOL, tool_step_head
from loragen_agents.edge.decoding import Decoder, PrefilledPrompt
from loragen_agents.registry import ToolRegistry

_CALL = USE_TOOL + ACTION
# Skip tools more than 9 nats behind the best, even if the whole name were as likely as its first token: each of them
# amounts to at most 1 in 8,000.
_MARGIN = 9.0


@dataclass(frozen=True)
class ToolProbabilities:
    """calls_tool: probability that a tool is called at all. tools: probability of each tool, given that one is."""

    calls_tool: float
    tools: dict[str, float]

    @property
    def best(self) -> str:
        """The likeliest tool."""
        return max(self.tools, key=self.tools.__getitem__)

    @property
    def chosen(self) -> str | None:
        """The likeliest tool where it is likelier that one is called, else None."""
        return self.best if self.calls_tool >= 0.5 else None


@dataclass(eq=False)
class PrefilledRequest:
    """A prompt that was read for scoring.

    Attributes:
        prompt: up to `THOUGHT_QUESTION`.
        called: on to `Action:`.
    """

    prompt: PrefilledPrompt
    called: PrefilledPrompt


class ToolScorer(Protocol):
    """Gives probabilities of the tools of one registry. Safe to use from several threads."""

    def prefill(self, prompt: Sequence[int]) -> PrefilledRequest:
        """Read a prompt that ends in `THOUGHT_QUESTION`, with all that scoring asks of it."""

    def __call__(self, request: PrefilledRequest) -> ToolProbabilities:
        """Probabilities behind a request that `read` gave."""


class KeyScorer:
    """Chooses by the registry's keys: one pass over the prompt with the beginning of a call, and no word of a name.

    Args:
        decoder: of the model whose weights the keys were made beside.
        registry: whose tools are chosen from.
        keys: of these tools, in this order.
    """

    def __init__(self, decoder: Decoder, renderer: PromptRenderer, registry: ToolRegistry, keys: ToolKeys) -> None:
        self._decoder, self._names = decoder, registry.names
        self._keys = keys.to(decoder.model.device)
        self._call = renderer.encode_text(_CALL)

    def prefill(self, prompt: Sequence[int]) -> PrefilledRequest:
        """See `ToolScorer`."""
        return PrefilledRequest(*self._decoder.prefill_parts([prompt, self._call], capture=self._keys.requests.layers))

    @torch.no_grad()
    def __call__(self, request: PrefilledRequest) -> ToolProbabilities:
        """See `ToolScorer`."""
        prompt, called = request.prompt.activations, request.called.activations
        assert prompt is not None and called is not None, "the request was read without its activations"
        logits = self._keys.logits(torch.stack([prompt, called])[None])[0]
        # The likeliest tool against none, whatever the number of tools.
        odds = logits[:-1].max() - logits[-1]
        tools: list[float] = logits[:-1].softmax(dim=0).tolist()
        return ToolProbabilities(odds.sigmoid().item(), dict(zip(self._names, tools, strict=True)))


class NameScorer:
    """Chooses by how likely the model finds each name behind `Action:`, and `Yes` against `No` before it.

    A request mostly takes two passes: the prompt with the beginning of a call, and the step of the tool whose name
    begins most likely. Other names are read where they could still be as likely.
    """

    def __init__(self, decoder: Decoder, renderer: PromptRenderer, registry: ToolRegistry) -> None:
        self._decoder, self._registry = decoder, registry
        self._call = renderer.encode_text(_CALL)
        self._yes, self._no = (renderer.encode_text(text)[0] for text in (USE_TOOL, NO_TOOL))
        self._steps: dict[str, list[int]] = {}
        self._names: list[list[int]] = []
        head = len(self._call)
        for name in registry.names:
            ids, starts = renderer.encode_with_starts(tool_step_head(name))
            self._steps[name] = ids[head:]
            # The token behind a name tells "find" from "find_all".
            behind = len(f"{_CALL} {name}")
            self._names.append([token for token, start in zip(ids, starts, strict=True) if start <= behind][head:])

    def prefill(self, prompt: Sequence[int]) -> PrefilledRequest:
        """See `ToolScorer`."""
        return PrefilledRequest(*self._decoder.prefill_parts([prompt, self._call]))

    @torch.no_grad()
    def __call__(self, request: PrefilledRequest) -> ToolProbabilities:
        """See `ToolScorer`."""
        yes, no = request.prompt.logits[[self._yes, self._no]].float()
        tools: list[float] = self._scores(request).softmax(dim=0).tolist()
        return ToolProbabilities((yes - no).sigmoid().item(), dict(zip(self._registry.names, tools, strict=True)))

    def _scores(self, request: PrefilledRequest) -> torch.Tensor:
        """Log-probabilities of the names; of hopeless ones that of their first token."""
        first = request.called.logits.float().log_softmax(dim=-1).cpu()
        bounds = first[[name[0] for name in self._names]]
        likely = int(bounds.argmax())
        totals = bounds.clone()
        totals[likely] = self._read_name(request, likely)
        within = bounds > totals[likely] - _MARGIN
        within[likely] = False
        if within.any():
            places = within.nonzero().flatten().tolist()
            names = self._decoder.score(request.called, [self._names[place] for place in places])
            totals[places] = torch.tensor(names)
        return totals

    def _read_name(self, request: PrefilledRequest, place: int) -> float:
        """Log-probability of the name at this place. Its step is read to the end: it is likely to be decoded next."""
        tokens = self._names[place]
        step = self._steps[self._registry.names[place]]
        parts = [[token] for token in step[: len(tokens) - 1]] + [step[len(tokens) - 1 :]]
        reads = self._decoder.prefill_parts(parts, behind=request.called)
        before = [request.called, *reads[:-1]]
        scores = torch.stack([read.logits for read in before]).float().log_softmax(dim=-1)
        return scores[range(len(tokens)), tokens].sum().item()
