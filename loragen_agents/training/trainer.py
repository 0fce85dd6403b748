"""Runs a recipe on Hugging Face's Trainer, and so on Accelerate: one process or many, stopped and gone on with at will.

What is trained is `EpisodeModel`; this module draws the episodes, sets the optimiser up, evaluates on the dev split
and keeps checkpoints. A run's folder holds `checkpoint-N/` (what is needed to go on), `weights/` (the best generator so
far) and TensorBoard logs. An episode is a function of seed and number, so a resumed run sees what an unbroken one would
have seen.
"""

import json
import logging
import math
import os
import signal
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
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from loragen_agents.conversation.renderers import shared_renderer
from loragen_agents.data.gpt4tools_episodes import EpisodeSource, gpt4tools_samplers
from loragen_agents.data.options import NameMode, SamplerOptions, checked_options
from loragen_agents.data.records import DataSet, load_data
from loragen_agents.data.sampler import RegistrySampler
from loragen_agents.errors import DataError
from loragen_agents.generator import GeneratorConfig, LoRAGenerator
from loragen_agents.models.language_models import load_language_model
from loragen_agents.support.files import replacing
from loragen_agents.support.progress import Progress, silent
from loragen_agents.training.episode_model import EpisodeModel, Rates, TokenizedEpisode, tokenize_episode
from loragen_agents.training.recipe import Recipe

logger = logging.getLogger(__name__)

# Numbers of episodes that set the memory's background, apart from those of the training steps.
_BACKGROUND = range(10**9, 10**9 + 6)
# Scalars that a layer's maps are multiplied with: they learn faster than the maps.
_SCALES = ("memory.scale", "memory.match_weight")


class EpisodeDataset(Dataset[TokenizedEpisode]):
    """Episodes 0 to count - 1 of a sampler, drawn and tokenised when they are asked for."""

    def __init__(self, sampler: EpisodeSource, renderer: Any, recipe: Recipe, count: int) -> None:
        self.sampler, self.renderer, self.recipe, self.count = sampler, renderer, recipe, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> TokenizedEpisode:
        episode = self.sampler.episode(index)
        return tokenize_episode(self.renderer, episode, self.recipe.prompt, self.recipe.max_tokens)


class GeneratorTrainer(Trainer):
    """Hugging Face's Trainer for an `EpisodeModel`: episodes for tensors, rates for metrics, checkpoints as ours."""

    model: EpisodeModel

    def __init__(self, recipe: Recipe, dev: dict[str, list[TokenizedEpisode]], **settings: Any) -> None:
        super().__init__(data_collator=_as_batch, **settings)
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
            for part in ("name", deciding)
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

    folder: the run's folder, made if it is missing.
    resume: go on from the last checkpoint in `folder`.
    data: in place of the recipe's data folders.
    progress: told every step.

    Raises:
        DataError: there is no data, or `folder` holds a run already and `resume` is False (or the other way round).
        CheckpointError: the weights to begin with are damaged or for another model.
    """
    folder = Path(folder)
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if last is not None and not resume:
        raise DataError(f"{folder} holds a run already: go on with it (--resume), or choose another folder")
    if last is None and resume:
        raise DataError(f"{folder} holds no checkpoint to go on from: start the run without --resume")
    if data is None and not recipe.data:
        raise DataError("the recipe names no data: give folders with --data (see `loragen-agents data build`)")
    sampler, dev_samplers = _samplers(recipe, data)
    set_seed(recipe.seed)
    edge = load_language_model(recipe.edge, dtype=recipe.dtype)
    cloud = edge if recipe.cloud == recipe.edge else load_language_model(recipe.cloud, dtype=recipe.dtype)
    generator = _new_generator(recipe, cloud, edge)
    renderer = shared_renderer(edge.tokenizer)
    model = EpisodeModel(
        generator,
        renderer,
        weights=recipe.loss_weights,
        match_weight=recipe.match_weight,
        first_layer=recipe.first_layer,
        batch_tokens=recipe.batch_tokens,
    )
    if last is None and recipe.start_from is None:
        model.set_background(
            [tokenize_episode(renderer, sampler.episode(n), max_tokens=recipe.max_tokens) for n in _BACKGROUND]
        )
    grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
    on_cpu = edge.model.device.type == "cpu"
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    arguments = TrainingArguments(
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
        # Named without need, the backend would have Accelerate look for a process group that nobody has made.
        ddp_backend="gloo" if on_cpu and several else None,
    )
    processes = max(1, arguments.world_size)
    trainer = GeneratorTrainer(
        recipe,
        _dev_episodes(dev_samplers, renderer, recipe),
        model=model,
        args=arguments,
        train_dataset=EpisodeDataset(
            sampler, renderer, recipe, recipe.steps * recipe.episodes * recipe.accumulation * processes
        ),
        eval_dataset=[],
        callbacks=[EarlyStoppingCallback(recipe.evaluation.patience), _KeepBest(folder), _Report(progress)],
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    model.train()
    with _stop_after_step(trainer), _own_process_group(grouped):
        trainer.train(resume_from_checkpoint=last)
    if not (folder / "weights").is_dir() and arguments.should_save:
        generator.eval().save(folder / "weights")
    return folder / "weights"


def _as_batch(episodes: list[TokenizedEpisode]) -> dict[str, list[TokenizedEpisode]]:
    return {"episodes": episodes}


def _new_generator(recipe: Recipe, cloud: Any, edge: Any) -> LoRAGenerator:
    try:
        config = GeneratorConfig.from_dict(recipe.generator)
    except (TypeError, ValueError) as error:
        raise DataError(f"the recipe's generator settings are not usable: {error}") from error
    generator = LoRAGenerator(config, cloud, edge)
    if recipe.start_from is not None:
        _take_over(generator, recipe.start_from)
    return generator


def _take_over(generator: LoRAGenerator, folder: str | Path) -> None:
    """Copy the tensors of a checkpoint of the same settings into a generator."""
    source = LoRAGenerator.load(folder, generator.cloud, generator.edge)
    if source.config != generator.config:
        ours, theirs = asdict(generator.config), asdict(source.config)
        names = ", ".join(name for name in ours if ours[name] != theirs[name])
        raise DataError(f"{folder} has other generator settings than the recipe: {names}")
    tensors = source.own_tensors()
    with torch.no_grad():
        for name, tensor in generator.own_tensors().items():
            tensor.copy_(tensors[name])


def _samplers(recipe: Recipe, data: DataSet | None) -> tuple[EpisodeSource, dict[str, EpisodeSource]]:
    """The training sampler of a recipe, and those of its evaluations by their kind of names."""
    if data is None and (samplers := gpt4tools_samplers(recipe.data, recipe.sampler, recipe.seed)) is not None:
        return samplers
    options = checked_options(SamplerOptions, recipe.sampler)
    data = data or load_data(*recipe.data)
    return RegistrySampler(data, seed=recipe.seed, options=options), _dev_samplers(data, recipe)


def _dev_samplers(data: DataSet, recipe: Recipe) -> dict[str, EpisodeSource]:
    sources = {record.source: 1.0 for record in data.calls if record.split == "dev"}
    if not sources:
        raise DataError("the data has no dev split to evaluate on: expected a calls_dev.jsonl beside calls_train.jsonl")
    made: dict[str, EpisodeSource] = {}
    kinds: tuple[NameMode, ...] = ("real", "invented")
    for names in kinds:
        options = SamplerOptions.evaluation(
            tools=recipe.evaluation.tools, names=names, requests=4, sources=sources, unserved=0.25
        )
        made[names] = RegistrySampler(data, seed=1, split="dev", options=options)
    return made


def _dev_episodes(
    samplers: dict[str, EpisodeSource], renderer: Any, recipe: Recipe
) -> dict[str, list[TokenizedEpisode]]:
    return {
        names: [
            tokenize_episode(renderer, sampler.episode(n), recipe.prompt, recipe.max_tokens)
            for n in range(recipe.evaluation.episodes)
        ]
        for names, sampler in samplers.items()
    }


class _KeepBest(TrainerCallback):
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


class _Report(TrainerCallback):
    """Tells the progress callback every step; its text changes with the rates, every few steps."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.text = progress, "Training"

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs: dict[str, float] = kwargs.get("logs") or {}
        if "loss" in logs:
            shown = {name: logs[name] for name in ("decision", "name", "arguments") if name in logs}
            rates = ", ".join(f"{name} {value:.0%}" for name, value in shown.items())
            self.text = f"Step {state.global_step} of {state.max_steps} (loss {logs['loss']:.2f}; right: {rates})"
        logger.info("step %d: %s", state.global_step, json.dumps(logs))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.progress(self.text, state.global_step / state.max_steps)


class _StopRequest(TrainerCallback):
    """Ends the run behind the current step, with a checkpoint."""

    def __init__(self) -> None:
        self.wanted = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.wanted:
            control.should_save = control.should_training_stop = True


@contextmanager
def _own_process_group(given: bool) -> Iterator[None]:
    """Leave the process group that the Trainer made, unless it was there before.

    A process that ends with the group's threads still running may abort, after all the work is done. When the run
    fails, the group stays: the launcher ends the other processes, which may be waiting in it.
    """
    yield
    if not given and torch.distributed.is_available() and torch.distributed.is_initialized():
        # A thread of gloo that still drops the tensors of its last gather needs the interpreter lock, which the group's
        # destructor holds while it waits for that thread. The barrier gives the lock up until all of them are idle.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


@contextmanager
def _stop_after_step(trainer: Trainer) -> Iterator[None]:
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
