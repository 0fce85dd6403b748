"""What a training step sees: a registry and requests to it, each with the one right continuation.

An `Episode` shares its registry among all of its samples. A `Sample` is an open conversation and what the assistant
does next; `target_parts` writes that as the text which follows `Thought: Do I need to use a tool?`. Episodes
are drawn by `sampler`; tokens and losses are the trainer's part.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from loragen_agents.conversation.prompts import Turn
from loragen_agents.conversation.react import (
    ACTION,
    ACTION_INPUT,
    ANSWER,
    NO_TOOL,
    OBSERVATION_STOP,
    USE_TOOL,
    format_action_input,
)
from loragen_agents.registry import ToolRegistry

SampleKind = Literal["call", "next_call", "final_answer", "irrelevant", "chat"]
Part = Literal["decision", "format", "name", "arguments", "answer"]


@dataclass(frozen=True)
class GoldCall:
    """The right next step: a tool of the episode's registry, by its name there, and its arguments."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """One open conversation and its right continuation.

    Attributes:
        turns: the conversation; the last turn is open (`answer` is None) and holds the steps taken so far.
        gold: the next call, or the text of the answer where no tool is to be called (any more).
        kind: `call` (first call of a request), `next_call` (after steps), `final_answer` (after the last step),
            `irrelevant` (no tool of the registry serves the request) or `chat` (it takes no tool).
        source: where the request comes from.
        tool: id of the gold tool in its source; None where the gold is an answer.
    """

    turns: tuple[Turn, ...]
    gold: GoldCall | str
    kind: SampleKind
    source: str
    tool: str | None = None


@dataclass(frozen=True)
class Episode:
    """A registry and the samples that it serves; `tool_ids` are the registry's tools in order, by their source ids."""

    registry: ToolRegistry
    tool_ids: tuple[str, ...]
    samples: tuple[Sample, ...]


class TextPart(NamedTuple):
    """A stretch of target text and what it decides, so that losses can be told apart and weighted."""

    part: Part
    text: str


def target_parts(sample: Sample, registry: ToolRegistry) -> list[TextPart]:
    """The text that follows `Thought: Do I need to use a tool?`, in parts.

    A call gives ` Yes` · `\\nAction:` · ` NAME` · `\\nAction Input:` · ` INPUT` · `\\nObservation:`, an answer gives
    ` No` · `\\nAI:` · ` ANSWER`; the end of the turn is left to the tokenizer's side.

    Raises:
        ArgumentError: the registry's input format can't express the arguments.
        KeyError: the registry has no tool of that name.
    """
    if isinstance(sample.gold, str):
        return [TextPart("decision", NO_TOOL), TextPart("format", ANSWER), TextPart("answer", f" {sample.gold}")]
    action_input = format_action_input(registry[sample.gold.name], sample.gold.arguments, registry.input_format)
    return [
        TextPart("decision", USE_TOOL),
        TextPart("format", ACTION),
        TextPart("name", f" {sample.gold.name}"),
        TextPart("format", ACTION_INPUT),
        TextPart("arguments", f" {action_input}"),
        TextPart("format", OBSERVATION_STOP),
    ]


def target_text(sample: Sample, registry: ToolRegistry) -> str:
    """The parts of `target_parts` as one text."""
    return "".join(part.text for part in target_parts(sample, registry))


def plain_episode(episode: Episode) -> dict[str, Any]:
    """The episode as plain values, for `data sample` and other ways to look at what is drawn."""
    return {
        "input_format": episode.registry.input_format,
        "tools": [tool.model_dump() for tool in episode.registry],
        "samples": [
            {
                "kind": sample.kind,
                "source": sample.source,
                "requests": [turn.request for turn in sample.turns],
                "steps": [asdict(step) for step in sample.turns[-1].steps],
                "target": target_text(sample, episode.registry).strip(),
            }
            for sample in episode.samples
        ],
    }
