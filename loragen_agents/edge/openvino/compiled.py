"""Compiled graphs: one for each model and process, kept on disk in OpenVINO's own format.

A compiled graph serves any number of threads, each with an infer request of its own; requests that are done with are
used again, since a new one takes longer to run the first time.
"""

import hashlib
import logging
import os
import threading
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import openvino as ov
import torch
from transformers import PreTrainedModel

from loragen_agents.edge.openvino.graph import write_graph
from loragen_agents.edge.openvino.quantise import Quantisation
from loragen_agents.errors import ModelLoadError
from loragen_agents.models.cache import cache_folder
from loragen_agents.models.cpu import cpu_computes_bf16
from loragen_agents.support.files import replacing

logger = logging.getLogger(__name__)

# Raised when the graph changes, so that what older versions wrote is not read.
_VERSION = 3
# A model this small compiles in less time than its file takes to read.
_SMALLEST_KEPT = 10_000_000
# SmolLM2-135M takes 140 MB.
_KEPT_FILES = 4
# In front of the exported graph stands its SHA-256.
_HASH = 32
# Columns whose activations share a scale where a product is computed in int8: more are faster, fewer more precise.
# SmolLM2-135M, 500 tokens of English, Kullback-Leibler divergence from float32: 0.006 without such products, 0.012 with
# groups of 32, 0.014 with 64, 0.026 with 192. A pass over 250 tokens, four layers deep, takes 1.4, 1.15, 1 and 0.9
# times as long.
_ACTIVATION_GROUP = 32


def settings(to: Quantisation) -> dict[str, Any]:
    """What a graph is compiled with: all threads of torch for one request at a time, and the fastest precision."""
    precision = "bf16" if cpu_computes_bf16() and to != "none" else "f32"
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "ENABLE_CPU_PINNING": False,
        "INFERENCE_PRECISION_HINT": precision,
        "KV_CACHE_PRECISION": precision,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0 if to == "none" else _ACTIVATION_GROUP,
    }


class Request:
    """An infer request with its states, and the updates that its inputs hold (compared by identity)."""

    def __init__(self, request: Any) -> None:
        self.infer_request = request
        self.states = {state.name: state for state in request.query_state()}
        self.updates: list[Any] | None = None


class CompiledLM:
    """A compiled graph.

    Args:
        updated: layers whose `down_proj` takes updates and gives its inputs.
    """

    def __init__(self, compiled: ov.CompiledModel, updated: Collection[int]) -> None:
        self.updated = tuple(sorted(updated))
        self._compiled = compiled
        self._idle: list[Request] = []
        self._lock = threading.Lock()

    def request(self) -> Request:
        """An infer request that nobody else uses, with empty states."""
        with self._lock:
            idle = self._idle.pop() if self._idle else None
        if idle is None:
            return Request(self._compiled.create_infer_request())
        idle.infer_request.reset_state()
        return idle

    def release(self, request: Request) -> None:
        """Give a request back."""
        with self._lock:
            self._idle.append(request)


_compiled: "WeakValueDictionary[str, CompiledLM]" = WeakValueDictionary()
_compiling = threading.Lock()


def compiled_lm(model: PreTrainedModel, updated: Collection[int]) -> CompiledLM:
    """The compiled graph of a model, shared by all models in this process whose weights are equal.

    Args:
        model: one for which `why_not` gives None.
        updated: layers whose `down_proj` takes updates and gives its inputs.
    """
    to, head = quantisation()
    key = _digest(model, updated, to, head)
    with _compiling:
        found = _compiled.get(key)
        if found is None:
            found = _compiled[key] = CompiledLM(_load_or_compile(model, updated, to, head, key), updated)
        return found


def quantisation() -> tuple[Quantisation, Quantisation]:
    """How matrices are kept, and how that of the output layer is.

    LORAGEN_AGENTS_QUANTISATION (int8, int4 or none) decides for the first.

    Raises:
        ModelLoadError: it says something else.
    """
    chosen = os.environ.get("LORAGEN_AGENTS_QUANTISATION", "int8")
    if chosen == "int4":
        return "int4", "int8"
    if chosen == "none":
        return "none", "none"
    if chosen == "int8":
        return "int8", "int8"
    raise ModelLoadError(f"LORAGEN_AGENTS_QUANTISATION is {chosen!r}; expected int8, int4 or none")


def _load_or_compile(
    model: PreTrainedModel, updated: Collection[int], to: Quantisation, head: Quantisation, key: str
) -> ov.CompiledModel:
    core = ov.Core()
    file = cache_folder() / "openvino" / f"{key}.blob"
    if file.is_file():
        try:
            kept = np.fromfile(file, dtype=np.uint8)
            # OpenVINO may crash on a damaged file, so it is given none.
            if hashlib.sha256(kept[_HASH:].data).digest() != kept[:_HASH].tobytes():
                raise OSError("it has changed since it was written")
            loaded = core.import_model(ov.Tensor(kept[_HASH:]), "CPU", settings(to))
            with suppress(OSError):
                os.utime(file)  # the least recently used go first
            return loaded
        except (OSError, RuntimeError) as error:
            logger.warning("The compiled model %s can't be loaded (%s); it is compiled again.", file, error)
    started = time.perf_counter()
    compiled = core.compile_model(write_graph(model, tuple(updated), to, head), "CPU", settings(to))
    logger.info("Compiled %s for OpenVINO in %.1f s.", type(model).__name__, time.perf_counter() - started)
    if sum(parameter.numel() for parameter in model.parameters()) >= _SMALLEST_KEPT:
        try:
            with replacing(file) as temporary:
                exported = compiled.export_model().getbuffer()
                with temporary.open("wb") as opened:
                    opened.write(hashlib.sha256(exported).digest())
                    opened.write(exported)
            _prune(file.parent)
        except OSError as error:
            logger.warning("The compiled model can't be kept in %s: %s.", file.parent, error)
    return compiled


def _prune(folder: Path) -> None:
    """Remove the least recently used files beyond `_KEPT_FILES`."""
    ages: dict[Path, float] = {}
    for path in folder.glob("*.blob"):
        with suppress(OSError):  # another process may remove it at the same time
            ages[path] = path.stat().st_mtime
    for path in sorted(ages, key=ages.__getitem__)[:-_KEPT_FILES]:
        path.unlink(missing_ok=True)


def _digest(model: PreTrainedModel, updated: Collection[int], to: Quantisation, head: Quantisation) -> str:
    """SHA-256 of all that the compiled graph depends on."""
    facts = (_VERSION, ov.__version__, sorted(settings(to).items()), sorted(updated), to, head)
    digest = hashlib.sha256(repr((facts, _cpu_name(), type(model).__name__, model.config.to_json_string())).encode())
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _cpu_name() -> str:
    return str(ov.Core().get_property("CPU", "FULL_DEVICE_NAME"))
