"""The recipe of a tool head: one YAML a run, checked when it is read. Knows what a run consists of, not how it goes."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from loragen_agents.models.language_models import DEFAULT_MODEL


class HeadRunRecipe(BaseModel):
    """What all runs that train a head, and nothing else of a generator, have in common."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cloud: str = DEFAULT_MODEL
    edge: str = DEFAULT_MODEL
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    start_from: str = Field("default", description="the generator's folder, or 'default', that gets the head")
    data: tuple[str, ...] = Field((), description="data folders, as `loragen-agents data build` writes them")
    max_characters: int = Field(400, ge=10, description="longer requests are left out")
    steps: int = Field(1200, ge=1)
    seed: int = 0


class HeadRecipe(HeadRunRecipe):
    """One run that trains the tool head of a generator, and nothing else of it."""

    trains: Literal["head"] = "head"
    head_layers: int = Field(10, ge=1, description="how many of the edge LM's last layers the head looks at")
    head_width: int = Field(64, ge=1, description="numbers that each layer and place gives to a vector")
    requests: int = Field(20, ge=1, description="requests of each tool, at most")
    uncalled_tools: int = Field(700, ge=0, description="tools without requests that stand in registries, at most")
    invented_names: int = Field(150, ge=1, description="names that stand for those of tools in some registries")
    small_talk: int = Field(450, ge=0, description="draws of requests that take no tool")
    later_steps: int = Field(9000, ge=0, description="requests with several calls, before and behind their steps")
    directions: int = Field(384, ge=1, description="leading directions of the activations that maps are learnt in")
    step_requests: int = Field(96, ge=1, description="requests of a step, each with a registry of its own")
    step_tools: int = Field(160, ge=2, description="tools of a step, from which its registries are drawn")
    irrelevant: float = Field(0.3, ge=0, lt=1, description="share of requests whose registry lacks their tool")
    near: float = Field(0.5, ge=0, le=1, description="share of registries of the tools most like the request")
    invented: float = Field(0.2, ge=0, le=1, description="share of tools that are read by an invented name")
    dropped: float = Field(0.25, ge=0, le=1, description="share of names and of arguments that are not read")
    dropout: float = Field(0.2, ge=0, lt=1)
    learning_rate: float = Field(2e-3, gt=0)
    weight_decay: float = Field(0.05, ge=0)
