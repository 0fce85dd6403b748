"""The recipe of an argument head: one YAML a run, checked when it is read. Knows what a run consists of, no more."""

from typing import Literal

from pydantic import Field

from loragen_agents.training.head_recipe import HeadRunRecipe


class ArgumentRecipe(HeadRunRecipe):
    """One run that trains the argument head of a generator, and nothing else of it."""

    trains: Literal["argument head"] = "argument head"
    argument_layers: int = Field(11, ge=1, description="in how many of the edge LM's layers the head looks")
    argument_width: int = Field(128, ge=1, description="numbers in each part of an argument's vector")
    argument_hidden: int = Field(192, ge=4, multiple_of=4, description="numbers that a request's token is brought to")
    requests: int = Field(30, ge=1, description="requests of each tool, at most")
    of_source: int = Field(3000, ge=1, description="requests of each source, at most")
    joined: int = Field(1200, ge=0, description="pairs of requests in one, with the first or the second call due")
    earlier: int = Field(1200, ge=0, description="requests behind a turn that was dealt with")
    step_requests: int = Field(48, ge=1, description="requests of a step, each with the tool that it calls")
    dropped: float = Field(0.3, ge=0, lt=1, description="share of the optional arguments not given that are left out")
    strange: float = Field(0.6, ge=0, le=1, description="share of tools that get arguments of other sources' tools")
    required: float = Field(0.15, ge=0, le=1, description="share of required arguments that are learnt from as well")
    reworded: float = Field(0.67, ge=0, le=1, description="share of tools that are read by other words than their own")
    dropout: float = Field(0.4, ge=0, lt=1)
    token_weight: float = Field(0.5, ge=0, description="weight of the loss on what each token stands for")
    span_weight: float = Field(0.3, ge=0, description="weight of the loss on where each value begins and ends")
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.02, ge=0)
