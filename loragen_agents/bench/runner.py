"""The run itself: every variant on every sample, block by block, with a record kept for each.

Variants take turns on the same block of samples, so that a run that is stopped early compares them on the same samples,
and a machine that slows down slows all of them down. Knows nothing of models (an `Engine` runs them), files (a
`RunFolder` keeps them) or the terminal (`progress` is told).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Protocol

from loragen_agents.bench.results import Record, RunFolder
from loragen_agents.bench.tasks import BenchSample, Task, Written, step_record
from loragen_agents.bench.variants import Variant
from loragen_agents.conversation.prompts import TakenStep, Turn
from loragen_agents.conversation.react import OBSERVATION_STOP, Answer, Step, observation_text, parse_step
from loragen_agents.registry import ToolRegistry

# Of a large registry a record holds the likeliest tools only.
_TOOLS_KEPT = 5


class Session(Protocol):
    """A variant that is ready for one registry.

    Attributes:
        setup_seconds: what getting ready took; None where nothing had to be done, and once it is recorded.
    """

    setup_seconds: float | None

    def write(self, turns: Sequence[Turn]) -> Written:
        """Decode the next step."""

    def choose(self, turns: Sequence[Turn]) -> Written:
        """Choose a tool or none, and write no more than that."""


class Engine(Protocol):
    """Runs variants. `open` may return a session that is still there from the last block."""

    def open(self, variant: Variant, registry: ToolRegistry, system_text: str) -> Session: ...


def run_variants(
    task: Task, variants: Sequence[Variant], engine: Engine, folder: RunFolder, progress: Callable[[Record], None]
) -> None:
    """Score what is not in `folder` yet. An interrupt leaves every finished record there."""
    done = folder.done
    for block in task.blocks():
        for variant in variants:
            pending = [sample for sample in block if (variant.name, sample.id) not in done]
            if not pending:
                continue
            session = engine.open(variant, block[0].registry, block[0].system_text)
            for sample in pending:
                if task.choice_only:
                    written = session.choose(sample.turns)
                    steps = [_step(written, sample)]
                else:
                    written, steps = _write(session, sample)
                record = _record(task, variant, sample, written, steps)
                # Once a session: a registry that serves several blocks was set up for all of them.
                record["setup_seconds"] = session.setup_seconds
                session.setup_seconds = None
                folder.add(record)
                progress(record)


def _write(session: Session, sample: BenchSample) -> tuple[Written, list[Step]]:
    """What the variant writes; where several steps are due, one after the other, with the gold observation after each.

    Calls may come in another order than the gold ones: a call is followed by what its own tool reports. The cost is the
    first step's: a turn is one call of the model.
    """
    written = first = session.write(sample.turns)
    steps = [_step(written, sample)]
    *earlier, last = sample.turns
    text = written.text
    due = list(sample.due)
    while len(due) > 1:
        step = steps[-1]
        if isinstance(step, Answer) or step.action is None or step.action_input is None:
            break
        report = due.pop(next((place for place, one in enumerate(due) if one.action == step.action), 0)).observation
        last = replace(last, steps=(*last.steps, TakenStep(step.action, step.action_input, report)))
        written = session.write((*earlier, last))
        steps.append(_step(written, sample))
        text = f"{text}{OBSERVATION_STOP}{observation_text(report)}{written.text}"
    return replace(first, text=text, finish=written.finish), steps


def _step(written: Written, sample: BenchSample) -> Step:
    return parse_step(written.text, sample.registry, cut_off=written.finish == "length")


def _record(task: Task, variant: Variant, sample: BenchSample, written: Written, steps: Sequence[Step]) -> Record:
    likeliest = sorted((written.tools or {}).items(), key=lambda item: -item[1])[:_TOOLS_KEPT]
    return {
        "variant": variant.name,
        "id": sample.id,
        "source": sample.source,
        "kind": sample.kind,
        "request": sample.turns[-1].request,
        "prompt": written.prompt,
        "generated": written.text,
        "finish": written.finish,
        "step": step_record(steps[-1]),
        "tools": {name: round(probability, 4) for name, probability in likeliest},
        "gold": sample.gold,
        "scores": dict(task.score(sample, written, steps)),
        "cost": asdict(written.cost),
    }
