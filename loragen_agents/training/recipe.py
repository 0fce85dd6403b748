"""Training recipes: one YAML a run, checked when it is read. Knows what a run consists of, not how it goes."""

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, ValidationError

from loragen_agents.data.episodes import Part
from loragen_agents.data.options import problems_in_words
from loragen_agents.errors import DataError
from loragen_agents.models.language_models import DEFAULT_MODEL
from loragen_agents.support.content import content_folder
from loragen_agents.training.argument_recipe import ArgumentRecipe
from loragen_agents.training.head_recipe import HeadRecipe


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Evaluation(_Strict):
    """Dev episodes between the training steps; the run's best checkpoint is the one with the highest score."""

    every: int = Field(100, ge=1, description="training steps between two evaluations")
    episodes: int = Field(24, ge=1, description="dev episodes of each kind of names")
    tools: int = Field(8, ge=2, description="tools in a dev registry")
    patience: int = Field(5, ge=1, description="evaluations without a better score before the run stops")


class Recipe(_Strict):
    """One training run.

    The score of an evaluation is the mean of the rates of right names (real and invented) and right decisions, which
    with a tool memory are those of its match, and of right calls where steps with the tool given are trained.
    """

    cloud: str = DEFAULT_MODEL
    edge: str = DEFAULT_MODEL
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    generator: dict[str, Any] = Field(default_factory=dict, description="settings of GeneratorConfig")
    prompt: Literal["user_turn", "full_react"] = "user_turn"
    start_from: str | None = Field(None, description="a generator's folder, or 'default', whose weights to begin with")
    data: tuple[str, ...] = Field((), description="data folders, as `loragen-agents data build` writes them")
    sampler: dict[str, Any] = Field(default_factory=dict, description="settings of SamplerOptions")
    whole_every: int = Field(1, ge=1, description="one episode in so many is whole; in the others the tool is given")
    given_sampler: dict[str, Any] = Field(default_factory=dict, description="of the episodes with the tool given")
    given_weight: float = Field(1.5, ge=0, description="of the arguments' loss where the tool is given")
    notes: float = Field(0.0, ge=0, le=1, description="share of these requests with the tool's argument notes")
    loss_weights: dict[Part, NonNegativeFloat] = Field(default_factory=dict, description="of the parts of a step")
    match_weight: float = Field(0.5, ge=0)
    first_layer: int = Field(0, ge=0, description="edge layers below get no LoRA weights")
    max_tokens: int = Field(2048, ge=32, description="longer samples are left out")
    batch_tokens: int = Field(1024, ge=32, description="tokens, with padding, that run through the edge LM at once")
    steps: int = Field(ge=1)
    minutes: float | None = Field(None, gt=0, description="end after so long, with the cosine over the time, not steps")
    episodes: int = Field(1, ge=1, description="registries of a step, on each process")
    accumulation: int = Field(1, ge=1, description="steps whose gradients are added up before the weights change")
    learning_rate: float = Field(7e-4, gt=0)
    scale_rate: float = Field(8.0, gt=0, description="the memory's scales learn this many times as fast")
    warmup: int = Field(20, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    beta2: float = Field(0.98, gt=0, lt=1)
    clip: float = Field(1.0, gt=0)
    seed: int = 0
    save_every: int = Field(50, ge=1)
    log_every: int = Field(10, ge=1)
    evaluation: Evaluation = Field(default_factory=Evaluation)  # type: ignore[arg-type]

    @classmethod
    def load(cls, name: str | Path) -> "Recipe":
        """Read a recipe file, or one of the package's own by its name.

        Raises:
            DataError: there is no such file, it is no YAML, or a setting is unknown or out of range.
        """
        recipe = load_recipe(name)
        if not isinstance(recipe, cls):
            raise DataError(f"{recipe_file(name)} is the recipe of a head, not of a generator's weights")
        return recipe


def load_recipe(name: str | Path) -> Recipe | HeadRecipe | ArgumentRecipe:
    """Read a recipe of any kind: that of a head says so, with `trains: head` or `trains: argument head`.

    Raises:
        DataError: as `Recipe.load`.
    """
    path = recipe_file(name)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} can't be read: {error}") from error
    except yaml.YAMLError as error:
        raise DataError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected settings, one a line, as `steps: 800`")
    try:
        if content.get("trains") == "argument head":
            return ArgumentRecipe.model_validate(content)
        return (HeadRecipe if "trains" in content else Recipe).model_validate(content)
    except ValidationError as error:
        raise DataError(f"{path}: {problems_in_words(error)}") from error


def recipe_file(name: str | Path) -> Path:
    """The file of a recipe: a path as it is, else `training/NAME.yaml` of the package.

    Raises:
        DataError: neither is there; the message lists the package's recipes.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    own = content_folder("training") / f"{path.name.removesuffix('.yaml')}.yaml"
    if not own.is_file():
        known = ", ".join(sorted(file.stem for file in content_folder("training").glob("*.yaml")))
        raise DataError(f"there is no recipe {str(name)!r}: give a YAML file, or one of {known}")
    return own
