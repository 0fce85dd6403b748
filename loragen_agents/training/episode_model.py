"""The generator as it is trained: episodes in, one loss and the rates behind it out.

A registry is turned into LoRA weights once and serves all of its episode's requests; gradients go through the frozen
edge LM into what made the weights. Most target tokens copy arguments, so the parts of a step (decision, name,
arguments, answer) are averaged and weighted apart. Knows models and losses; where episodes come from it does not know.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from loragen_agents.training.packing import Batch, batches

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

    prompt: "user_turn" is what the specialised model sees, "full_react" the baselines' prompt with definitions.
    """
    samples = (tokenize_sample(renderer, episode, sample, prompt == "full_react") for sample in episode.samples)
    return TokenizedEpisode(episode.registry, tuple(s for s in samples if len(s.input_ids) <= max_tokens))


class Rates:
    """Sums and counts by name, to be averaged over any number of episodes."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, float] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Count each of `values` in the mean of `name`."""
        self.sums[name] = self.sums.get(name, 0.0) + values.detach().float().sum().item()
        self.counts[name] = self.counts.get(name, 0.0) + values.numel()

    def means(self) -> dict[str, float]:
        """The mean of every name that was counted."""
        return {name: self.sums[name] / count for name, count in self.counts.items() if count}

    @classmethod
    def joined(cls, several: Iterable["Rates"]) -> "Rates":
        """The rates of several processes as one, in which every value counts the same."""
        joined = cls()
        for rates in several:
            for name, count in rates.counts.items():
                joined.sums[name] = joined.sums.get(name, 0.0) + rates.sums[name]
                joined.counts[name] = joined.counts.get(name, 0.0) + count
        return joined

    def clear(self) -> None:
        """Begin anew."""
        self.sums.clear()
        self.counts.clear()


class EpisodeModel(nn.Module):
    """Loss of a generator on episodes: L_LM by parts, plus Eq. 9, plus the memory's matches (paper Eq. 10).

    generator: what is trained; its language models stay frozen.
    weights: of the parts of a step.
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
        first_layer: int = 0,
        batch_tokens: int = 1024,
    ) -> None:
        super().__init__()
        self.generator = generator
        self.weights = {**_DEFAULT_WEIGHTS, **(weights or {})}
        self.match_weight, self.first_layer, self.batch_tokens = match_weight, first_layer, batch_tokens
        # In tuples, so that neither is taken for a submodule of this one.
        self._edge, self._renderer = (generator.edge.model,), (renderer,)
        self.rates = Rates()

    def forward(self, episodes: Sequence[TokenizedEpisode]) -> Tensor:
        """Mean loss of the episodes; the rates of all samples are counted in `rates`."""
        kept = [episode for episode in episodes if episode.samples]
        if not kept:
            return torch.stack([p.sum() for p in self.generator.parameters() if p.requires_grad]).sum() * 0
        reads = self.generator.config.uses_cloud
        prompts = [self._renderer[0].definitions(episode.registry) if reads else "" for episode in kept]
        made = self.generator(prompts)
        losses = [self._episode(episode, self._trained(w)) for episode, w in zip(kept, made.weights, strict=True)]
        return torch.stack(losses).mean() + made.load_loss

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
        writer = self.generator.tool_memory
        match: ToolMatch | None = None
        if writer is not None and episode.registry:
            pieces, match = writer(episode.registry, weights)
            weights = weights.concatenate(pieces)
        tools = len(episode.registry)
        all_parts = torch.tensor([part for sample in episode.samples for part in sample.parts])
        counts = torch.bincount(all_parts, minlength=len(PARTS)).tolist()
        calls = sum(sample.choice is not None for sample in episode.samples)
        openings = sum(sample.opening for sample in episode.samples)
        loss = torch.zeros((), device=self._edge[0].device)
        with apply_lora(self._edge[0], weights):
            for batch in self._batches(episode.samples):
                chunk = [episode.samples[index] for index in batch.rows]
                entropy, right, parts, at = self._run(batch, chunk)
                for index, part in enumerate(PARTS):
                    chosen = parts == index
                    if chosen.any():
                        full = min(1.0, counts[index] / _FULL_WEIGHT_TOKENS) if part in _LONG_PARTS else 1.0
                        loss = loss + self.weights[part] * full * entropy[chosen].sum() / counts[index]
                        self.rates.add(f"loss_{part}", entropy[chosen])
                self._count(chunk, right, parts)
                if match is None:
                    continue
                asked = [sample.action_place for sample in chunk]
                if tools > 1 and any(place is not None for place in asked):
                    logits = match.choose(at(asked))
                    choices = [sample.choice for sample in chunk if sample.choice is not None]
                    loss = loss + self.match_weight * self._match("match", logits, choices) / calls
                asked = [sample.prompt_length - 1 if sample.opening else None for sample in chunk]
                if any(place is not None for place in asked):
                    logits = match.decide(at(asked))
                    choices = [tools if s.choice is None else s.choice for s in chunk if s.opening]
                    loss = loss + self.match_weight * self._match("serves", logits, choices) / openings
        return loss

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

    def _run(
        self, batch: Batch, chunk: Sequence[TokenizedSample]
    ) -> tuple[Tensor, Tensor, Tensor, Callable[[Sequence[int | None]], Tensor]]:
        """Cross entropy, rightness and part of every target token (tokens,), and a look at the memory's activations.

        The last takes a place for each sample, or None to pass it over, and gives the inputs of `down_proj` there, with
        shape (memory layers, places, intermediate size).
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
