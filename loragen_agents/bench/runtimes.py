"""How fast each runtime reads a prompt and writes behind it: PyTorch and OpenVINO, in turn on the same machine.

    python -m loragen_agents.bench.runtimes [--dtype bfloat16] [--rounds 5] [--json]

PyTorch runs the model in `--dtype`, OpenVINO with int8 matrices. Only forward passes are timed, without grammar or
sampling. A runtime that is not installed, or has no graph for the model, is left out and named.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch
from rich.table import Table
from transformers import PreTrainedModel

from loragen_agents.edge.forward import Runtime
from loragen_agents.edge.passes import Forward
from loragen_agents.models.language_models import DEFAULT_MODEL, load_language_model
from loragen_agents.support.console import print_json, results

LENGTHS = (50, 250, 1500)


@dataclass(frozen=True)
class RuntimeSpeed:
    """Medians over the rounds, in tokens per second, by the length of the prompt: of reading it, and behind it."""

    prefill: dict[int, float]
    decode: dict[int, float]


def measure_runtimes(
    model: PreTrainedModel, *, lengths: tuple[int, ...] = LENGTHS, tokens: int = 24, rounds: int = 5
) -> tuple[dict[str, RuntimeSpeed], dict[str, str]]:
    """Time all runtimes in turn, `rounds` times after one that does not count.

    Returns:
        The speeds of each runtime, and why others were left out.
    """
    forwards: dict[str, Forward] = {"torch": Runtime(model, "torch").bind()}
    missing: dict[str, str] = {}
    reason = _no_openvino(model)
    if reason is None:
        forwards["openvino"] = Runtime(model, "openvino").bind()
    else:
        missing["openvino"] = reason
    found: dict[str, list[dict[int, tuple[float, float]]]] = {name: [] for name in forwards}
    for round_number in range(rounds + 1):
        for name, forward in forwards.items():
            speeds = {length: _speeds(model, forward, length, tokens) for length in lengths}
            if round_number:
                found[name].append(speeds)

    def medians(name: str, side: int) -> dict[int, float]:
        return {length: median(speeds[length][side] for speeds in found[name]) for length in lengths}

    return {name: RuntimeSpeed(medians(name, 0), medians(name, 1)) for name in forwards}, missing


def _no_openvino(model: PreTrainedModel) -> str | None:
    if find_spec("openvino") is None:
        return "not installed (pip install openvino)"
    from loragen_agents.edge.openvino.graph import why_not

    return why_not(model)


@torch.inference_mode()
def _speeds(model: PreTrainedModel, forward: Forward, length: int, tokens: int) -> tuple[float, float]:
    """Tokens a second of reading a prompt of this length, and of writing behind it."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.arange(length, device=model.device)[None] % vocabulary
    cache = forward.cache(1, length + tokens)
    first = torch.zeros(1, 1, dtype=torch.long, device=model.device)

    def run(tokens: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        following = forward(tokens, cache, keep)[:, -1].argmax(-1, keepdim=True)
        cache.advance([tokens.shape[1]])
        following.tolist()  # waits for a GPU
        return following

    reading, following = _timed(lambda: run(ids, first + length - 1))
    steps: list[float] = []
    for _ in range(tokens):
        seconds, following = _timed(lambda token=following: run(token, first))
        steps.append(seconds)
    return length / reading, 1 / median(steps)


def _timed(run: Callable[..., Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = run()
    return time.perf_counter() - started, result


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loragen_agents.bench.runtimes", description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="known name, folder, GGUF file or Hub id")
    parser.add_argument("--dtype", default="auto", help="of PyTorch: bfloat16, float16, float32 or auto (default)")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help="of the prompts, in tokens")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (default: 5)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    language_model = load_language_model(options.model, dtype=options.dtype)
    lengths = tuple(options.lengths)
    speeds, missing = measure_runtimes(language_model.model, lengths=lengths, rounds=options.rounds)
    threads, dtype = torch.get_num_threads(), str(language_model.model.dtype).removeprefix("torch.")
    if options.json:
        measured = {name: {"prefill": speed.prefill, "decode": speed.decode} for name, speed in speeds.items()}
        print_json({"model": language_model.name, "dtype": dtype, "threads": threads, **measured, "missing": missing})
        return
    table = Table(title=f"{language_model.name}, {threads} thread{'s' * (threads > 1)}, tokens/s", title_justify="left")
    table.add_column("")
    for kind in ("prefill", "behind"):
        for length in lengths:
            table.add_column(f"{kind} {length}", justify="right")
    for name, speed in speeds.items():
        label = f"PyTorch, {dtype}" if name == "torch" else "OpenVINO"
        figures = [*speed.prefill.values(), *speed.decode.values()]
        table.add_row(label, *(f"{figure:.0f}" for figure in figures))
    results.print(table)
    for name, reason in missing.items():
        results.print(f"Left out: {name}: {reason}")


if __name__ == "__main__":
    main()
