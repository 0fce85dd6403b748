"""Training steps in which the tool is given: the loss is on the arguments alone, and no registry is read.

Once a tool is chosen, only its own rank-one updates are in place when its arguments are written, so the same holds
here. Requests for many tools run in one batch: the experts are shared by it, and each row has its own tool's updates.
Knows tokens, generator and edge LM, but not where episodes come from.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from loragen_agents.adapter.lora_weights import LoRAWeights
from loragen_agents.adapter.unmerged import apply_lora
from loragen_agents.conversation.argument_notes import argument_notes
from loragen_agents.conversation.prompts import PromptRenderer
from loragen_agents.conversation.react import ACTION, ACTION_INPUT, OBSERVATION_STOP, USE_TOOL, format_action_input
from loragen_agents.data.episodes import Episode, GoldCall, Sample
from loragen_agents.data.value_kinds import value_spans
from loragen_agents.generator.memory_writer import MemoryWriter
from loragen_agents.registry import ToolRegistry
from loragen_agents.training.packing import Batch, batches
from loragen_agents.training.rates import Rates

# What a target token belongs to: a kind of value, or what stands between the values (names, braces, the line's end).
TOKEN_KINDS = ("copied", "converted", "boolean", "enum", "number", "list", "between")


@dataclass(frozen=True)
class GivenSample:
    """A request whose tool is known, as token ids.

    Attributes:
        input_ids: prompt, the step up to `Action Input:`, and the target behind it.
        kinds: index into `TOKEN_KINDS` of each target token.
        tool: index in the registry.
        noted: whether the tool's argument notes stand in the prompt.
        optional: how many optional arguments the tool has, and how many of these the call gives.
    """

    input_ids: list[int]
    kinds: list[int]
    tool: int
    source: str
    noted: bool
    optional: tuple[int, int]

    @property
    def prompt_length(self) -> int:
        """Tokens before the target."""
        return len(self.input_ids) - len(self.kinds)


@dataclass(frozen=True)
class GivenEpisode:
    """The tools that some requests call, and the requests; plain data, so that worker processes can make it."""

    registry: ToolRegistry
    samples: tuple[GivenSample, ...]


def given_episode(
    renderer: PromptRenderer, episode: Episode, noted: Sequence[bool], max_tokens: int = 2048
) -> GivenEpisode:
    """Tokenise the calls of an episode; other samples, and those longer than `max_tokens`, are left out.

    Args:
        noted: for each sample, whether the tool's argument notes stand in its prompt.
    """
    called = dict.fromkeys(sample.gold.name for sample in episode.samples if isinstance(sample.gold, GoldCall))
    registry = ToolRegistry([episode.registry[name] for name in called], input_format=episode.registry.input_format)
    samples = []
    for sample, with_notes in zip(episode.samples, noted, strict=True):
        gold = sample.gold
        if not isinstance(gold, GoldCall):
            continue
        tool = registry[gold.name]
        written = format_action_input(tool, gold.arguments, registry.input_format)
        notes = argument_notes(tool) if with_notes else ""
        head = f"{USE_TOOL}{ACTION} {tool.name}{notes}{ACTION_INPUT}"
        ids, starts = renderer.encode_with_starts(f"{head} {written}{OBSERVATION_STOP}")
        # The end of the line alone is learnt, as in decoding: what follows is the tool's.
        first = next(index for index, start in enumerate(starts) if start >= len(head))
        said = "\n".join(_said(sample))
        spans = value_spans(tool, gold.arguments, written, said)
        kinds = []
        for start, end in zip(starts[first:], [*starts[first + 1 :], len(head) + 1 + len(written)], strict=True):
            middle = (start + end) / 2 - len(head) - 1
            kind = next((span.kind for span in spans if span.start <= middle < span.end), "between")
            kinds.append(TOKEN_KINDS.index(kind))
        prompt = renderer.user_turn(sample.turns)
        optional = [name for name in tool.argument_names if name not in tool.required]
        given = (len(optional), sum(name in gold.arguments for name in optional))
        made = GivenSample(prompt + ids, kinds, registry.names.index(tool.name), sample.source, bool(with_notes), given)
        if len(made.input_ids) <= max_tokens:
            samples.append(made)
    return GivenEpisode(registry, tuple(samples))


def _said(sample: Sample) -> Iterator[str]:
    """All that a conversation holds and a value can be copied from."""
    for turn in sample.turns:
        yield turn.request
        yield from (step.observation for step in turn.steps)
        yield turn.answer or ""


class GivenToolLoss:
    """Mean cross entropy of the arguments' tokens over requests for many tools; rates are counted by kind and source.

    Args:
        batch_tokens: rows of similar length are run together up to this many tokens with padding.
    """

    def __init__(self, writer: MemoryWriter | None, model: PreTrainedModel, rates: Rates, batch_tokens: int) -> None:
        self.writer, self.model, self.rates, self.batch_tokens = writer, model, rates, batch_tokens

    def __call__(self, episodes: Sequence[GivenEpisode], weights: Sequence[LoRAWeights], *, shared: bool) -> Tensor:
        """The loss of episodes with the weights that were made for each.

        Args:
            shared: whether all episodes have the same weights, as where nothing is routed.
        """
        own: list[LoRAWeights] = []
        rows: list[GivenSample] = []
        owners: list[int] = []
        homes: list[int] = []
        for number, (episode, beside) in enumerate(zip(episodes, weights, strict=True)):
            homes += [number] * len(episode.samples)
            owners += [len(own) + sample.tool for sample in episode.samples]
            rows += episode.samples
            if self.writer is not None:
                own += self.writer.each(episode.registry, beside)
        total = sum(len(row.kinds) for row in rows)
        loss = torch.zeros(())
        for batch in self._batches(rows):
            chunk = [rows[index] for index in batch.rows]
            with ExitStack() as stack:
                stack.enter_context(self._beside(weights, [homes[index] for index in batch.rows], shared))
                if own:
                    used = sorted({owners[index] for index in batch.rows})
                    places = [used.index(owners[index]) for index in batch.rows]
                    stack.enter_context(apply_lora(self.model, [own[n] for n in used], places))
                entropy, right = self._run(batch, chunk)
            loss = loss + entropy.sum() / total
            self._count(chunk, entropy, right)
        return loss

    def _beside(self, weights: Sequence[LoRAWeights], homes: list[int], shared: bool) -> AbstractContextManager[None]:
        return apply_lora(self.model, weights[0]) if shared else apply_lora(self.model, list(weights), homes)

    def _batches(self, rows: Sequence[GivenSample]) -> Iterator[Batch]:
        return batches([row.input_ids for row in rows], self.batch_tokens, share=False, device=self.model.device)

    def _run(self, batch: Batch, chunk: Sequence[GivenSample]) -> tuple[Tensor, Tensor]:
        """Cross entropy of every target token (tokens,), and whether it is the likeliest."""
        hidden = self.model.base_model(input_ids=batch.ids, use_cache=False).last_hidden_state
        row = torch.cat([torch.full((len(s.kinds),), n) for n, s in enumerate(chunk)])
        column = torch.cat([torch.arange(s.prompt_length - 1, len(s.input_ids) - 1) for s in chunk])
        logits = self.model.get_output_embeddings()(hidden[row, column]).float()
        labels = torch.cat([torch.tensor(s.input_ids[s.prompt_length :]) for s in chunk]).to(logits.device)
        return F.cross_entropy(logits, labels, reduction="none"), logits.argmax(-1) == labels

    def _count(self, chunk: Sequence[GivenSample], entropy: Tensor, right: Tensor) -> None:
        """Rates of whole values and calls: greedy decoding gets one right where each token is likeliest."""
        entropy, start = entropy.detach(), 0
        for sample in chunk:
            own = slice(start, start + len(sample.kinds))
            start += len(sample.kinds)
            hit, cost = right[own], entropy[own]
            call = hit.all()[None]
            self.rates.add("loss_given", cost)
            self.rates.add("given_call", call)
            self.rates.add(f"given_call_{'with' if sample.noted else 'without'}_notes", call)
            self.rates.add(f"given_call_{sample.source}", call)
            between = torch.tensor([kind == len(TOKEN_KINDS) - 1 for kind in sample.kinds])
            if sample.optional[0]:
                some = "none" if not sample.optional[1] else "all" if len(set(sample.optional)) == 1 else "some"
                self.rates.add(f"given_names_{some}_of_optional", hit[between].all()[None])
            for kind, begin, end in _runs(sample.kinds):
                self.rates.add(f"given_{TOKEN_KINDS[kind]}", hit[begin:end].all()[None])
                self.rates.add(f"loss_given_{TOKEN_KINDS[kind]}", cost[begin:end])


def _runs(kinds: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Stretches of equal kinds: kind, begin and end; what stands between values is left out."""
    begin = 0
    for index in range(1, len(kinds) + 1):
        if index == len(kinds) or kinds[index] != kinds[begin]:
            if kinds[begin] != len(TOKEN_KINDS) - 1:
                yield kinds[begin], begin, index
            begin = index
