"""Which tool a request calls for: names are scored behind `Action:`, and the tools are matched by state.

It costs no prompt tokens and gives a probability for every tool, and for calling none. What a request looks like inside
the model (see `ToolMatch`) and what the model would write are two witnesses; how much each counts is in
`ChoiceWeights`. Knows a decoder and prompts; not how steps are generated.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loragen_agents.adapter.tool_match import ToolMatch
from loragen_agents.conversation.prompts import PromptRenderer, Turn
from loragen_agents.conversation.react import ACTION, NO_TOOL, USE_TOOL, tool_step_head
from loragen_agents.edge.decoding import Decoder, ReadPrompt
from loragen_agents.registry import ToolRegistry

NEUTRAL_REQUESTS = ("", "Hello!", "Please help me.")

_CALL = USE_TOOL + ACTION
# Tools whose names, were they as likely as their first tokens, would still be less likely than the best by so many nats
# are not read to the end: at most 1 in 8,000 is what each of them can amount to.
_MARGIN = 9.0


@dataclass(frozen=True)
class ChoiceWeights:
    """How much each part of the choice counts. Those that are the default were chosen on the dev set.

    prior: share of a name's prior (its score behind requests that call for nothing) that is taken off its score, for
        names win that are likely as text.
    match: of the log-probabilities that the state match gives at `Action:`, and where a tool is decided on, both added
        to those of the names. Names are told apart by domain first; tools of one domain, such as flights with and
        without a way back, better by the match.
    decision: share of the state match's log-odds, for some tool against none, in the decision whether a request calls
        for a tool; the rest is what the model would write, `Yes` or `No`. Pieces in the weights can only say how much a
        request is like all tools together, the match how much it is like one of them. Once a step was taken, what the
        model would write decides alone.
    floor: logit of the likeliest tool, in the match at `Action:`, that speaks neither for a call nor against it; what
        it has above, or lacks, is added to the match's log-odds of the decision. Not with a single tool.
    bias: added to the log-odds of a request; above 0, tools are called more readily.
    """

    prior: float = 0.0
    match: float = 1.0
    decision: float = 1.0
    floor: float = 4.0
    bias: float = 0.0


NAMES_ALONE = ChoiceWeights(match=0.0, decision=0.0, bias=0.0)


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
class ReadRequest:
    """A prompt that was read for scoring.

    prompt: up to `THOUGHT_QUESTION`. called: on to `Action:`.
    """

    prompt: ReadPrompt
    called: ReadPrompt


class ToolScorer:
    """Scores the tools of one registry with the decoder of its specialised model. Safe to use from several threads.

    A request mostly takes two passes: the prompt with the beginning of a call, and the step of the tool whose name
    begins most likely. Other names are read where they could still be as likely.

    match: of the same specialisation; without it, what the model would write decides alone.
    priors: what `priors` of an earlier scorer of the same specialisation gave; worked out when first needed otherwise.
    """

    def __init__(
        self,
        decoder: Decoder,
        renderer: PromptRenderer,
        registry: ToolRegistry,
        match: ToolMatch | None = None,
        *,
        weights: ChoiceWeights | None = None,
        priors: Sequence[float] | None = None,
    ) -> None:
        self.weights = weights or ChoiceWeights()
        self._decoder, self._renderer, self._registry = decoder, renderer, registry
        self._match = None if match is None else match.to(decoder.model.device)
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
        self._priors = list(priors) if priors is not None else None

    @property
    def priors(self) -> list[float]:
        """Mean log-probability of each name behind neutral requests, in the registry's order."""
        if self._priors is None:
            prompts = [self._renderer.user_turn([Turn(request)]) for request in NEUTRAL_REQUESTS]
            scores = [self._decoder.score([*prompt, *self._call], self._names) for prompt in prompts]
            self._priors = torch.tensor(scores).mean(dim=0).tolist()
        return self._priors

    def read(self, prompt: Sequence[int]) -> ReadRequest:
        """Read a prompt that ends in `THOUGHT_QUESTION`, with all that scoring asks of it."""
        return ReadRequest(*self._decoder.read_parts([prompt, self._call], capture=self._captured))

    @torch.no_grad()
    def __call__(self, request: ReadRequest, *, opening: bool = True) -> ToolProbabilities:
        """Probabilities behind a request that `read` gave.

        opening: whether no step was taken in the open turn yet.
        """
        prompt, called, weights = request.prompt, request.called, self.weights
        yes_no = prompt.logits[[self._yes, self._no]].float()
        odds = (yes_no[0] - yes_no[1]).item()
        scores = torch.zeros(len(self._registry))
        if weights.prior:
            scores -= weights.prior * torch.tensor(self.priors)
        if self._match is not None and called.activations is not None:
            named = self._match.choose(called.activations[:, None])[0]
            scores += weights.match * named.log_softmax(dim=0).cpu()
            if opening and prompt.activations is not None:
                decided = self._match.decide(prompt.activations[:, None])[0]
                scores += weights.match * decided[:-1].log_softmax(dim=0).cpu()
                matched = (decided[:-1].logsumexp(dim=0) - decided[-1]).item()
                # A single tool's key has nothing taken off, and its logits are on another scale.
                if len(self._registry) > 1:
                    matched += named.max().item() - weights.floor
                odds += weights.decision * (matched - odds) + weights.bias
        tools: list[float] = self._with_names(request, scores).softmax(dim=0).tolist()
        return ToolProbabilities(
            torch.tensor(odds).sigmoid().item(), dict(zip(self._registry.names, tools, strict=True))
        )

    def _with_names(self, request: ReadRequest, scores: torch.Tensor) -> torch.Tensor:
        """Scores with the log-probabilities of the names added, of hopeless ones with that of their first token."""
        first = request.called.logits.float().log_softmax(dim=-1).cpu()
        bounds = scores + first[[name[0] for name in self._names]]
        likely = int(bounds.argmax())
        totals = bounds.clone()
        totals[likely] = scores[likely] + self._read_name(request, likely)
        within = bounds > totals[likely] - _MARGIN
        within[likely] = False
        if within.any():
            places = within.nonzero().flatten().tolist()
            names = self._decoder.score(request.called, [self._names[place] for place in places])
            totals[places] = scores[places] + torch.tensor(names)
        return totals

    def _read_name(self, request: ReadRequest, place: int) -> float:
        """Log-probability of the name at this place. Its step is read to the end: it is likely to be decoded next."""
        tokens = self._names[place]
        step = self._steps[self._registry.names[place]]
        parts = [[token] for token in step[: len(tokens) - 1]] + [step[len(tokens) - 1 :]]
        reads = self._decoder.read_parts(parts, behind=request.called)
        before = [request.called, *reads[:-1]]
        scores = torch.stack([read.logits for read in before]).float().log_softmax(dim=-1)
        return scores[range(len(tokens)), tokens].sum().item()

    @property
    def _captured(self) -> tuple[int, ...]:
        return self._match.layers if self._match is not None else ()
