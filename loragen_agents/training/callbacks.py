"""Callbacks of a training run: keep the best generator, report progress, end the run with a checkpoint."""

import json
import logging
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loragen_agents.generator import LoRAGenerator
from loragen_agents.support.files import replacing
from loragen_agents.support.progress import Progress

logger = logging.getLogger(__name__)

_SHOWN = {"decision": "decision", "name": "name", "arguments": "arguments", "given_call": "calls of a given tool"}


class KeepBest(TrainerCallback):
    """Writes the generator with the best score to `weights/`, with the score and step it has."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        metrics: dict[str, float] = kwargs["metrics"]
        record = self.folder / "best.json"
        best = json.loads(record.read_text())["eval_score"] if record.is_file() else -math.inf
        if state.is_world_process_zero and metrics["eval_score"] > best:
            generator: LoRAGenerator = kwargs["model"].generator
            generator.notes = {"step": state.global_step, **metrics}
            generator.save(self.folder / "weights", dtype=torch.bfloat16)
            with replacing(record) as temporary:
                temporary.write_text(json.dumps(generator.notes, indent=2) + "\n")


class Report(TrainerCallback):
    """Tells the progress callback every step; its text changes with the rates, every few steps.

    All rates are written to the run's `log.jsonl`, a line each time.
    """

    def __init__(self, folder: Path, progress: Progress) -> None:
        self.log, self.progress, self.text = folder / "log.jsonl", progress, "Training"

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs: dict[str, float] = kwargs.get("logs") or {}
        if "loss" in logs:
            shown = {word: logs[name] for name, word in _SHOWN.items() if name in logs}
            rates = ", ".join(f"{word} {value:.0%}" for word, value in shown.items())
            self.text = f"Step {state.global_step} of {state.max_steps} (loss {logs['loss']:.2f}; right: {rates})"
        if state.is_world_process_zero:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.progress(self.text, state.global_step / state.max_steps)


class Clock(TrainerCallback):
    """Ends the run when its time is over; `part` is how much of it has passed, the same on all processes."""

    def __init__(self, minutes: float) -> None:
        self.seconds, self.part, self.begin = 60 * minutes, 0.0, time.monotonic()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begin = time.monotonic()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        parts = broadcast_object_list([(time.monotonic() - self.begin) / self.seconds])
        self.part = float(parts[0])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.part >= 1:
            control.should_save = control.should_training_stop = True


class _StopRequest(TrainerCallback):
    """Ends the run behind the current step, with a checkpoint."""

    def __init__(self) -> None:
        self.wanted = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.wanted:
            control.should_save = control.should_training_stop = True


@contextmanager
def stop_after_step(trainer: Trainer) -> Iterator[None]:
    """Let the first Ctrl-C end the run in good order; a second one interrupts at once."""
    request = _StopRequest()
    trainer.add_callback(request)
    before: Any = None

    def stop(signum: int, frame: Any) -> None:
        if request.wanted:
            raise KeyboardInterrupt
        request.wanted = True
        logger.warning("stopping behind this step; press Ctrl-C again to stop at once")

    try:
        before = signal.signal(signal.SIGINT, stop)
    except ValueError:  # not the main thread, which alone may catch signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if request.wanted:
        raise KeyboardInterrupt
