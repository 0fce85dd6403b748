"""What the benchmarks' commands share: options of a run, the engine, and what is shown at the end.

Imports nothing slow until something runs.
"""

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loragen_agents.commands.options import output_folder

if TYPE_CHECKING:
    from loragen_agents.bench.engine import ModelEngine
    from loragen_agents.bench.tasks import Task

INTERRUPTED = 130


def add_run_arguments(parser: argparse.ArgumentParser, default_max_tokens: str) -> None:
    parser.add_argument(
        "--variants",
        "--rows",
        dest="variants",
        metavar="NAME,NAME",
        help="what is measured, by name, with options behind a '+' (default: all that the table has)",
    )
    parser.add_argument(
        "--out", type=output_folder, metavar="FOLDER", help="folder for results, predictions, report and plots"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run that --out holds")
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help=f"longest text of a step (default: {default_max_tokens})"
    )
    add_model_arguments(parser)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--edge", metavar="MODEL", help="edge model (default: the embedded one)")
    parser.add_argument("--cloud", metavar="MODEL", help="cloud model (default: the edge model)")
    parser.add_argument(
        "--weights",
        action="append",
        default=[],
        metavar="VARIANT=FOLDER",
        help="weights of a variant: a PEFT folder for lora and lora-definitions, a generator for lora-gen",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16, float16 or float32 (default: auto)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")


def run_task(arguments: argparse.Namespace, engine: "ModelEngine", task: "Task") -> int:
    from loragen_agents.bench import report
    from loragen_agents.bench.task_run import run_task as run_it
    from loragen_agents.bench.variants import CHOICE_VARIANTS, DEFAULT_VARIANTS, variants_from_names
    from loragen_agents.support.console import print_json

    default = CHOICE_VARIANTS if task.choice_only else DEFAULT_VARIANTS
    variants = variants_from_names(arguments.variants.split(",") if arguments.variants else default)
    document = run_it(
        task,
        variants,
        engine,
        out=arguments.out,
        resume=arguments.resume,
        command=shlex.join(["loragen-agents", *sys.argv[1:]]),
    )
    if arguments.json:
        print_json(document)
    else:
        show(report.render(document))
        say_how_it_ended(document, arguments.out)
    return 0 if document["complete"] else INTERRUPTED


def say_how_it_ended(document: dict[str, Any], out: Path | None) -> None:
    from loragen_agents.bench import plots
    from loragen_agents.support.console import say

    if not document["complete"]:
        where = f" `--out {out} --resume` goes on." if out else ""
        say(f"Stopped early; the figures are over what was run.{where}")
    elif out:
        say(f"Results and report are in {out}.")
        if hint := plots.hint():
            say(hint)


def show(tables: Any) -> None:
    from loragen_agents.support.console import results

    if not results.is_terminal:  # into a pipe or a file the tables go as wide as they are
        results.width = 250
    results.print(tables)


def engine_of(arguments: argparse.Namespace, task: str, max_tokens: int) -> "ModelEngine":
    import torch

    from loragen_agents.bench.engine import ModelEngine
    from loragen_agents.models.language_models import DEFAULT_MODEL

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    return ModelEngine(
        task,
        edge=arguments.edge or DEFAULT_MODEL,
        cloud=arguments.cloud,
        weights=arguments.weights,
        device=arguments.device,
        dtype=arguments.dtype,
        max_tokens=getattr(arguments, "max_tokens", None) or max_tokens,
    )
