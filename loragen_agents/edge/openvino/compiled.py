"""Compiled graphs: one for each model and process, kept on disk in OpenVINO's own format.

A compiled graph serves any number of threads, each with an infer request of its own; requests that are done with are
used again, since a new one takes longer to run the first time.
"""

import hashlib
import logging
import mmap
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
from torch import Tensor
from transformers import PreTrainedModel

from loragen_agents.adapter.lora_weights import LoRAWeights
from loragen_agents.edge.openvino.graph import write_graph
from loragen_agents.edge.openvino.quantise import Quantisation
from loragen_agents.errors import ModelLoadError
from loragen_agents.models.cache import cache_folder
from loragen_agents.models.clone import clone_sharing_tensors
from loragen_agents.models.cpu import cpu_computes_bf16
from loragen_agents.support.files import replacing

logger = logging.getLogger(__name__)

# Raised when the graph changes, so that what older versions wrote is not read.
_VERSION = 4
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
        file: the memory that a loaded graph's matrices lie in, which has to last as long as it does.
    """

    def __init__(self, compiled: ov.CompiledModel, updated: Collection[int], file: np.ndarray | None = None) -> None:
        self.updated = tuple(sorted(updated))
        self._compiled, self._file = compiled, file
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


def compiled_lm(
    model: PreTrainedModel,
    updated: Collection[int],
    merged: LoRAWeights | None = None,
    fingerprint: str | None = None,
) -> CompiledLM:
    """The compiled graph of a model, shared by all models in this process whose weights are equal.

    Args:
        model: one for which `why_not` gives None.
        updated: layers whose `down_proj` takes updates and gives its inputs.
        merged: weights that are merged into a copy of the model while its graph is written.
        fingerprint: stands for the model's tensors. Without it all of them are read, here and for each new process.
    """
    to, head = quantisation()
    key = _digest(model, updated, merged, fingerprint, to, head)
    with _compiling:
        found = _compiled.get(key)
        if found is None:
            found = _loaded(key, updated, to)
            if found is None:
                compiled = _compile(model, updated, merged, to, head)
                if sum(parameter.numel() for parameter in model.parameters()) >= _SMALLEST_KEPT:
                    _keep(compiled, key)
                    # A loaded graph takes less memory than one that was compiled here.
                    found = _loaded(key, updated, to)
                found = found or CompiledLM(compiled, updated)
            _compiled[key] = found
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


def _file(key: str) -> Path:
    return cache_folder() / "openvino" / f"{key}.blob"


def _loaded(key: str, updated: Collection[int], to: Quantisation) -> CompiledLM | None:
    """The graph that was kept on disk; None where there is none, or it is damaged."""
    file = _file(key)
    if not file.is_file():
        return None
    try:
        # Its matrices are used where they lie; several processes share them.
        with file.open("rb") as opened:
            kept = np.frombuffer(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY), dtype=np.uint8)
        # OpenVINO may crash on a damaged file, so it is given none.
        if hashlib.sha256(kept[_HASH:].data).digest() != kept[:_HASH].tobytes():
            raise OSError("it has changed since it was written")
        loaded = ov.Core().import_model(ov.Tensor(kept[_HASH:], shared_memory=True), "CPU", settings(to))
        with suppress(OSError):
            os.utime(file)  # the least recently used go first
        return CompiledLM(loaded, updated, kept)
    except (OSError, RuntimeError, ValueError) as error:  # an empty file can't be mapped
        logger.warning("The compiled model %s can't be loaded (%s); it is compiled again.", file, error)
        return None


def _compile(
    model: PreTrainedModel,
    updated: Collection[int],
    merged: LoRAWeights | None,
    to: Quantisation,
    head: Quantisation,
) -> ov.CompiledModel:
    started = time.perf_counter()
    if merged is not None:
        model = clone_sharing_tensors(model)
        merged.merge_into(model)
    compiled = ov.Core().compile_model(write_graph(model, tuple(updated), to, head), "CPU", settings(to))
    logger.info("Compiled %s for OpenVINO in %.1f s.", type(model).__name__, time.perf_counter() - started)
    return compiled


def _keep(compiled: ov.CompiledModel, key: str) -> None:
    file = _file(key)
    try:
        with replacing(file) as temporary:
            exported = compiled.export_model().getbuffer()
            with temporary.open("wb") as opened:
                opened.write(hashlib.sha256(exported).digest())
                opened.write(exported)
        _prune(file.parent)
    except OSError as error:
        logger.warning("The compiled model can't be kept in %s: %s.", file.parent, error)


def _prune(folder: Path) -> None:
    """Remove the least recently used files beyond `_KEPT_FILES`."""
    ages: dict[Path, float] = {}
    for path in folder.glob("*.blob"):
        with suppress(OSError):  # another process may remove it at the same time
            ages[path] = path.stat().st_mtime
    for path in sorted(ages, key=ages.__getitem__)[:-_KEPT_FILES]:
        path.unlink(missing_ok=True)


def _digest(
    model: PreTrainedModel,
    updated: Collection[int],
    merged: LoRAWeights | None,
    fingerprint: str | None,
    to: Quantisation,
    head: Quantisation,
) -> str:
    """SHA-256 of all that the compiled graph depends on."""
    facts = (_VERSION, ov.__version__, sorted(settings(to).items()), sorted(updated), to, head, fingerprint)
    digest = hashlib.sha256(repr((facts, _cpu_name(), type(model).__name__, model.config.to_json_string())).encode())

    def add(name: object, tensor: Tensor) -> None:
        digest.update(repr((name, tensor.dtype, tensor.shape)).encode())
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().data)

    for name, parameter in model.named_parameters():
        # With a fingerprint, a row of each is enough to notice weights that were changed since they were loaded.
        add(name, parameter if fingerprint is None else parameter[:1])
    if merged is not None:
        digest.update(repr(merged.scaling).encode())
        for entry in merged.entries:
            for matrix in merged.tensors[entry]:
                add(entry, matrix)
    return digest.hexdigest()


def _cpu_name() -> str:
    return str(ov.Core().get_property("CPU", "FULL_DEVICE_NAME"))
