"""What is asked and how an answer is judged: samples with their registry and gold continuation, in blocks.

A `Task` is a list of samples and a score. Samples that share a registry stand together, so that a variant specialises
once for each. Knows nothing of variants, models or timing; `gpt4tools_task` and `calls` make tasks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from loragen_agents.bench.costs import TurnCost
from loragen_agents.conversation.prompts import TakenStep, Turn
from loragen_agents.conversation.react import Answer, Step, ToolStep
from loragen_agents.data.episodes import GoldCall
from loragen_agents.registry import ToolRegistry

# A block is what one variant works on before the next variant has its turn.
BLOCK = 8


@dataclass(frozen=True)
class BenchSample:
    """One open conversation and its gold continuation.

    Attributes:
        id: unique in its task; results are paired by it.
        source: where it comes from; means are also given by source.
        kind: what it is a sample of (positive, context, ...); means are also given by kind.
        registry, system_text: what is compressed, or put into the prompt.
        turns: the conversation; the last turn is open.
        gold: the gold continuation as text, from `Thought:` on.
        calls: the gold calls, where the task judges calls, in any order; none where an answer without a tool is due.
        due: where the gold continuation takes several steps, all of them. After each of its own steps the model is
            shown what the gold step of that tool reports.
    """

    id: str
    source: str
    kind: str
    registry: ToolRegistry
    turns: tuple[Turn, ...]
    gold: str
    system_text: str = ""
    calls: tuple[GoldCall, ...] = ()
    due: tuple[TakenStep, ...] = ()


@dataclass(frozen=True)
class Written:
    """What a variant wrote after the thought question, why it stopped (stop, length), and what it cost.

    Attributes:
        tools: where all tools were scored, each one's probability, given that one is called (or its cosine).
    """

    prompt: str
    text: str
    finish: str
    cost: TurnCost
    tools: Mapping[str, float] | None = None


class Scorer(Protocol):
    """Judges what a model wrote after `Thought: Do I need to use a tool?`; gives the metrics that apply.

    Args:
        written: of several steps, the first one's cost and all of their text.
        steps: each step, parsed.
    """

    def __call__(self, sample: BenchSample, written: Written, steps: Sequence[Step]) -> Mapping[str, float]: ...


@dataclass(frozen=True)
class Task:
    """Samples, their score, and what the result says about them.

    Attributes:
        name: the command's word for it; `title` is for people.
        metrics: metric -> heading, in the order of the table. Every score's keys are among them.
        settings: what the samples were drawn by; goes into the result and is compared on resume.
        choice_only: whether only the choice of a tool is asked for, which takes no decoding.
    """

    name: str
    title: str
    metrics: Mapping[str, str]
    samples: Sequence[BenchSample]
    score: Scorer
    settings: Mapping[str, Any] = field(default_factory=dict)
    choice_only: bool = False

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all samples, registries included."""
        digest = hashlib.sha256()
        for sample in self.samples:
            content = [sample.id, sample.registry.fingerprint, sample.system_text, repr(sample.turns), sample.gold]
            digest.update(json.dumps(content).encode())
        return digest.hexdigest()

    def blocks(self) -> Iterator[list[BenchSample]]:
        """The samples in runs of at most `BLOCK` that share registry and system text."""
        block: list[BenchSample] = []
        for sample in self.samples:
            if block and (len(block) == BLOCK or not _together(block[0], sample)):
                yield block
                block = []
            block.append(sample)
        if block:
            yield block


def _together(a: BenchSample, b: BenchSample) -> bool:
    return a.registry.fingerprint == b.registry.fingerprint and a.system_text == b.system_text


def step_record(step: Step) -> dict[str, Any]:
    """A parsed step as plain values, for `predictions.jsonl`."""
    if isinstance(step, ToolStep):
        return {"kind": "tool", "action": step.action, "input": step.action_input, "arguments": step.arguments}
    if isinstance(step, Answer):
        return {"kind": "answer", "text": step.text}
    return {"kind": "invalid", "action": step.action, "input": step.action_input, "error": step.error}
