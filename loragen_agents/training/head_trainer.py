"""Trains the tool head of a generator, first and alone: minutes on a CPU, most of them for reading.

A step draws tools and requests, and for each request a registry of some of these tools, with or without the one that it
calls; the loss is the cross entropy over the registry and the answer "none". Everything but the head stands still.
"""

import logging
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from loragen_agents.conversation.renderers import shared_renderer
from loragen_agents.data.records import DataSet
from loragen_agents.errors import DataError
from loragen_agents.generator.tool_head import ToolHead
from loragen_agents.generator.tool_texts import TextKind
from loragen_agents.support.progress import Progress, silent
from loragen_agents.training.head_examples import CHAT, Asked, HeadExamples, build_examples
from loragen_agents.training.head_features import leading_space, read_features
from loragen_agents.training.head_recipe import HeadRecipe
from loragen_agents.training.head_runs import data_of, load_generator, save_run, with_new_head

logger = logging.getLogger(__name__)

_SIZES = (1, 2, 4, 8, 16, 32, 48)
_WARMUP = 30


def train_head(
    recipe: HeadRecipe, folder: str | Path, *, data: DataSet | None = None, progress: Progress = silent
) -> Path:
    """Run a recipe; returns the folder of the generator with its head, `folder/weights`.

    Args:
        recipe: what to do.
        folder: the run's folder, made if it is missing. What an interrupted run has read is not read again.
        data: in place of the recipe's data folders.
        progress: told how far it is.

    Raises:
        DataError: there is no data, or none of split train or dev.
        CheckpointError: the generator is damaged or for another model.
    """
    folder = Path(folder)
    examples = build_examples(data_of(recipe, data), recipe)
    for split in ("train", "dev"):
        if not any(one.split == split and one.tool is not None for one in examples.asked):
            raise DataError(f"the data has no requests of split {split} that call a tool")
    settings = {"head_layers": recipe.head_layers, "head_width": recipe.head_width}
    generator = with_new_head(load_generator(recipe), "tool_head", settings)
    edge = generator.edge
    assert generator.tool_head is not None
    layers = generator.tool_head.head.layers
    folder.mkdir(parents=True, exist_ok=True)
    beside = generator.generate_parts("").shared
    renderer = shared_renderer(edge.tokenizer)
    features = read_features(folder, edge, beside, renderer, examples.texts, layers, progress)
    groups, fit = _groups(examples)
    space = leading_space(features, groups, fit, recipe.directions, progress)
    torch.manual_seed(recipe.seed)
    learner = ToolHead(layers, space.basis.shape[-1], recipe.head_width)
    fit_head(learner, space.coordinates, examples, recipe, progress)
    kinds = len(TextKind)
    generator.tool_head.head.load_state_dict(
        learner.in_full(space.basis, space.means[kinds], space.means[:kinds]).state_dict()
    )
    generator.tool_head.forget()
    scores = head_scores(learner, space.coordinates, examples)
    return save_run(generator, folder, "head", len(examples.asked), scores)


def _groups(examples: HeadExamples) -> tuple[Tensor, Tensor]:
    """The group of each text (its kind, or last the requests), and the texts that means and directions are taken of."""
    groups = torch.full((len(examples.texts),), len(TextKind))
    fit = {one.text for one in examples.asked if one.split == "train"}
    for record, texts in zip(examples.tools, examples.tool_texts, strict=True):
        for kind, text in enumerate(texts):
            if text >= 0:
                groups[text] = kind
                fit |= {text} if record.split == "train" else set()
    groups[examples.invented] = int(TextKind.NAME)
    return groups, torch.tensor(sorted(fit))


def fit_head(
    head: ToolHead, coordinates: Tensor, examples: HeadExamples, recipe: HeadRecipe, progress: Progress = silent
) -> None:
    """Learn the maps of a head on texts whose activations are known.

    Args:
        head: for activations of the width of `coordinates`.
        coordinates: of all texts, centred and normalised, with shape (texts, slots, width).
        examples, recipe, progress: as `train_head` has them.
    """
    draws = _Draws(examples, recipe)
    optimizer = torch.optim.AdamW(head.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    head.train()
    mean: float | None = None
    for step in range(recipe.steps):
        rate = recipe.learning_rate * min(1.0, (step + 1) / _WARMUP) * (1 - step / recipe.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        tools, texts, asked = draws.step()
        x = F.dropout(coordinates[[one.text for one in asked]].float(), recipe.dropout)
        requests, none = head.request_vectors(x)
        each = F.dropout(coordinates[texts.clamp(min=0)].float(), recipe.dropout)
        likeness = head.log_scale.exp() * requests @ head.tool_vectors(each, texts >= 0).T
        held, gold = draws.registries(asked, tools, likeness.detach())
        logits = torch.cat([likeness.masked_fill(~held, -torch.inf), none[:, None]], dim=-1)
        loss = F.cross_entropy(logits, gold)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        progress(f"Learning the head (loss {mean:.2f})" if step % 20 == 0 else "Learning the head", step / recipe.steps)
    head.eval()


class _Draws:
    """Draws the tools and requests of a step, and the registry of each request among these tools."""

    def __init__(self, examples: HeadExamples, recipe: HeadRecipe) -> None:
        self.examples, self.recipe = examples, recipe
        self.rng = random.Random(recipe.seed)
        self.asked: dict[str, dict[int, list[Asked]]] = defaultdict(lambda: defaultdict(list))
        self.chat: list[Asked] = []
        self.siblings: dict[str, list[int]] = defaultdict(list)
        for one in examples.asked:
            if one.split == "train" and one.tool is not None:
                self.asked[one.source][one.tool].append(one)
            elif one.split == "train":
                self.chat.append(one)
        for index, record in enumerate(examples.tools):
            if record.split == "train":
                self.siblings[record.source].append(index)
        self.texts = torch.tensor(examples.tool_texts)

    def step(self) -> tuple[list[int], Tensor, list[Asked]]:
        """Tools, the texts that each is read by (tools, kinds) with -1 for none, and requests for some of the tools."""
        rng, recipe = self.rng, self.recipe
        sources = list(self.asked)
        shares = [len(self.asked[source]) ** 0.5 for source in sources]
        asked: list[Asked] = []
        tools: list[int] = []
        for source in rng.choices(sources, shares, k=rng.choice((1, 1, 2, 3))):
            golds = self._golds(source)
            tools += golds + rng.sample(self.siblings[source], min(16, len(self.siblings[source])))
            for gold in golds:
                rows = self.asked[source][gold]
                asked += rng.sample(rows, min(2, len(rows)))
        asked = rng.sample(asked, min(recipe.step_requests, len(asked)))
        rng.shuffle(tools)
        called = [one.tool for one in asked if one.tool is not None]
        tools = list(dict.fromkeys(called + tools))[: max(recipe.step_tools, len(set(called)))]
        asked += rng.sample(self.chat, min(len(self.chat), max(1, len(asked) // 10)))
        texts = self.texts[tools].clone()
        for row in texts:
            drawn = rng.random()
            if drawn < recipe.invented:
                row[TextKind.NAME] = rng.choice(self.examples.invented)
            elif drawn < recipe.invented + recipe.dropped / 2:
                row[TextKind.NAME] = -1
            if rng.random() < recipe.dropped:
                row[TextKind.ARGUMENTS] = -1
        return tools, texts, asked

    def _golds(self, source: str) -> list[int]:
        """Tools to ask for: of the whole source, or one application of it and some others."""
        rng, golds = self.rng, list(self.asked[source])
        if rng.random() < 0.4 and len(golds) > 30:
            domain = self.examples.tools[rng.choice(golds)].domain
            own = [gold for gold in golds if self.examples.tools[gold].domain == domain]
            golds = list(dict.fromkeys(own + rng.sample(golds, 12)))
        return rng.sample(golds, min(48, len(golds)))

    def registries(self, asked: Sequence[Asked], tools: Sequence[int], likeness: Tensor) -> tuple[Tensor, Tensor]:
        """Which tools stand in each request's registry (requests, tools), and the index of its tool or of none."""
        rng, recipe = self.rng, self.recipe
        held = torch.zeros(len(asked), len(tools), dtype=torch.bool)
        gold = torch.full((len(asked),), len(tools))
        place = {tool: index for index, tool in enumerate(tools)}
        sources = [self.examples.tools[tool].source for tool in tools]
        nearest = likeness.argsort(dim=1, descending=True).tolist()
        for row, one in enumerate(asked):
            order = nearest[row] if rng.random() < recipe.near else rng.sample(range(len(tools)), len(tools))
            others = [index for index in order if tools[index] not in one.never]
            if rng.random() < 0.5:
                others = [index for index in others if sources[index] == one.source] or others
            size = rng.choice((*_SIZES, len(tools)))
            served = one.tool is not None and rng.random() >= recipe.irrelevant
            held[row, others[: size - 1 if served else size]] = True
            if served and one.tool is not None:
                gold[row] = place[one.tool]
                held[row, place[one.tool]] = True
        return held, gold


@torch.no_grad()
def head_scores(head: ToolHead, coordinates: Tensor, examples: HeadExamples) -> dict[str, float]:
    """Shares of right choices on the dev requests: all tools of their source, 8 of them, and decisions without them."""
    rng = random.Random(0)
    texts = torch.tensor(examples.tool_texts)
    parts = texts.split(256)
    vectors = torch.cat([head.tool_vectors(coordinates[part.clamp(min=0)].float(), part >= 0) for part in parts])
    siblings: dict[str, list[int]] = defaultdict(list)
    for index, record in enumerate(examples.tools):
        siblings[record.source].append(index)
    right: dict[str, list[bool]] = defaultdict(list)
    for one in examples.asked:
        if one.split != "dev":
            continue
        query, none = head.request_vectors(coordinates[[one.text]].float())
        likeness = head.log_scale.exp() * (query @ vectors.T)[0]
        if one.tool is None:
            few = rng.sample(range(len(vectors)), min(12, len(vectors)))
            right[f"none_{'chat' if one.source == CHAT else 'later'}"].append(bool(likeness[few].max() <= none[0]))
            continue
        others = [tool for tool in siblings[one.source] if tool not in one.never]
        few = rng.sample(others, min(8, len(others)))
        right[f"all_{one.source}"].append(bool((likeness[one.tool] > likeness[others]).all()))
        right[f"eight_{one.source}"].append(bool((likeness[one.tool] > likeness[few[:7]]).all()))
        right["served"].append(bool(likeness[[one.tool, *few[:7]]].max() > none[0]))
        if few:
            right["irrelevant"].append(bool(likeness[few].max() <= none[0]))
    return {name: round(sum(values) / len(values), 4) for name, values in sorted(right.items())}
