"""How episodes are drawn: every probability of the samplers in one plain value. Knows nothing of data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from loragen_agents.data.episodes import SampleKind
from loragen_agents.errors import DataError
from loragen_agents.registry import InputFormat

NameMode = Literal["real", "restyled", "reworded", "invented", "swapped"]
Weight = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
OptionsT = TypeVar("OptionsT")


@dataclass(frozen=True)
class SamplerOptions:
    """How episodes are drawn. Mappings give weights, floats probabilities; each augmentation has its own.

    Attributes:
        tools: (smallest, largest, weight) of ranges for the number of tools in a registry.
        gold_tools: smallest and largest number of tools with requests in a registry; more where they have few requests.
        requests: samples of an episode.
        sources: weight of each source; sources without data are passed over.
        other_sources: weight of a source that is not listed.
        mixed_sources: gold tools of a registry from several sources instead of one.
        near: share of the other tools that come from the gold tools' own domain or source, not from all tools.
        kinds: weights of the samples' kinds (`episodes.SampleKind`).
        names: weights of where a registry's names come from; "real" keeps the source's.
        mixed_names: draw that per tool instead of per registry.
        numbered_names: share of the new names that hold a number (`Make 3D Model`, `read_v2`).
        echoed_names: share of the new names that begin like a word of some gold value. Nothing but the place in a step
            tells such a name from the value then.
        short_description: only the first sentence, or its first words.
        no_description: the description only repeats the name's words (never with reworded, invented or swapped names).
        useful_description: in csv registries, the description in GPT4Tools' wording, with its input spelt out.
        renamed_arguments: per tool, other argument names.
        shuffled_arguments: per tool, another order of arguments.
        bare_arguments: per tool, no argument descriptions.
        csv: registries with csv inputs (the others take json).
        query_argument: metatool's one argument, the request itself, is kept for a tool; else the tool takes none.
        history: earlier turns before the request.
        referred: share of first calls of which one value stands in an earlier turn, where the user or a tool gave it.
        noise: share of requests that are changed as people type them (see `request_noise`).
        failed: share of taken steps whose result is an error before a final answer.
        joined: share of multi-step samples made by joining two requests instead of a row with several calls.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    tools: tuple[tuple[Count, Count, Weight], ...] = (
        (2, 3, 0.08),
        (4, 8, 0.36),
        (9, 16, 0.3),
        (17, 24, 0.18),
        (25, 32, 0.08),
    )
    gold_tools: tuple[Count, Count] = (2, 5)
    requests: Count = 8
    sources: Mapping[str, Weight] = field(
        default_factory=lambda: {
            "seal-tools": 0.24,
            "metatool": 0.2,
            "sgd": 0.22,
            "computer": 0.24,
            "described": 0.1,
        }
    )
    other_sources: Weight = 0.1
    mixed_sources: Probability = 0.4
    near: Probability = 0.5
    kinds: Mapping[SampleKind, Weight] = field(
        default_factory=lambda: {"call": 0.62, "next_call": 0.08, "final_answer": 0.1, "irrelevant": 0.12, "chat": 0.08}
    )
    names: Mapping[NameMode, Weight] = field(
        default_factory=lambda: {"real": 0.25, "restyled": 0.2, "reworded": 0.15, "invented": 0.32, "swapped": 0.08}
    )
    mixed_names: Probability = 0.1
    numbered_names: Probability = 0.08
    echoed_names: Probability = 0.08
    short_description: Probability = 0.15
    no_description: Probability = 0.04
    useful_description: Probability = 0.3
    renamed_arguments: Probability = 0.25
    shuffled_arguments: Probability = 0.2
    bare_arguments: Probability = 0.15
    csv: Probability = 0.3
    query_argument: Probability = 0.2
    history: Probability = 0.12
    referred: Probability = 0.0
    noise: Probability = 0.0
    failed: Probability = 0.1
    joined: Probability = 0.5

    @classmethod
    def evaluation(
        cls,
        *,
        tools: int,
        names: NameMode = "real",
        requests: int = 8,
        sources: Mapping[str, float] | None = None,
        near: float = 0.5,
        irrelevant: float = 0.0,
        input_format: InputFormat = "json",
    ) -> "SamplerOptions":
        """Options for the dev set: a fixed number of tools, no augmentation but the names', first calls only.

        Args:
            irrelevant: share of the requests that no tool of the registry serves.
        """
        return cls(
            tools=((tools, tools, 1.0),),
            gold_tools=(2, 4),
            requests=requests,
            sources=sources or {"seal-tools": 1.0, "metatool": 1.0, "sgd": 1.0},
            other_sources=0.0,
            mixed_sources=0.0,
            near=near,
            kinds={"call": 1.0 - irrelevant, "irrelevant": irrelevant},
            names={names: 1.0},
            mixed_names=0.0,
            numbered_names=0.0,
            echoed_names=0.0,
            short_description=0.0,
            no_description=0.0,
            useful_description=0.0,
            renamed_arguments=0.0,
            shuffled_arguments=0.0,
            bare_arguments=0.0,
            csv=1.0 if input_format == "csv" else 0.0,
            query_argument=1.0,
            history=0.0,
            failed=0.0,
        )


@dataclass(frozen=True)
class GPT4ToolsOptions:
    """How episodes are drawn from GPT4Tools rows.

    Attributes:
        requests: samples of an episode.
        tools: smallest and largest number of tools in a registry; more where the requests need more.
        answered: share of the samples in which an answer is due.
        invented: share of the registries in which every tool has an invented name.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    requests: Count = 8
    tools: tuple[Count, Count] = (4, 16)
    answered: Probability = 0.2
    invented: Probability = 0.3


def checked_options(kind: type[OptionsT], settings: Mapping[str, Any]) -> OptionsT:
    """The sampler settings of a recipe as options of their kind.

    Raises:
        DataError: a setting is unknown, of the wrong type or out of range; the message names all that are.
    """
    try:
        return TypeAdapter(kind).validate_python(dict(settings))
    except ValidationError as error:
        raise DataError(f"the recipe's sampler settings are not usable: {problems_in_words(error)}") from error


def problems_in_words(error: ValidationError) -> str:
    """What pydantic found wrong: `steps: input should be greater than 0; rate: extra inputs are not permitted`."""
    return "; ".join(f"{'.'.join(map(str, problem['loc']))}: {problem['msg'].lower()}" for problem in error.errors())
