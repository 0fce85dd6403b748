"""The generator in training: episodes in, a loss and the rates of right parts out.

A registry is turned into LoRA weights once and serves all of its episode's requests; gradients go through the frozen
edge LM into what made the weights. Most target tokens copy arguments, so the parts of a step (decision, name,
arguments, answer) are averaged and weighted apart. Knows models and losses, but not where episodes come from.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loragen_agents.adapter.lora_weights import LoRAWeights
from loragen_agents.adapter.tool_match import ToolMatch
from loragen_agents.adapter.unmerged import apply_lora
from loragen_agents.conversation.prompts import PromptRenderer
from loragen_agents.data.episodes import Episode, Part
from loragen_agents.generator import LoRAGenerator
from loragen_agents.generator.tool_reading import capture_down_proj_inputs, down_proj_inputs
from loragen_agents.registry import ToolRegistry
from loragen_agents.training.batches import PARTS, TokenizedSample, tokenize_sample
from loragen_agents.training.given_tool import GivenEpisode, GivenToolLoss
from loragen_agents.training.packing import Batch, batches
from loragen_agents.training.rates import Rates

PromptKind = Literal["user_turn", "full_react"]

# Below this many tokens a part's mean is too noisy to weigh as much as that of a full episode.
_FULL_WEIGHT_TOKENS = 20
_DEFAULT_WEIGHTS: dict[Part, float] = {"decision": 0.5, "format": 0.2, "name": 1.0, "arguments": 1.0, "answer": 0.15}


@dataclass(frozen=True)
class TokenizedEpisode:
    """A registry and its requests as token ids; plain data, so that worker processes can make it."""

    registry: ToolRegistry
    samples: tuple[TokenizedSample, ...]


def tokenize_episode(
    renderer: PromptRenderer, episode: Episode, prompt: PromptKind = "user_turn", max_tokens: int = 2048
) -> TokenizedEpisode:
    """Tokenise an episode; samples longer than `max_tokens` are left out.

    Args:
        prompt: "user_turn" is what the specialised model sees, "full_react" the baselines' prompt with definitions.
    """
    samples = (tokenize_sample(renderer, episode, sample, prompt == "full_react") for sample in episode.samples)
    return TokenizedEpisode(episode.registry, tuple(s for s in samples if len(s.input_ids) <= max_tokens))


@dataclass(frozen=True)
class _Counts:
    """What the losses of an episode are averaged over: target tokens by part, calls, opening samples; and its tools."""

    tokens: list[int]
    calls: int
    openings: int
    tools: int

    @classmethod
    def of(cls, episode: TokenizedEpisode) -> "_Counts":
        samples = episode.samples
        tokens = torch.bincount(torch.tensor([p for s in samples for p in s.parts]), minlength=len(PARTS)).tolist()
        calls = sum(sample.choice is not None for sample in samples)
        return cls(tokens, calls, sum(sample.opening for sample in samples), len(episode.registry))


# A place for each sample, or None to leave it out -> the memory's activations there.
_ActivationsAt = Callable[[Sequence[int | None]], Tensor]


class EpisodeModel(nn.Module):
    """Loss of a generator on episodes: L_LM by parts, plus Eq. 9, plus the memory's matches (paper Eq. 10).

    Args:
        generator: what is trained; its language models stay frozen.
        weights: of the parts of a step.
        given_weight: of the arguments' mean cross entropy in steps with the tool given.
        match_weight: of the cross entropy of the memory's matches over the registry's tools, and over these and none.
        first_layer: LoRA weights of layers below are left out, which saves the way back through them.
        batch_tokens: rows of similar length are run together up to this many tokens with padding.
    """

    def __init__(
        self,
        generator: LoRAGenerator,
        renderer: PromptRenderer,
        *,
        weights: Mapping[Part, float] | None = None,
        match_weight: float = 0.5,
        given_weight: float = 1.5,
        first_layer: int = 0,
        batch_tokens: int = 1024,
    ) -> None:
        super().__init__()
        self.generator = generator
        self.weights = {**_DEFAULT_WEIGHTS, **(weights or {})}
        self.match_weight, self.given_weight = match_weight, given_weight
        self.first_layer, self.batch_tokens = first_layer, batch_tokens
        # In tuples, so that neither is taken for a submodule of this one.
        self._edge, self._renderer = (generator.edge.model,), (renderer,)
        self.rates = Rates()

    def forward(self, episodes: Sequence[TokenizedEpisode | GivenEpisode]) -> Tensor:
        """Mean loss of the whole episodes, plus that of the steps with the tool given; rates are counted in `rates`."""
        kept = [episode for episode in episodes if episode.samples]
        if not kept:
            return torch.stack([p.sum() for p in self.generator.parameters() if p.requires_grad]).sum() * 0
        reads = self.generator.config.uses_cloud
        prompts = [self._renderer[0].definitions(episode.registry) if reads else "" for episode in kept]
        made = self.generator(prompts)
        loss, weights = made.load_loss, [self._trained(w) for w in made.weights]
        whole = [
            self._episode(episode, beside)
            for episode, beside in zip(kept, weights, strict=True)
            if isinstance(episode, TokenizedEpisode)
        ]
        if whole:
            loss = loss + torch.stack(whole).mean()
        given = [(e, beside) for e, beside in zip(kept, weights, strict=True) if isinstance(e, GivenEpisode)]
        if given:
            of_given = GivenToolLoss(self.generator.tool_memory, self._edge[0], self.rates, self.batch_tokens)
            own, beside = [e for e, _ in given], [beside for _, beside in given]
            loss = loss + self.given_weight * of_given(own, beside, shared=not reads)
        return loss

    @torch.no_grad()
    def set_background(self, episodes: Sequence[TokenizedEpisode]) -> None:
        """Set the tool memory's background from data, before the first step; nothing without a tool memory."""
        writer = self.generator.tool_memory
        if writer is None:
            return
        activations, readings = [], []
        for episode in episodes:
            beside = self._trained(self.generator.generate(self._renderer[0].definitions(episode.registry)))
            readings += writer.read(episode.registry, beside)
            for batch in self._batches(episode.samples, share=False):
                kept = torch.zeros_like(batch.ids, dtype=torch.bool)
                for row, index in enumerate(batch.rows):
                    kept[row, 1 : len(episode.samples[index].input_ids)] = True
                activations.append(capture_down_proj_inputs(self._edge[0], writer.memory.layers, batch.ids)[:, kept])
        writer.memory.set_background(readings, torch.cat(activations, dim=1))

    def _trained(self, weights: LoRAWeights) -> LoRAWeights:
        tensors = {entry: pair for entry, pair in weights.tensors.items() if entry[0] >= self.first_layer}
        return replace(weights, tensors=tensors)

    def _episode(self, episode: TokenizedEpisode, weights: LoRAWeights) -> Tensor:
        """Loss of a whole episode: its registry is in the weights, and all of its samples are run."""
        writer = self.generator.tool_memory
        match: ToolMatch | None = None
        if writer is not None and episode.registry:
            updates, match = writer(episode.registry, weights)
            weights = weights.concatenate(updates)
        counts = _Counts.of(episode)
        loss = torch.zeros((), device=self._edge[0].device)
        with apply_lora(self._edge[0], weights):
            for batch in self._batches(episode.samples):
                chunk = [episode.samples[index] for index in batch.rows]
                entropy, right, parts, at = self._run(batch, chunk)
                loss = loss + self._text_loss(entropy, parts, counts)
                self._count(chunk, right, parts)
                if match is not None:
                    loss = loss + self.match_weight * self._choice_loss(match, chunk, at, counts)
                    loss = loss + self.match_weight * self._decision_loss(match, chunk, at, counts)
        return loss

    def _text_loss(self, entropy: Tensor, parts: Tensor, counts: "_Counts") -> Tensor:
        """The share of some target tokens in L_LM: each part of a step is averaged over the episode, then weighted."""
        loss = entropy.new_zeros(())
        for index, part in enumerate(PARTS):
            chosen = parts == index
            if chosen.any():
                full = min(1.0, counts.tokens[index] / _FULL_WEIGHT_TOKENS) if part in _LONG_PARTS else 1.0
                loss = loss + self.weights[part] * full * entropy[chosen].sum() / counts.tokens[index]
                self.rates.add(f"loss_{part}", entropy[chosen])
        return loss

    def _choice_loss(
        self, match: ToolMatch, chunk: Sequence[TokenizedSample], at: "_ActivationsAt", counts: "_Counts"
    ) -> Tensor | float:
        """The share of some samples in the match's cross entropy over the tools, at their `Action:`."""
        choices = [sample.choice for sample in chunk if sample.choice is not None]
        if counts.tools < 2 or not choices:
            return 0.0
        return self._match("match", match.choose(at([sample.action_place for sample in chunk])), choices) / counts.calls

    def _decision_loss(
        self, match: ToolMatch, chunk: Sequence[TokenizedSample], at: "_ActivationsAt", counts: "_Counts"
    ) -> Tensor | float:
        """The share of some samples in the match's cross entropy over the tools and none, where a request ends."""
        opening = [sample for sample in chunk if sample.opening]
        if not opening:
            return 0.0
        logits = match.decide(at([sample.prompt_length - 1 if sample.opening else None for sample in chunk]))
        choices = [counts.tools if sample.choice is None else sample.choice for sample in opening]
        return self._match("serves", logits, choices) / counts.openings

    def _match(self, name: str, logits: Tensor, choices: Sequence[int]) -> Tensor:
        """Summed cross entropy of the memory's match; its rates are counted under `name`."""
        gold = torch.tensor(choices, device=logits.device)
        entropy = F.cross_entropy(logits, gold, reduction="none")
        self.rates.add(f"loss_{name}", entropy)
        self.rates.add(name, logits.argmax(dim=-1) == gold)
        return entropy.sum()

    def _batches(self, samples: Sequence[TokenizedSample], *, share: bool = True) -> Iterator[Batch]:
        model = self._edge[0]
        # A window, as some layers of Gemma have, is part of the mask that the model makes of its own.
        whole = not any("sliding" in kind for kind in getattr(model.config, "layer_types", None) or ())
        rows = [sample.input_ids for sample in samples]
        return batches(rows, self.batch_tokens, share=share and whole, device=model.device)

    def _run(self, batch: Batch, chunk: Sequence[TokenizedSample]) -> tuple[Tensor, Tensor, Tensor, "_ActivationsAt"]:
        """Cross entropy, rightness and part of every target token (tokens,), and a function for activations.

        The function takes a place for each sample, or None to leave the sample out, and gives the inputs of `down_proj`
        there, with shape (memory layers, places, intermediate size).
        """
        model, writer = self._edge[0], self.generator.tool_memory
        mask = None if batch.mask is None else batch.mask.to(model.dtype)
        with down_proj_inputs(model, writer.memory.layers if writer is not None else ()) as inputs:
            hidden = model.base_model(
                input_ids=batch.ids, position_ids=batch.positions, attention_mask=mask, use_cache=False
            ).last_hidden_state
        labels = torch.cat([torch.tensor(s.input_ids[s.prompt_length :]) for s in chunk]).to(model.device)
        parts = torch.cat([torch.tensor(s.parts) for s in chunk]).to(model.device)
        before = [torch.arange(s.prompt_length - 1, len(s.input_ids) - 1) for s in chunk]
        logits = model.get_output_embeddings()(hidden[_located(batch, before)]).float()

        def at(places: Sequence[int | None]) -> Tensor:
            located = _located(batch, [torch.tensor([] if p is None else [p], dtype=torch.long) for p in places])
            return torch.stack([tensor[located] for tensor in inputs.values()])

        return F.cross_entropy(logits, labels, reduction="none"), logits.argmax(-1) == labels, parts, at

    def _count(self, chunk: Sequence[TokenizedSample], right: Tensor, parts: Tensor) -> None:
        """Rates of whole parts: a greedy decoder gets a part right just where every token of it is the likeliest."""
        start = 0
        for sample in chunk:
            own = slice(start, start + len(sample.parts))
            start += len(sample.parts)
            decided = right[own][:1]
            self.rates.add("decision", decided)
            self.rates.add("calls_tool" if sample.choice is not None else "calls_none", decided)
            if sample.choice is not None:
                for part in ("name", "arguments"):
                    self.rates.add(part, right[own][parts[own] == PARTS.index(part)].all()[None])


def _located(batch: Batch, places: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Batch rows and columns of some places in each sample."""
    rows, columns = zip(*(batch.locate(row, own) for row, own in enumerate(places)), strict=True)
    return torch.cat(rows), torch.cat(columns)


_LONG_PARTS = ("name", "arguments", "answer")
