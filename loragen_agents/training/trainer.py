"""Runs a recipe on Hugging Face's Trainer, and so on Accelerate: one process or many, stopped and gone on with at will.

What is trained is `EpisodeModel`, on the episodes of `RunData`; this module sets the optimiser up, evaluates on the dev
split and keeps checkpoints. A run's folder holds `checkpoint-N/` (what is needed to go on), `weights/` (the best
generator so far), `log.jsonl` (all rates) and TensorBoard logs.
"""

import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import Dataset, SequentialSampler
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from loragen_agents.conversation.renderers import shared_renderer
from loragen_agents.data.records import DataSet
from loragen_agents.errors import DataError
from loragen_agents.generator import GeneratorConfig, LoRAGenerator
from loragen_agents.models.language_models import LanguageModel, load_cloud_model, load_language_model
from loragen_agents.support.progress import Progress, silent
from loragen_agents.training.callbacks import Clock, KeepBest, Report, stop_after_step
from loragen_agents.training.episode_model import EpisodeModel, TokenizedEpisode
from loragen_agents.training.given_tool import GivenEpisode
from loragen_agents.training.rates import Rates
from loragen_agents.training.recipe import Recipe
from loragen_agents.training.run_data import RunData, as_batch

logger = logging.getLogger(__name__)

# Plenty: it takes a millisecond on a quiet machine.
_LAST_TENSORS_SECONDS = 1.0
# Scalars that a layer's maps are multiplied with: they learn faster than the maps.
_SCALES = ("memory.scale", "memory.match_weight")


class GeneratorTrainer(Trainer):
    """Hugging Face's Trainer for an `EpisodeModel`: episodes for tensors, rates for metrics, checkpoints as ours."""

    model: EpisodeModel

    def __init__(self, recipe: Recipe, dev: dict[str, list[TokenizedEpisode | GivenEpisode]], **settings: Any) -> None:
        super().__init__(data_collator=as_batch, **settings)
        self.recipe, self.dev = recipe, dev
        # The loss is a mean over episodes already; the Trainer is to average it over accumulated steps.
        self.model_accepts_loss_kwargs = False

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> SequentialSampler:
        dataset: Any = train_dataset if train_dataset is not None else self.train_dataset
        return SequentialSampler(dataset)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW; the tool memory's scales learn faster than its maps."""
        recipe = self.recipe
        groups: dict[float, list[torch.nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            factor = recipe.scale_rate if name.endswith(_SCALES) else 1.0
            groups.setdefault(factor * recipe.learning_rate, []).append(parameter)
        by_rate = [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]
        self.optimizer = torch.optim.AdamW(by_rate, betas=(0.9, recipe.beta2), weight_decay=recipe.weight_decay)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """A cosine behind the warm-up: over the steps, or over the time where the recipe gives minutes."""
        if self.recipe.minutes is None:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            clock = Clock(self.recipe.minutes)
            self.add_callback(clock)
            warmup = max(1, self.recipe.warmup)

            def factor(step: int) -> float:
                return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, clock.part)))

            optimizer = optimizer if optimizer is not None else self.optimizer
            assert optimizer is not None
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean loss of a batch of episodes (paper Eq. 10)."""
        loss = model(inputs["episodes"])
        return (loss, None) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the rates since the last log, over all processes, to what the Trainer logs."""
        if "loss" in logs:
            rates = Rates.joined(gather_object([self.model.rates]))
            logs.update({name: round(value, 4) for name, value in rates.means().items()})
            self.model.rates.clear()
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Rates on the dev episodes, by kind of names, and the score that runs are compared by."""
        training, counted = self.model.training, self.model.rates
        self.model.eval()
        metrics: dict[str, float] = {}
        for kind, episodes in self.dev.items():
            self.model.rates = Rates()
            for episode in episodes:
                self.model([episode])
            metrics |= {f"{metric_key_prefix}_{kind}_{k}": round(v, 4) for k, v in self.model.rates.means().items()}
        self.model.rates = counted
        self.model.train(training)
        # With a tool memory it is the match by which the specialised model decides whether a request calls for a tool.
        deciding = "serves" if any(name.endswith("_serves") for name in metrics) else "decision"
        rates = [
            metrics[f"{metric_key_prefix}_{kind}_{part}"]
            for kind in self.dev
            for part in ("name", deciding, "given_call")
            if f"{metric_key_prefix}_{kind}_{part}" in metrics
        ]
        metrics[f"{metric_key_prefix}_score"] = sum(rates) / max(1, len(rates))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        self.model.generator.save(Path(output_dir or str(self.args.output_dir)) / "weights")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        _take_over(self.model.generator, Path(resume_from_checkpoint) / "weights")

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        _take_over(self.model.generator, Path(self.state.best_model_checkpoint) / "weights")


def train(
    recipe: Recipe,
    folder: str | Path,
    *,
    resume: bool = False,
    data: DataSet | None = None,
    progress: Progress = silent,
) -> Path:
    """Run a recipe; returns the folder of the best generator, `folder/weights`.

    Args:
        folder: the run's folder, made if it is missing.
        resume: go on from the last checkpoint in `folder`.
        data: in place of the recipe's data folders.
        progress: told every step.

    Raises:
        DataError: there is no data, or `folder` holds a run already and `resume` is False (or the other way round).
        CheckpointError: the weights to begin with are damaged or for another model.
    """
    folder = Path(folder)
    last = _last_checkpoint(folder, resume)
    run_data = RunData.of(recipe, data)
    set_seed(recipe.seed)
    edge, cloud = _language_models(recipe)
    renderer = shared_renderer(edge.tokenizer)
    model = EpisodeModel(
        _new_generator(recipe, cloud, edge),
        renderer,
        weights=recipe.loss_weights,
        match_weight=recipe.match_weight,
        given_weight=recipe.given_weight,
        first_layer=recipe.first_layer,
        batch_tokens=recipe.batch_tokens,
    )
    if last is None and recipe.start_from is None:
        model.set_background(run_data.background_episodes(renderer, recipe))
    grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
    arguments = _arguments(recipe, folder, on_cpu=edge.device.type == "cpu")
    episodes = recipe.steps * recipe.episodes * recipe.accumulation * max(1, arguments.world_size)
    trainer = GeneratorTrainer(
        recipe,
        run_data.dev_episodes(renderer, recipe),
        model=model,
        args=arguments,
        train_dataset=run_data.training_episodes(renderer, recipe, episodes),
        eval_dataset=[],
        callbacks=[EarlyStoppingCallback(recipe.evaluation.patience), KeepBest(folder), Report(folder, progress)],
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    model.train()
    with stop_after_step(trainer), _own_process_group(grouped):
        trainer.train(resume_from_checkpoint=last)
    if not (folder / "weights").is_dir() and arguments.should_save:
        model.generator.eval().save(folder / "weights")
    return folder / "weights"


def _last_checkpoint(folder: Path, resume: bool) -> str | None:
    """The checkpoint to go on from; None for a run that begins."""
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if last is not None and not resume:
        raise DataError(f"{folder} holds a run already: go on with it (--resume), or choose another folder")
    if last is None and resume:
        raise DataError(f"{folder} holds no checkpoint to go on from: start the run without --resume")
    return last


def _language_models(recipe: Recipe) -> tuple[LanguageModel, LanguageModel]:
    """Edge and cloud LM; one object where they are the same model."""
    edge = load_language_model(recipe.edge, dtype=recipe.dtype)
    cloud = load_cloud_model(recipe.cloud, edge, dtype=recipe.dtype)
    if edge.device.type == "cpu" and edge.dtype == torch.bfloat16:
        # Forward and backward of one layer's attention, 16 rows of 80 tokens, on one core with AVX-512-BF16: 11 ms, and
        # 46 ms with the fused kernel.
        edge.model.set_attn_implementation("eager")
    return edge, cloud


def _arguments(recipe: Recipe, folder: Path, *, on_cpu: bool) -> TrainingArguments:
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.episodes,
        gradient_accumulation_steps=recipe.accumulation,
        max_grad_norm=recipe.clip,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.03},
        learning_rate=recipe.learning_rate,
        warmup_steps=recipe.warmup,
        logging_steps=recipe.log_every,
        save_steps=recipe.save_every,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=recipe.evaluation.every,
        metric_for_best_model="score",
        greater_is_better=True,
        remove_unused_columns=False,
        report_to=["tensorboard"] if find_spec("tensorboard") else [],
        seed=recipe.seed,
        use_cpu=on_cpu,
        # If a backend is named for one process, Accelerate looks for a process group that does not exist.
        ddp_backend="gloo" if on_cpu and several else None,
    )


def _new_generator(recipe: Recipe, cloud: Any, edge: Any) -> LoRAGenerator:
    try:
        generator = LoRAGenerator(GeneratorConfig.from_dict(recipe.generator), cloud, edge)
    except (TypeError, ValueError) as error:
        raise DataError(f"the recipe's generator settings are not usable: {error}") from error
    if recipe.start_from is not None:
        _take_over(generator, recipe.start_from)
    return generator


def _take_over(generator: LoRAGenerator, folder: str | Path) -> None:
    """Copy the tensors of a checkpoint of the same settings into a generator.

    Heads of the checkpoint are left behind where the recipe asks for none: they are learnt behind the experts.
    """
    source = LoRAGenerator.load(folder, generator.cloud, generator.edge)
    ours, theirs = asdict(generator.config), asdict(source.config)
    for head in ("head", "argument"):
        if not ours[f"{head}_layers"]:
            theirs |= {name: ours[name] for name in (f"{head}_layers", f"{head}_width")}
    if ours != theirs:
        names = ", ".join(name for name in ours if ours[name] != theirs[name])
        raise DataError(f"{folder} has other generator settings than the recipe: {names}")
    tensors = source.own_tensors()
    with torch.no_grad():
        for name, tensor in generator.own_tensors().items():
            tensor.copy_(tensors[name])


@contextmanager
def _own_process_group(given: bool) -> Iterator[None]:
    """Leave the process group that the Trainer made, unless it was there before.

    A process that ends with the group's threads still running may abort, after all the work is done. When the run
    fails, the group stays: the launcher ends the other processes, which may be waiting in it.
    """
    yield
    if not given and torch.distributed.is_available() and torch.distributed.is_initialized():
        # A thread of gloo that still drops the tensors of its last gather needs the interpreter lock, which the group's
        # destructor holds while it waits for that thread. The barrier gives the lock up until the gathers are done, and
        # the pause until their tensors are dropped, also by a thread that a busy machine keeps waiting.
        torch.distributed.barrier()
        time.sleep(_LAST_TENSORS_SECONDS)
        torch.distributed.destroy_process_group()
