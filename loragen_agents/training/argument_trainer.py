"""Trains the argument head of a generator, alone and behind the experts: minutes on a CPU, half of them for reading.

A step draws requests with the tools that they call; the losses are on whether each argument is given, on what each
token stands for, and on where each value begins and ends. Everything but the head stands still.
"""

import logging
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from loragen_agents.adapter.argument_reader import FoundArguments, Listed, Reading
from loragen_agents.adapter.lora_weights import LoRAWeights
from loragen_agents.conversation.prompts import PromptRenderer
from loragen_agents.conversation.renderers import shared_renderer
from loragen_agents.data.records import DataSet
from loragen_agents.errors import DataError
from loragen_agents.generator.argument_head import ArgumentHead, argument_kinds, read_arguments, read_values
from loragen_agents.models.language_models import LanguageModel
from loragen_agents.registry import Tool
from loragen_agents.support.progress import Progress, silent
from loragen_agents.training.argument_examples import NONE, UNKNOWN, ArgumentExamples, build_argument_examples, reworded
from loragen_agents.training.argument_recipe import ArgumentRecipe
from loragen_agents.training.head_runs import (
    data_of,
    load_generator,
    merged_copy,
    reading_digest,
    save_run,
    with_new_head,
)
from loragen_agents.training.kept_arrays import KeptArray

logger = logging.getLogger(__name__)

_BLOCK = 256
_WARMUP = 50
# Texts from whose tokens mean and deviation are taken.
_SAMPLE = 1500
# Requests that run together, which are of similar length.
_ROWS = 16
_EVERY = 0.6  # a source's share grows with this power of its requests


@dataclass(frozen=True)
class ReadExamples:
    """What was read of the examples.

    Attributes:
        values: of all requests' tokens one behind the other, float16, with shape (tokens, layers · value width).
        starts: of each request, the place of its first token; last where all end.
        words: as `read_arguments` gives them of each tool, first in its own words, then in those of `reworded`.
    """

    values: np.ndarray
    starts: list[int]
    words: list[list[Tensor]]


def train_argument_head(
    recipe: ArgumentRecipe, folder: str | Path, *, data: DataSet | None = None, progress: Progress = silent
) -> Path:
    """Run a recipe; returns the folder of the generator with its head, `folder/weights`.

    Args:
        recipe: what to do.
        folder: the run's folder, made if it is missing. What an interrupted run has read is not read again.
        data: in place of the recipe's data folders.
        progress: told how far it is.

    Raises:
        DataError: there is no data, or no requests of split train whose tool has arguments.
        CheckpointError: the generator is damaged or for another model.
    """
    folder = Path(folder)
    data = data_of(recipe, data)
    names = ("argument_layers", "argument_width", "argument_hidden")
    settings = {name: getattr(recipe, name) for name in names}
    generator = with_new_head(load_generator(recipe), "argument_head", settings)
    edge = generator.edge
    renderer = shared_renderer(edge.tokenizer)
    examples = build_argument_examples(data, renderer, recipe)
    if not any(one.split == "train" for one in examples.requests):
        raise DataError("the data has no requests of split train that call a tool with arguments")
    assert generator.argument_head is not None
    folder.mkdir(parents=True, exist_ok=True)
    head = generator.argument_head.head
    beside = generator.generate_parts("").shared
    read = read_examples(folder, edge, beside, renderer, examples, head.reader.layers, progress)
    torch.manual_seed(recipe.seed)
    fit_argument_head(head, read, examples, recipe, progress)
    scores = argument_scores(head, read, examples)
    return save_run(generator, folder, "argument_head", len(examples.requests), scores)


def read_examples(
    folder: Path,
    edge: LanguageModel,
    beside: LoRAWeights,
    renderer: PromptRenderer,
    examples: ArgumentExamples,
    layers: Sequence[int],
    progress: Progress,
) -> ReadExamples:
    """Read all requests and tools; arguments as `train_argument_head` has them."""
    model = merged_copy(edge, beside)
    words = [_read_words(model, renderer, examples.tools, layers, progress)]
    rng = random.Random(0)
    for way in zip(*(reworded(tool, rng) for tool in examples.tools), strict=True):
        tools, places = zip(*way, strict=True)
        read = _read_words(model, renderer, tools, layers, progress)
        words.append([each[order] for each, order in zip(read, places, strict=True)])
    rows = [one.ids for one in examples.requests]
    starts = [0]
    for row in rows:
        starts.append(starts[-1] + len(row))
    digest = reading_digest(rows, layers, edge, beside)
    kept = KeptArray(folder, "values", (starts[-1], words[0][0].shape[-1]), digest)
    first = starts.index(kept.done) if kept.done else 0
    for begin in range(first, len(rows), _BLOCK):
        progress(f"Reading {len(rows)} requests", begin / len(rows))
        block = torch.cat(read_values(model, layers, rows[begin : begin + _BLOCK]))
        end = min(begin + _BLOCK, len(rows))
        kept.array[starts[begin] : starts[end]] = block.half().cpu().numpy()
        kept.keep(starts[end])
    return ReadExamples(kept.array, starts, words)


def _read_words(
    model: PreTrainedModel, renderer: PromptRenderer, tools: Sequence[Tool], layers: Sequence[int], progress: Progress
) -> list[Tensor]:
    """As `read_arguments`, told how far it is."""
    words: list[Tensor] = []
    for begin in range(0, len(tools), _BLOCK):
        progress(f"Reading the arguments of {len(tools)} tools", begin / len(tools))
        words += read_arguments(model, renderer, tools[begin : begin + _BLOCK], layers)
    return words


@dataclass(frozen=True)
class _Drawn:
    """A request of a step with the arguments that are listed for it, by (tool, argument)."""

    index: int
    listed: list[tuple[int, int]]
    given: list[bool]
    required: list[bool]
    stands: list[int]
    wording: int = 0


def fit_argument_head(
    head: ArgumentHead,
    read: ReadExamples,
    examples: ArgumentExamples,
    recipe: ArgumentRecipe,
    progress: Progress = silent,
) -> None:
    """Learn a head on examples that were read; arguments as `train_argument_head` has them."""
    rng = random.Random(recipe.seed)
    train: dict[str, list[int]] = defaultdict(list)
    for index, one in enumerate(examples.requests):
        if one.split == "train":
            train[one.source].append(index)
    _standardise(head, read, [index for own in train.values() for index in own], rng)
    batches = _Batches(read, examples)
    sources = sorted(train)
    shares = [len(train[source]) ** _EVERY for source in sources]
    strangers = _strangers(examples, {examples.requests[n].tool for own in train.values() for n in own})
    head.reader.dropout = recipe.dropout
    optimizer = torch.optim.AdamW(head.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    head.train()
    mean: float | None = None
    for step in range(recipe.steps):
        rate = recipe.learning_rate * min(1.0, (step + 1) / _WARMUP) * (1 - step / recipe.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        indices = [
            rng.choice(train[source])
            for source in rng.choices(sources, shares, k=3)
            for _ in range(recipe.step_requests // 3)
        ]
        drawn = [_changed(examples, index, strangers, recipe, len(read.words), rng) for index in indices]
        optimizer.zero_grad()
        drawn.sort(key=lambda one: len(one.stands))
        loss = 0.0
        for begin in range(0, len(drawn), _ROWS):
            some = drawn[begin : begin + _ROWS]
            loss += _backward(head, batches(head, some), recipe, len(some) / len(drawn))
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        mean = loss if mean is None else 0.98 * mean + 0.02 * loss
        label = "Learning the argument head"
        progress(f"{label} (loss {mean:.2f})" if step % 20 == 0 else label, step / recipe.steps)
    head.eval()


@dataclass(frozen=True)
class _Batch:
    """Drawn requests as tensors; the first three as `ArgumentReader` takes them.

    Attributes:
        given: whether each argument is given, as a number, with shape (requests, arguments).
        stands: what each token stands for, with shape (requests, tokens).
        begins, ends: where each argument's value begins and ends in the request, counted from 1; 0 where it does not
            stand there. Shape (requests, arguments).
    """

    values: Tensor
    present: Tensor
    listed: Listed
    given: Tensor
    stands: Tensor
    begins: Tensor
    ends: Tensor


def _backward(head: ArgumentHead, batch: _Batch, recipe: ArgumentRecipe, share: float) -> float:
    """Add the gradients of a batch, which is a share of its step's requests; returns its part of the loss."""
    listed = batch.listed
    found: Reading = head.reader(batch.values, batch.present, listed)
    learnt = listed.present & (~listed.required | (torch.rand(listed.present.shape) < recipe.required))
    parts = []
    if learnt.any():
        parts.append(F.binary_cross_entropy_with_logits(found.given[learnt], batch.given[learnt]))
    if (batch.stands != UNKNOWN).any():
        told = F.cross_entropy(found.stands.flatten(0, 1), batch.stands.flatten(), ignore_index=UNKNOWN)
        parts.append(recipe.token_weight * told)
    if listed.present.any():
        begins = F.nll_loss(found.begins[listed.present], batch.begins[listed.present])
        ends = F.nll_loss(found.ends[listed.present], batch.ends[listed.present])
        parts.append(recipe.span_weight / 2 * (begins + ends))
    if not parts:
        return 0.0
    loss = share * torch.stack(parts).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item()


def _standardise(head: ArgumentHead, read: ReadExamples, train: Sequence[int], rng: random.Random) -> None:
    """Set the head's means and deviations from what was read."""
    some = sorted(rng.sample(train, min(_SAMPLE, len(train))))
    values = np.concatenate([read.values[read.starts[n] : read.starts[n + 1]] for n in some])
    tokens = torch.from_numpy(values.astype(np.float32))
    words = torch.cat(read.words[0]).float()
    for module, x in ((head.reader, tokens), (head, words)):
        module.mean.copy_(x.mean(dim=0))
        module.deviation.copy_(x.std(dim=0) + 1e-3)


def _strangers(examples: ArgumentExamples, trained: set[int]) -> list[tuple[int, int]]:
    return [(tool, n) for tool in sorted(trained) for n in range(len(examples.tools[tool].argument_names))]


def _plain(examples: ArgumentExamples, index: int) -> _Drawn:
    """An example as it is."""
    one = examples.requests[index]
    tool = examples.tools[one.tool]
    listed = [(one.tool, n) for n in range(len(one.given))]
    required = [name in tool.required for name in tool.argument_names]
    return _Drawn(index, listed, list(one.given), required, one.stands)


def _changed(
    examples: ArgumentExamples,
    index: int,
    strangers: Sequence[tuple[int, int]],
    recipe: ArgumentRecipe,
    wordings: int,
    rng: random.Random,
) -> _Drawn:
    """An example in other order and words, without some arguments that are not given, and with strange ones."""
    plain, one = _plain(examples, index), examples.requests[index]
    kept = [n for n in range(len(one.given)) if one.given[n] or plain.required[n] or rng.random() >= recipe.dropped]
    places: list[tuple[tuple[int, int], int | None]] = [(plain.listed[n], n) for n in kept]
    if strangers and rng.random() < recipe.strange:
        added = [rng.choice(strangers) for _ in range(rng.choice((1, 1, 2, 3, 4)))]
        # A tool of the same source may well have an argument of the same meaning.
        places += [(key, None) for key in added if examples.sources[key[0]] != one.source]
    rng.shuffle(places)
    moved = {number: place for place, (_, number) in enumerate(places) if number is not None}
    return _Drawn(
        index,
        [key for key, _ in places],
        [number is not None and one.given[number] for _, number in places],
        [number is not None and plain.required[number] for _, number in places],
        [1 + moved[label - 1] if label > 0 else label for label in one.stands],
        rng.randint(1, wordings - 1) if wordings > 1 and rng.random() < recipe.reworded else 0,
    )


class _Batches:
    """Makes tensors of drawn requests."""

    def __init__(self, read: ReadExamples, examples: ArgumentExamples) -> None:
        self.read, self.examples = read, examples
        self.kinds = [argument_kinds(tool) for tool in examples.tools]

    def __call__(self, head: ArgumentHead, drawn: Sequence[_Drawn]) -> _Batch:
        rows = len(drawn)
        width = max(len(one.stands) for one in drawn)
        most = max(len(one.listed) for one in drawn)
        values = torch.zeros(rows, width, self.read.values.shape[1])
        present = torch.zeros(rows, width, dtype=torch.bool)
        stands = torch.full((rows, width), UNKNOWN)
        words = torch.zeros(rows, most, self.read.values.shape[1])
        kinds = torch.zeros(rows, most, dtype=torch.long)
        required, there = torch.zeros(rows, most, dtype=torch.bool), torch.zeros(rows, most, dtype=torch.bool)
        given = torch.zeros(rows, most)
        begins, ends = torch.zeros(rows, most, dtype=torch.long), torch.zeros(rows, most, dtype=torch.long)
        for row, one in enumerate(drawn):
            start, length, count = self.read.starts[one.index], len(one.stands), len(one.listed)
            values[row, :length] = torch.from_numpy(self.read.values[start : start + length].astype(np.float32))
            present[row, :length] = True
            stands[row, :length] = torch.tensor(one.stands)
            for place, (tool, argument) in enumerate(one.listed):
                words[row, place] = self.read.words[one.wording][tool][argument]
                kinds[row, place] = int(self.kinds[tool][argument])
            there[row, :count] = True
            required[row, :count] = torch.tensor(one.required, dtype=torch.bool)
            given[row, :count] = torch.tensor(one.given, dtype=torch.float)
            for place, (first, last) in _stretches(one.stands).items():
                begins[row, place], ends[row, place] = 1 + first, 1 + last
        return _Batch(values, present, Listed(head.vectors(words), kinds, required, there), given, stands, begins, ends)


def _stretches(stands: Sequence[int]) -> dict[int, tuple[int, int]]:
    """The first and last token of each argument's value, by the argument's place; of a list, of its first value."""
    found: dict[int, tuple[int, int]] = {}
    for index, label in enumerate(stands):
        if label <= NONE:
            continue
        first, last = found.get(label - 1, (index, index - 1))
        if last == index - 1:
            found[label - 1] = first, index
    return found


@torch.no_grad()
def argument_scores(head: ArgumentHead, read: ReadExamples, examples: ArgumentExamples) -> dict[str, float]:
    """Shares of dev requests whose optional arguments are all told right, of values found in place, and others."""
    batches = _Batches(read, examples)
    dev = [n for n, one in enumerate(examples.requests) if one.split == "dev"]
    right: dict[str, list[bool]] = defaultdict(list)
    for begin in range(0, len(dev), 64):
        drawn = [_plain(examples, index) for index in dev[begin : begin + 64]]
        batch = batches(head, drawn)
        found: Reading = head.reader(batch.values, batch.present, batch.listed)
        told = (found.given > 0) == (batch.given > 0)
        optional = batch.listed.present & ~batch.listed.required
        for row, one in enumerate(drawn):
            source = examples.requests[one.index].source
            if optional[row].any():
                right[f"all_{source}"].append(bool(told[row][optional[row]].all()))
            right[f"copied_{source}"] += _copied(found, row, one, examples.requests[one.index].request)
        right["each"] += told[optional].tolist()
        known = batch.stands != UNKNOWN
        right["token"] += (found.stands.argmax(dim=-1) == batch.stands)[known].tolist()
    return {name: round(sum(values) / len(values), 4) for name, values in sorted(right.items()) if values}


def _copied(found: Reading, row: int, drawn: _Drawn, request: tuple[int, int]) -> list[bool]:
    """Of each value that stands in a request, whether its very tokens are the likeliest stretch of the request's."""
    tokens = range(*request)
    one = Reading(*(part[row : row + 1] for part in vars(found).values()))
    names = {str(place): 0.0 for place in range(len(drawn.listed))}
    right = []
    for place, stretch in _stretches(drawn.stands).items():
        spans, _ = FoundArguments(names, one).spans(str(place), tokens, tokens)
        first, last = divmod(int(spans.argmax()), len(tokens))
        right.append((tokens[first], tokens[last]) == stretch)
    return right
