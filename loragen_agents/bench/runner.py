"""The run itself: every row on every sample, block by block, with a record kept for each.

Rows take turns on the same block of samples, so that a run that is stopped early compares all rows on the same samples,
and a machine that slows down slows all of them down. Knows nothing of models (an `Engine` runs them), files (a
`RunFolder` keeps them) or the terminal (`progress` is told).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Protocol

from loragen_agents.bench.costs import TurnCost
from loragen_agents.bench.results import Record, RunFolder
from loragen_agents.bench.rows import Row
from loragen_agents.bench.tasks import BenchSample, Task, step_record
from loragen_agents.conversation.prompts import THOUGHT_QUESTION, TakenStep, Turn
from loragen_agents.conversation.react import OBSERVATION_STOP, Answer, parse_step
from loragen_agents.registry import ToolRegistry


@dataclass(frozen=True)
class Written:
    """What a row wrote after the thought question, why it stopped (stop, length), and what it cost."""

    prompt: str
    text: str
    finish: str
    cost: TurnCost


class Session(Protocol):
    """A row that is ready for one registry.

    setup_seconds: what getting ready took; None for rows that have nothing to get ready, and once it is recorded.
    """

    setup_seconds: float | None

    def write(self, turns: Sequence[Turn]) -> Written: ...


class Engine(Protocol):
    """Runs rows. `open` may return a session that is still there from the last block."""

    def open(self, row: Row, registry: ToolRegistry, system_text: str) -> Session: ...


def run_rows(
    task: Task, rows: Sequence[Row], engine: Engine, folder: RunFolder, progress: Callable[[Record], None]
) -> None:
    """Score what is not in `folder` yet. An interrupt leaves every finished record there."""
    done = folder.done
    for block in task.blocks():
        for row in rows:
            pending = [sample for sample in block if (row.name, sample.id) not in done]
            if not pending:
                continue
            session = engine.open(row, block[0].registry, block[0].system_text)
            for sample in pending:
                record = _record(task, row, sample, _write(session, sample))
                # Once a session: a registry that serves several blocks was set up for all of them.
                record["setup_seconds"] = session.setup_seconds
                session.setup_seconds = None
                folder.add(record)
                progress(record)


def _write(session: Session, sample: BenchSample) -> Written:
    """What the row writes; where several steps are due, one after the other, with the gold observation after each.

    The cost is the first step's: a turn is one call of the model.
    """
    written = first = session.write(sample.turns)
    *earlier, last = sample.turns
    text = written.text
    for due in sample.due[:-1]:
        step = parse_step(written.text, sample.registry, cut_off=written.finish == "length")
        if isinstance(step, Answer) or step.action is None or step.action_input is None:
            break
        last = replace(last, steps=(*last.steps, TakenStep(step.action, step.action_input, due.observation)))
        written = session.write((*earlier, last))
        text = f"{text}{OBSERVATION_STOP} {due.observation}\n{THOUGHT_QUESTION}{written.text}"
    return replace(first, text=text, finish=written.finish)


def _record(task: Task, row: Row, sample: BenchSample, written: Written) -> Record:
    step = parse_step(written.text, sample.registry, cut_off=written.finish == "length")
    return {
        "row": row.name,
        "id": sample.id,
        "source": sample.source,
        "kind": sample.kind,
        "request": sample.turns[-1].request,
        "prompt": written.prompt,
        "generated": written.text,
        "finish": written.finish,
        "step": step_record(step),
        "gold": sample.gold,
        "scores": dict(task.score(sample, written.text, step)),
        "cost": asdict(written.cost),
    }
