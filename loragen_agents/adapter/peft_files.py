"""LoRA weights as PEFT folders: written here (adapter_config.json, adapter_model.safetensors), read from anywhere."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from loragen_agents.adapter.lora_weights import Entry, LoRAWeights
from loragen_agents.errors import CheckpointError
from loragen_agents.models.language_models import PROJECTIONS
from loragen_agents.support.files import read_json_object, replacing

_CONFIG_FILE = "adapter_config.json"
_TENSOR_FILE = "adapter_model.safetensors"
_METADATA_KEY = "loragen_agents"
_TENSOR_NAME = re.compile(
    r"base_model\.model\.(?P<mlp>.+)\.(?P<projection>gate_proj|up_proj|down_proj)\.lora_(?P<side>A|B)\.weight"
)


def save_peft(weights: LoRAWeights, folder: str | Path, base_model_name: str, module_paths: Sequence[str]) -> Path:
    """Write a folder that `peft.PeftModel.from_pretrained` and `load_peft` take.

    Args:
        base_model_name: what the weights are for, as a Hub id or a folder; PEFT shows it and does not check it.
        module_paths: path of each layer's FFN module inside the model, as `gated_ffn_layers` gives them.

    Raises:
        ValueError: there are more or fewer paths than layers, or there is no entry to save.
    """
    if len(module_paths) != weights.layers:
        raise ValueError(f"weights for {weights.layers} layers can't go to {len(module_paths)} module paths")
    if not weights.tensors:
        raise ValueError("these LoRA weights have no entry, and PEFT has no way to write an adapter without one")
    names = {entry: f"{module_paths[entry[0]]}.{entry[1]}" for entry in weights.entries}
    tensors: dict[str, Tensor] = {}
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    for entry, name in names.items():
        a, b = weights.tensors[entry]
        for side, tensor in (("A", a), ("B", b)):
            # The pieces of one batched tensor share storage, which safetensors refuses: hence a copy of each.
            copy = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            tensors[f"base_model.model.{name}.lora_{side}.weight"] = copy
        if a.shape[0] != weights.rank:
            rank_pattern[name] = a.shape[0]
            alpha_pattern[name] = _whole(weights.scaling * a.shape[0])
    kinds = [projection for projection in PROJECTIONS if any(entry[1] == projection for entry in names)]
    everywhere = len(names) == weights.layers * len(kinds)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "r": weights.rank,
        "lora_alpha": _whole(weights.alpha),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": kinds if everywhere else sorted(names.values()),
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
    }
    metadata = {"format": "pt", _METADATA_KEY: json.dumps({"module_paths": list(module_paths)})}
    target = Path(folder)
    with replacing(target / _TENSOR_FILE) as temporary:
        save_file(tensors, temporary, metadata=metadata)
    with replacing(target / _CONFIG_FILE) as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return target


def load_peft(folder: str | Path, layers: int | None = None) -> LoRAWeights:
    """Read a PEFT folder of plain LoRA on FFN matrices, written here or by PEFT itself.

    Args:
        layers: number of layers of the model. Folders written by `save_peft` know it; for others it defaults to the
            last layer with an entry, plus one.

    Raises:
        CheckpointError: a file is missing or damaged, or the adapter changes more than gate, up and down.
    """
    config_file, tensor_file = Path(folder) / _CONFIG_FILE, Path(folder) / _TENSOR_FILE
    config = read_json_object(
        config_file, f"a folder of LoRA weights has it beside {_TENSOR_FILE}; write the folder again"
    )
    _check_plain_lora(config, config_file)
    tensors, metadata = _read_tensors(tensor_file)
    pairs: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR_NAME.fullmatch(name)
        if match is None:
            raise CheckpointError(
                f"{tensor_file}: {name} is no LoRA matrix of a gated FFN; only gate_proj, up_proj and down_proj "
                "can be taken over"
            )
        pairs.setdefault((match["mlp"], match["projection"]), {})[match["side"]] = tensor
    paths = _module_paths(metadata, tensor_file)
    rank, alpha = config["r"], config["lora_alpha"]
    entries: dict[Entry, tuple[Tensor, Tensor]] = {}
    for (mlp, projection), sides in pairs.items():
        if len(sides) != 2:
            raise CheckpointError(f"{tensor_file}: {mlp}.{projection} has lora_{''.join(sides)} alone, not both sides")
        layer = paths.index(mlp) if mlp in paths else _layer_number(mlp, tensor_file)
        a, b = sides["A"], sides["B"]
        own_rank = _pattern(config, "rank_pattern", f"{mlp}.{projection}", rank, config_file)
        own_alpha = _pattern(config, "alpha_pattern", f"{mlp}.{projection}", alpha, config_file)
        if a.dim() != 2 or b.dim() != 2 or not a.shape[0] == b.shape[1] == own_rank:
            raise CheckpointError(
                f"{tensor_file}: A {tuple(a.shape)} and B {tuple(b.shape)} of {mlp}.{projection} do not fit the "
                f"rank {own_rank} that {config_file.name} gives"
            )
        ratio = (own_alpha / own_rank) / (alpha / rank)
        # A rounding difference between alpha / r of two ranks is no difference in scaling.
        entries[layer, projection] = (a, b if abs(ratio - 1) < 1e-9 else b * ratio)
    depth = layers or len(paths) or 1 + max((layer for layer, _ in entries), default=0)
    try:
        return LoRAWeights(depth, rank, alpha, entries)
    except ValueError as error:
        raise CheckpointError(f"{tensor_file}: {error}") from error


def _whole(number: float) -> float | int:
    """`number` as an int where it is one, as PEFT writes alpha."""
    return int(number) if float(number).is_integer() else number


def _check_plain_lora(config: dict[str, Any], path: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: expected peft_type LORA, found {config.get('peft_type')!r}")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not _is_rank(rank) or not _is_alpha(alpha):
        raise CheckpointError(f"{path}: r and lora_alpha must be positive numbers, found {rank!r} and {alpha!r}")
    for name in ("use_dora", "use_rslora", "fan_in_fan_out", "lora_bias", "modules_to_save"):
        if config.get(name):
            raise CheckpointError(f"{path}: {name} is set; only plain LoRA can be merged here")
    if config.get("bias", "none") != "none":
        raise CheckpointError(f"{path}: bias is {config['bias']!r}; only plain LoRA without biases can be merged here")


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; a folder of LoRA weights has it beside {_CONFIG_FILE}") from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); write the folder again") from error


def _module_paths(metadata: dict[str, str], path: Path) -> list[str]:
    try:
        paths = json.loads(metadata.get(_METADATA_KEY, "{}")).get("module_paths", [])
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: the note on module paths is damaged; write the folder again") from error
    if not isinstance(paths, list) or not all(isinstance(one, str) for one in paths):
        raise CheckpointError(f"{path}: the note on module paths is damaged; write the folder again")
    return paths


def _layer_number(mlp: str, path: Path) -> int:
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", mlp)
    if len(numbers) != 1:
        raise CheckpointError(f"{path}: can't tell which layer {mlp} is; expected one number in its path")
    return int(numbers[0])


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_alpha(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _pattern(config: dict[str, Any], field: str, name: str, default: Any, path: Path) -> Any:
    """A module's value in PEFT's rank_pattern or alpha_pattern: of the first key that matches the end of its name.

    Raises:
        CheckpointError: the field is no object, a key is no regular expression, or the value is no rank or alpha.
    """
    patterns = config.get(field) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{path}: {field} must be an object of patterns and numbers, found {patterns!r}")
    for key, value in patterns.items():
        try:
            found = re.match(rf"(.*\.)?({key})$", name)
        except re.error as error:
            raise CheckpointError(f"{path}: {key!r} in {field} is no regular expression ({error})") from error
        if found:
            if not (_is_rank(value) if field == "rank_pattern" else _is_alpha(value)):
                raise CheckpointError(f"{path}: {key!r} in {field} must be a positive number, found {value!r}")
            return value
    return default
