"""`loragen-agents doctor`: what is installed and cached, and how fast this machine is.

Measures with the default model when it is in the cache, and fetches nothing.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "doctor"
HELP = "say what is installed and cached, and how fast this machine is"

_LIBRARIES = (
    "torch",
    "openvino",
    "transformers",
    "peft",
    "tokenizers",
    "safetensors",
    "gguf",
    "llguidance",
    "langchain-core",
)
_PREFILL_TOKENS, _DECODED_TOKENS = 512, 24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-speed", action="store_true", help="leave out the measurements (some 20 seconds)")


def run(arguments: argparse.Namespace) -> int:
    from loragen_agents.support.console import print_json, say
    from loragen_agents.support.progress import shown, silent

    with shown(silent if arguments.json else None) as progress:
        progress("Looking at the installation", None)
        report: dict[str, Any] = {"versions": _versions(), "machine": _machine(), "content": _content()}
        report["runtime"] = _runtime()
        report["models"] = _models()
        if not arguments.no_speed:
            progress("Measuring memory bandwidth", None)
            report["memory_gb_per_second"] = round(memory_bandwidth(), 1)
            folder = report["models"]["default_folder"]
            progress("Measuring the default model", None)
            report["speed"] = model_speed(report["memory_gb_per_second"]) if folder else None
    if arguments.json:
        print_json(report)
        return 0
    for title, text in _lines(report):
        say(f"{title:<18}{text}")
    return 0


def memory_bandwidth() -> float:
    """GB/s at which torch reads main memory with all its threads: the best of five sums over 512 MB."""
    import torch

    block = torch.ones(64 * 2**20, dtype=torch.int64)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        block.sum()
        best = min(best, time.perf_counter() - start)
    return block.nbytes / best / 1e9


def model_speed(bandwidth: float) -> dict[str, Any]:
    """Tokens per second of the default model without an adapter: prefill of one prompt, then greedy decoding.

    Args:
        bandwidth: GB/s of main memory. On a CPU each decoded token reads all weights once, which bounds the speed.
    """
    import torch

    from loragen_agents.edge.forward import Runtime
    from loragen_agents.models.language_models import load_language_model
    from loragen_agents.support.progress import silent

    language_model = load_language_model(progress=silent)
    model = language_model.model
    runtime = Runtime(model)
    forward = runtime.bind()
    prompt = torch.arange(1000, 1000 + _PREFILL_TOKENS, device=model.device).unsqueeze(0)
    last = torch.tensor([[_PREFILL_TOKENS - 1]], device=model.device)
    prefill_seconds = float("inf")
    with torch.inference_mode():
        for _ in range(2):  # the first pass also sets the runtime up
            cache = forward.cache(1, _PREFILL_TOKENS + _DECODED_TOKENS)
            start = time.perf_counter()
            next_token = forward(prompt, cache, last)[:, -1].argmax(-1, keepdim=True)
            next_token.tolist()  # waits for a GPU
            prefill_seconds = min(prefill_seconds, time.perf_counter() - start)
        cache.advance([_PREFILL_TOKENS])
        step_seconds = []
        for _ in range(_DECODED_TOKENS):
            start = time.perf_counter()
            next_token = forward(next_token, cache, torch.zeros_like(last))[:, -1].argmax(-1, keepdim=True)
            cache.advance([1])
            next_token.tolist()
            step_seconds.append(time.perf_counter() - start)
    weight_bytes = _weight_bytes(model, runtime.name)
    return {
        "runtime": runtime.name,
        "model": language_model.name,
        "device": str(language_model.device),
        "dtype": _precision(runtime.name) or str(language_model.dtype).removeprefix("torch."),
        "prefill_tokens_per_second": round(_PREFILL_TOKENS / prefill_seconds),
        "decode_tokens_per_second": round(1 / sorted(step_seconds)[len(step_seconds) // 2], 1),
        "weight_megabytes": round(weight_bytes / 1e6),
        "decode_limit_tokens_per_second": round(bandwidth * 1e9 / weight_bytes, 1)
        if language_model.device.type == "cpu"
        else None,
    }


def _weight_bytes(model: "PreTrainedModel", runtime: str) -> int:
    """Bytes of weights that one decoded token reads, in the precision that the runtime keeps them in."""
    precision = _precision(runtime)
    if precision is None:
        return sum(parameter.nbytes for parameter in model.parameters())
    bits = {"int4": 4, "int8": 8, "float32": 32}[precision]
    return sum(parameter.numel() for parameter in model.parameters()) * bits // 8


def _precision(runtime: str) -> str | None:
    """What OpenVINO keeps matrices in; None for other runtimes, which keep them as they are."""
    if runtime != "openvino":
        return None
    from loragen_agents.edge.openvino.compiled import quantisation

    return {"int4": "int4", "int8": "int8", "none": "float32"}[quantisation()[0]]


def _runtime() -> str:
    """What models run on."""
    from loragen_agents.models.runtimes import RUNTIME_VARIABLE, chosen_runtime, openvino_is_default

    chosen = chosen_runtime()
    if chosen == "torch":
        return f"torch, by {RUNTIME_VARIABLE}" + ("; without it openvino, on CPUs" if openvino_is_default() else "")
    if chosen == "auto" and not openvino_is_default():
        return "torch (on x86-64 CPUs openvino is faster, if it is installed)"
    return "openvino on CPUs, torch on GPUs and for models that have no graph"


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for library in ("loragen-agents", *_LIBRARIES):
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            versions[library] = None
    return versions


def _machine() -> dict[str, Any]:
    import psutil
    import torch

    from loragen_agents.models.language_models import default_dtype

    memory = psutil.virtual_memory()
    return {
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gb": round(memory.total / 1e9, 1),
        "memory_free_gb": round(memory.available / 1e9, 1),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "cpu_dtype": str(default_dtype(torch.device("cpu"), 0)).removeprefix("torch."),
        "pip": importlib.util.find_spec("pip") is not None,
        "interpreter": sys.executable,
    }


def _content() -> dict[str, str]:
    from loragen_agents.support.content import content_folder

    return {name: str(content_folder(name)) for name in ("tools", "prompts", "training")}


def _models() -> dict[str, Any]:
    from loragen_agents.models.cache import cache_folder, find_stored, stored_conversions
    from loragen_agents.models.sources import DEFAULT_MODEL

    default = find_stored(DEFAULT_MODEL)
    return {
        "cache": str(cache_folder()),
        "default": DEFAULT_MODEL,
        "default_folder": str(default) if default else None,
        "stored": {manifest.name: _megabytes(folder) for folder, manifest in stored_conversions()},
    }


def _megabytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir()) // 1_000_000


def _lines(report: dict[str, Any]) -> list[tuple[str, str]]:
    versions, machine, models = report["versions"], report["machine"], report["models"]
    lines = [
        ("versions", ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items())),
        (
            "interpreter",
            machine["interpreter"] + ("" if machine["pip"] else " (no pip: known models can't be fetched)"),
        ),
        (
            "machine",
            f"{machine['platform']}, {machine['cores']} cores ({machine['torch_threads']} threads), "
            f"{machine['memory_free_gb']} of {machine['memory_gb']} GB free, "
            f"GPUs: {', '.join(machine['gpus']) or 'none'}; {machine['cpu_dtype']} on the CPU",
        ),
        ("runtime", report["runtime"]),
        ("content", ", ".join(report["content"].values())),
        ("cache", models["cache"]),
        ("models", ", ".join(f"{name} ({size} MB)" for name, size in models["stored"].items()) or "none cached"),
    ]
    if "speed" not in report:
        return lines
    lines.append(("memory", f"reads {report['memory_gb_per_second']} GB/s"))
    speed = report["speed"]
    if speed is None:
        lines.append(("speed", f"not measured: fetch the model first (loragen-agents models pull {models['default']})"))
    else:
        limit = speed["decode_limit_tokens_per_second"]
        lines.append(
            (
                "speed",
                f"{speed['model']} with {speed['runtime']} on {speed['device']} in {speed['dtype']}: prefill "
                f"{speed['prefill_tokens_per_second']} tokens/s, decode {speed['decode_tokens_per_second']} tokens/s"
                + (f" (memory allows {limit})" if limit else ""),
            )
        )
    return lines
