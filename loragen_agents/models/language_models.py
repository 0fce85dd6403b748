"""Language models, loaded: the embedded default, a Hub id, a folder or a GGUF file, on CPU or GPU.

`load_language_model` serves both sides, cloud and edge. Where files come from is the business of `sources`, how they
are kept that of `cache`; nothing here knows of tools or LoRA. Code that ships with a model is never run.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from loragen_agents.errors import ModelLoadError
from loragen_agents.models.arrangement import arrange_weights
from loragen_agents.models.cache import StoredModel, cache_folder, obtain_model
from loragen_agents.models.cpu import cpu_computes_bf16
from loragen_agents.models.fingerprints import weight_files
from loragen_agents.models.runtimes import torch_runs
from loragen_agents.models.sources import DEFAULT_MODEL
from loragen_agents.support.progress import Progress, shown

__all__ = [
    "DEFAULT_MODEL",
    "LanguageModel",
    "cache_folder",
    "gated_ffn_layers",
    "load_cloud_model",
    "load_language_model",
]

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

# What `dtype="auto"` stands for, where the machine is not to decide: a name of `_DTYPES`, or auto.
DTYPE_VARIABLE = "LORAGEN_AGENTS_DTYPE"
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")


@dataclass(eq=False)
class LanguageModel:
    """A causal language model with its tokenizer, ready for inference.

    Attributes:
        name: what it was asked for as (a known name, a Hub id, a path).
        folder: its files: config.json, safetensors, tokenizer.
        model: in eval mode, no parameter requires a gradient.
        tokenizer: has a padding token (the end token where the model brings none).
        fingerprint: SHA-256 over the tensors as stored (sorted by name: name, dtype, shape, bytes); the dtype that the
            model is run in does not change it.
    """

    name: str
    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype


def load_language_model(
    name: str | Path | Sequence[str | Path] = DEFAULT_MODEL,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> LanguageModel:
    """Load a language model; fetch it, check it and convert it first where that is needed.

    Args:
        name: a known name (`loragen-agents models list`), a folder with safetensors, a GGUF file, one of its `.partNN`
            files or the list of its parts in order, or `owner/model` on the Hub (`@revision` behind it, if wanted).
        device: "auto" takes the first CUDA GPU, else the CPU; else a torch device ("cpu", "cuda:1", "mps").
        dtype: "bfloat16", "float16", "float32", or "auto" (see `default_dtype`).
        cache_dir: folder of the conversions, in place of `cache_folder()`.
        progress: called with each step and the part of it that is done. Without it the steps are drawn on the terminal.

    Raises:
        ModelLoadError: the model can't be found, fetched, checked, converted or held in memory; the message says what
            to do.
    """
    chosen_device = _device(device)
    with shown(progress) as report:
        stored = obtain_model(name, cache_dir=cache_dir, progress=report)
        report(f"Loading {stored.name}", None)
        # Tensors made in inference mode could be neither trained nor merged later.
        with torch.inference_mode(False):
            return _load(stored, chosen_device, _dtype(dtype, chosen_device, stored.folder))


def load_cloud_model(
    name: str | None,
    edge: LanguageModel,
    *,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
) -> LanguageModel:
    """Load the cloud LM that goes with an edge LM: the edge LM itself where `name` is None or means the same files.

    Arguments and errors otherwise as `load_language_model`.
    """
    if name is None or name == edge.name:
        return edge
    with shown(progress) as report:
        folder = obtain_model(name, progress=report).folder
    if folder.resolve() == edge.folder.resolve():
        return edge
    return load_language_model(name, device=device, dtype=dtype, progress=progress)


def default_dtype(device: torch.device, stored_bytes: int) -> torch.dtype:
    """The dtype that `dtype="auto"` stands for: what LORAGEN_AGENTS_DTYPE says, else as in `choose_dtype`.

    Raises:
        ModelLoadError: LORAGEN_AGENTS_DTYPE names no dtype.
    """
    said = os.environ.get(DTYPE_VARIABLE, "").strip() or "auto"
    return choose_dtype(device, stored_bytes) if said == "auto" else _named_dtype(said, DTYPE_VARIABLE)


def choose_dtype(device: torch.device, stored_bytes: int) -> torch.dtype:
    """The dtype that this machine is fast in.

    GPU: bf16 where the hardware has it, else float32 (float16 overflows in Gemma's activations).

    CPU: bf16 with AMX, AVX-512-BF16 or Arm's BF16 instructions, else float32. Without them bf16 is emulated: one core
    of a Cascade Lake Xeon prefills SmolLM2-135M at 370 tokens/s in float32 and 105 in bf16, and decodes 11.6 tokens/s
    in float32 and 13.8 in bf16. A model whose float32 weights would take over half of the free memory is loaded in
    bf16 all the same.

    Args:
        stored_bytes: size of the model's safetensors files.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type != "cpu":
        return torch.bfloat16
    if cpu_computes_bf16() or 2 * stored_bytes > psutil.virtual_memory().available / 2:
        return torch.bfloat16
    return torch.float32


def gated_ffn_layers(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """The gated FFN of each decoder layer, in order: (module path, module with gate_proj, up_proj and down_proj).

    Args:
        model: a causal LM, also one that PEFT has wrapped.

    Raises:
        ModelLoadError: not every layer has exactly one such FFN (mixtures of experts, fused projections, plain FFNs).
    """
    found = [
        (path, module)
        for path, module in model.named_modules()
        if all(isinstance(getattr(module, projection, None), nn.Module) for projection in PROJECTIONS)
    ]
    layers = model.config.get_text_config().num_hidden_layers
    if len(found) != layers:
        raise ModelLoadError(
            f"{model.config.name_or_path or type(model).__name__} has no gated FFN (gate_proj, up_proj, down_proj) in "
            f"each of its {layers} layers, but {len(found)} in all; expected a model such as those of the Llama, Gemma "
            "and Qwen families (mixtures of experts and fused projections are not supported)"
        )
    return found


def _load(stored: StoredModel, device: torch.device, dtype: torch.dtype) -> LanguageModel:
    # Imported here, since it brings in the GGUF machinery's imports as well.
    from loragen_agents.models.gguf import check_complete, quiet_transformers

    if not any((stored.folder / file).is_file() for file in _TOKENIZER_FILES):
        raise ModelLoadError(
            f"{stored.folder} has no tokenizer; expected one of {', '.join(_TOKENIZER_FILES)} beside the weights"
        )
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(stored.folder, **options)
            # With output_loading_info it gives a pair, which its annotations do not know; mismatched sizes are then
            # in the report, and refused below by name.
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                stored.folder,
                dtype=dtype,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
            )
            model, report = loaded
            model.to(device)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ModelLoadError(f"{stored.name} does not fit into the memory of {device} in {dtype}: {error}") from error
    except Exception as error:  # transformers raises whatever a damaged or foreign file makes it stumble over
        reason = "it needs code of its own, which is never run" if "trust_remote_code" in str(error) else str(error)
        raise ModelLoadError(f"{stored.name} in {stored.folder} can't be loaded: {reason}") from error
    check_complete(report, stored.name)
    # OpenVINO reads weights once, from the mapped file; a copy in another order would stay in memory.
    if torch_runs(device.type):
        # Now, while nobody uses the model: moving weights under another thread's product is not safe.
        arrange_weights(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return LanguageModel(stored.name, stored.folder, model.eval().requires_grad_(False), tokenizer, stored.fingerprint)


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ModelLoadError(
            f"device {str(device)!r} can't be used here ({str(error).splitlines()[0]}); expected auto, cpu, or a GPU "
            "that this machine and this build of torch have (cuda, cuda:1, mps)"
        ) from error
    return chosen


def _dtype(dtype: str | torch.dtype, device: torch.device, folder: Path) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return default_dtype(device, sum(path.stat().st_size for path in weight_files(folder)))
    return _named_dtype(dtype, "dtype")


def _named_dtype(name: str, said_by: str) -> torch.dtype:
    if name not in _DTYPES:
        raise ModelLoadError(f"{said_by} is {name!r}: expected auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]
