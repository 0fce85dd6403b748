"""Where the episodes of a run come from: a recipe and data folders in, tokenised training and dev episodes out.

An episode is a function of seed and number, so a resumed run sees what an unbroken one would have seen.
"""

import random
from dataclasses import dataclass

from torch.utils.data import Dataset

from loragen_agents.conversation.prompts import PromptRenderer
from loragen_agents.data.gpt4tools_episodes import EpisodeSource, gpt4tools_samplers
from loragen_agents.data.options import NameMode, SamplerOptions, checked_options
from loragen_agents.data.records import DataSet, load_data
from loragen_agents.data.sampler import RegistrySampler
from loragen_agents.errors import DataError
from loragen_agents.training.episode_model import TokenizedEpisode, tokenize_episode
from loragen_agents.training.given_tool import GivenEpisode, given_episode
from loragen_agents.training.recipe import Recipe

GIVEN = "given"  # the kind of dev episodes whose tools are given
# Numbers of the episodes that set the memory's background.
_BACKGROUND = range(10**9, 10**9 + 6)


class EpisodeDataset(Dataset[TokenizedEpisode | GivenEpisode]):
    """Episodes 0 to count - 1, drawn and tokenised when they are asked for.

    Args:
        given: where the episodes come from whose tools are given: all but one in `recipe.whole_every`.
    """

    def __init__(
        self,
        whole: EpisodeSource,
        renderer: PromptRenderer,
        recipe: Recipe,
        count: int,
        given: EpisodeSource | None = None,
    ) -> None:
        self.whole, self.renderer, self.recipe, self.count, self.given = whole, renderer, recipe, count, given

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> TokenizedEpisode | GivenEpisode:
        recipe = self.recipe
        if self.given is None or index % recipe.whole_every == 0:
            return tokenize_episode(self.renderer, self.whole.episode(index), recipe.prompt, recipe.max_tokens)
        episode, rng = self.given.episode(index), random.Random(f"notes/{recipe.seed}/{index}")
        noted = [rng.random() < recipe.notes for _ in episode.samples]
        return given_episode(self.renderer, episode, noted, recipe.max_tokens)


def as_batch(episodes: list[TokenizedEpisode | GivenEpisode]) -> dict[str, list[TokenizedEpisode | GivenEpisode]]:
    """A step's episodes as the trainer hands them to the model."""
    return {"episodes": episodes}


@dataclass(frozen=True)
class RunData:
    """Where the episodes of a run come from.

    Attributes:
        whole: of the whole episodes that are trained on.
        given: of those whose tools are given; None where a recipe has none.
        dev: by their kind, those that choose between the checkpoints of a run; "given" are those with the tool given.
    """

    whole: EpisodeSource
    given: EpisodeSource | None
    dev: dict[str, EpisodeSource]

    @classmethod
    def of(cls, recipe: Recipe, data: DataSet | None = None) -> "RunData":
        """The sources of a recipe.

        Args:
            data: in place of the recipe's data folders.

        Raises:
            DataError: the recipe names no data, a folder is damaged or holds no dev split, or a sampler's setting is
                not usable.
        """
        if data is None and not recipe.data:
            raise DataError("the recipe names no data: give folders with --data (see `loragen-agents data build`)")
        if data is None and (samplers := gpt4tools_samplers(recipe.data, recipe.sampler, recipe.seed)) is not None:
            return cls(samplers[0], None, samplers[1])
        data = data or load_data(*recipe.data)
        options = checked_options(SamplerOptions, recipe.sampler)
        whole = RegistrySampler(data, seed=recipe.seed, options=options)
        given: EpisodeSource | None = None
        if recipe.whole_every > 1:
            options = checked_options(SamplerOptions, {**recipe.sampler, **recipe.given_sampler})
            given = RegistrySampler(data, seed=recipe.seed + 1, options=options)
        return cls(whole, given, _dev_samplers(data, recipe))

    def training_episodes(self, renderer: PromptRenderer, recipe: Recipe, count: int) -> EpisodeDataset:
        """The first `count` episodes of a run."""
        return EpisodeDataset(self.whole, renderer, recipe, count, self.given)

    def background_episodes(self, renderer: PromptRenderer, recipe: Recipe) -> list[TokenizedEpisode]:
        """Those that set the memory's background, apart from those of the training steps."""
        return [tokenize_episode(renderer, self.whole.episode(n), max_tokens=recipe.max_tokens) for n in _BACKGROUND]

    def dev_episodes(
        self, renderer: PromptRenderer, recipe: Recipe
    ) -> dict[str, list[TokenizedEpisode | GivenEpisode]]:
        """The episodes of every evaluation, by their kind; with the tool given, each with and without notes."""
        count, limit = recipe.evaluation.episodes, recipe.max_tokens
        made: dict[str, list[TokenizedEpisode | GivenEpisode]] = {}
        for kind, source in self.dev.items():
            drawn = [source.episode(n) for n in range(count)]
            if kind == GIVEN:
                made[kind] = [
                    given_episode(renderer, episode, [noted] * len(episode.samples), limit)
                    for episode in drawn
                    for noted in ((False, True) if recipe.notes else (False,))
                ]
            else:
                made[kind] = [tokenize_episode(renderer, episode, recipe.prompt, limit) for episode in drawn]
        return made


def _dev_samplers(data: DataSet, recipe: Recipe) -> dict[str, EpisodeSource]:
    sources = {record.source: 1.0 for record in data.calls if record.split == "dev"}
    if not sources:
        raise DataError("the data has no dev split to evaluate on: expected a calls_dev.jsonl beside calls_train.jsonl")
    tools, made = recipe.evaluation.tools, dict[str, EpisodeSource]()
    kinds: tuple[NameMode, ...] = ("real", "invented")
    for names in kinds:
        options = SamplerOptions.evaluation(tools=tools, names=names, requests=4, sources=sources, irrelevant=0.25)
        made[names] = RegistrySampler(data, seed=1, split="dev", options=options)
    if recipe.whole_every > 1:
        options = SamplerOptions.evaluation(tools=4, requests=8, sources=sources)
        made[GIVEN] = RegistrySampler(data, seed=1, split="dev", options=options)
    return made
