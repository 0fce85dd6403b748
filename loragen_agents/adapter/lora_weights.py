"""LoRA weights for the gated FFNs of a causal LM: a plain value, and the ways in which a model takes it on.

`LoRAWeights` holds matrices and nothing else. It goes out to a PEFT folder and comes in from one, is merged into a
model (`merge_into`), or runs beside its frozen weights with gradients (`apply_lora`). Where the matrices come from, and
what they are good for, this module does not know.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from loragen_agents.errors import CheckpointError
from loragen_agents.models.language_models import PROJECTIONS, gated_ffn_layers
from loragen_agents.support.files import read_json_object, replacing

Entry = tuple[int, str]

_CONFIG_FILE = "adapter_config.json"
_TENSOR_FILE = "adapter_model.safetensors"
_METADATA_KEY = "loragen_agents"
_TENSOR_NAME = re.compile(
    r"base_model\.model\.(?P<mlp>.+)\.(?P<projection>gate_proj|up_proj|down_proj)\.lora_(?P<side>A|B)\.weight"
)


@dataclass(frozen=True, eq=False)
class LoRAWeights:
    """Low-rank updates of FFN matrices: W + (alpha / rank) · B·A (paper Eq. 1, in PEFT's names and shapes).

    layers: number of layers of the model that these weights are for.
    rank, alpha: give the scaling alpha / rank, which is the same for all entries.
    tensors: (layer, projection) -> (A with shape (r, in), B with shape (out, r)). A matrix without an entry is not
        changed. An entry's own r may differ from `rank`; its scaling stays alpha / rank.

    Raises:
        ValueError: an entry names no layer or projection of a gated FFN, or its A and B do not fit each other.
    """

    layers: int
    rank: int
    alpha: float
    tensors: Mapping[Entry, tuple[Tensor, Tensor]] = field(repr=False)

    def __post_init__(self) -> None:
        if self.layers < 1 or self.rank < 1:
            raise ValueError(f"LoRA weights need at least one layer and rank 1, got {self.layers} and {self.rank}")
        for (layer, projection), (a, b) in self.tensors.items():
            if not 0 <= layer < self.layers or projection not in PROJECTIONS:
                raise ValueError(
                    f"no entry ({layer}, {projection!r}) is possible: expected a layer below {self.layers} and one of "
                    f"{', '.join(PROJECTIONS)}"
                )
            if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
                raise ValueError(
                    f"A {tuple(a.shape)} and B {tuple(b.shape)} of ({layer}, {projection!r}) do not fit: expected "
                    "(r, in) and (out, r)"
                )

    @property
    def scaling(self) -> float:
        """The factor alpha / rank before every product B·A."""
        return self.alpha / self.rank

    @property
    def entries(self) -> list[Entry]:
        """The (layer, projection) pairs with an entry, by layer and then in the order of `PROJECTIONS`."""
        return sorted(self.tensors, key=lambda entry: (entry[0], PROJECTIONS.index(entry[1])))

    def update(self, layer: int, projection: str) -> Tensor:
        """The update (alpha / rank) · B·A of one matrix, with shape (out, in), in float32.

        Raises:
            KeyError: there is no entry for this matrix.
        """
        a, b = self.tensors[layer, projection]
        return self.scaling * (b.float() @ a.float())

    def concatenate(self, other: "LoRAWeights") -> "LoRAWeights":
        """The weights whose updates are the sums of both, at the cost of adding up the ranks.

        `rank` and `alpha` stay those of `self`; where the other's scaling differs, its B carries the ratio.

        Raises:
            ValueError: the two are for models of different depth or width.
        """
        if other.layers != self.layers:
            raise ValueError(f"weights for {self.layers} layers can't be joined with weights for {other.layers}")
        ratio = other.scaling / self.scaling
        tensors = dict(self.tensors)
        for entry, (a, b) in other.tensors.items():
            scaled = b if ratio == 1 else b * ratio
            if entry not in tensors:
                tensors[entry] = (a, scaled)
                continue
            own_a, own_b = tensors[entry]
            if own_a.shape[1] != a.shape[1] or own_b.shape[0] != b.shape[0]:
                raise ValueError(
                    f"entry {entry} updates a matrix of {own_b.shape[0]} x {own_a.shape[1]} in one and of "
                    f"{b.shape[0]} x {a.shape[1]} in the other"
                )
            tensors[entry] = (
                torch.cat([own_a, a.to(own_a)]),
                torch.cat([own_b, scaled.to(own_b)], dim=1),
            )
        return replace(self, tensors=tensors)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "LoRAWeights":
        """The same weights on another device or in another dtype."""
        return self._map(lambda tensor: tensor.to(device=device, dtype=dtype))

    def detach(self) -> "LoRAWeights":
        """The same weights without their history of gradients."""
        return self._map(Tensor.detach)

    def _map(self, function: Any) -> "LoRAWeights":
        return replace(self, tensors={entry: (function(a), function(b)) for entry, (a, b) in self.tensors.items()})

    def merge_into(self, model: PreTrainedModel) -> "Merged":
        """Put W + (alpha / rank) · B·A in the place of every W that changes; see `Merged` for the way back.

        Worked out in float32 and then cast to W's dtype. W's tensor itself is left alone, so a model that shares it
        does not change. Entries whose update is exactly zero change nothing and cost no memory.

        Raises:
            ValueError: the model's FFNs have another number or other shapes than these weights.
        """
        linears = _target_linears(model, self)
        replaced: list[tuple[nn.Linear, Tensor, nn.Parameter]] = []
        buffers: dict[tuple[torch.Size, torch.device], Tensor] = {}
        with torch.no_grad():
            for entry in self.entries:
                a, b = self.tensors[entry]
                linear = linears[entry]
                original = linear.weight
                # A B that is zero throughout is how LoRA starts, so this is the common case before training.
                if not (b.any() and a.any()):
                    continue
                a, b = (tensor.to(original.device, torch.float32) for tensor in (a, b))
                # One float32 buffer a shape: fresh pages for every matrix would cost more than the arithmetic.
                key = (original.shape, original.device)
                if key not in buffers:
                    buffers[key] = torch.empty(original.shape, dtype=torch.float32, device=original.device)
                merged = buffers[key].copy_(original).addmm_(b, a, alpha=self.scaling)
                replaced.append(
                    (linear, original, nn.Parameter(merged.to(original.dtype, copy=True), requires_grad=False))
                )
        for linear, _, merged_weight in replaced:
            linear.weight = merged_weight
        return Merged(replaced)

    def save_peft(self, folder: str | Path, base_model_name: str, module_paths: Sequence[str]) -> Path:
        """Write a folder that `peft.PeftModel.from_pretrained` and `load_peft` take.

        base_model_name: what the weights are for, as a Hub id or a folder; PEFT shows it and does not check it.
        module_paths: path of each layer's FFN module inside the model, as `gated_ffn_layers` gives them.

        Raises:
            ValueError: there are more or fewer paths than layers, or there is no entry to save.
        """
        if len(module_paths) != self.layers:
            raise ValueError(f"weights for {self.layers} layers can't go to {len(module_paths)} module paths")
        if not self.tensors:
            raise ValueError("these LoRA weights have no entry, and PEFT has no way to write an adapter without one")
        names = {entry: f"{module_paths[entry[0]]}.{entry[1]}" for entry in self.entries}
        tensors: dict[str, Tensor] = {}
        rank_pattern: dict[str, int] = {}
        alpha_pattern: dict[str, float] = {}
        for entry, name in names.items():
            a, b = self.tensors[entry]
            for side, tensor in (("A", a), ("B", b)):
                # The pieces of one batched tensor share storage, which safetensors refuses: hence a copy of each.
                copy = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
                tensors[f"base_model.model.{name}.lora_{side}.weight"] = copy
            if a.shape[0] != self.rank:
                rank_pattern[name] = a.shape[0]
                alpha_pattern[name] = _whole(self.scaling * a.shape[0])
        kinds = [projection for projection in PROJECTIONS if any(entry[1] == projection for entry in names)]
        everywhere = len(names) == self.layers * len(kinds)
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model_name,
            "r": self.rank,
            "lora_alpha": _whole(self.alpha),
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

    @staticmethod
    def load_peft(folder: str | Path, layers: int | None = None) -> "LoRAWeights":
        """Read a PEFT folder of plain LoRA on FFN matrices, written here or by PEFT itself.

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
                raise CheckpointError(
                    f"{tensor_file}: {mlp}.{projection} has lora_{''.join(sides)} alone, not both sides"
                )
            layer = paths.index(mlp) if mlp in paths else _layer_number(mlp, tensor_file)
            a, b = sides["A"], sides["B"]
            own_rank = _pattern(config.get("rank_pattern"), f"{mlp}.{projection}", rank)
            own_alpha = _pattern(config.get("alpha_pattern"), f"{mlp}.{projection}", alpha)
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


class Merged:
    """The record of one merge; `restore()`, or leaving it as a context manager, puts the original weights back.

    The originals were kept, not worked out again, so they come back bit for bit.
    """

    def __init__(self, replaced: list[tuple[nn.Linear, Tensor, nn.Parameter]]) -> None:
        self._replaced = replaced

    @property
    def matrices(self) -> int:
        """How many matrices the merge has changed (0 once restored)."""
        return len(self._replaced)

    def restore(self) -> None:
        """Put the original weights back. A second call does nothing.

        Raises:
            RuntimeError: something else was merged into the same matrices since; restore that first.
        """
        if any(linear.weight is not merged for linear, _, merged in self._replaced):
            raise RuntimeError("other weights were merged into this model later: restore them first")
        for linear, original, _ in self._replaced:
            linear.weight = original
        self._replaced = []

    def __enter__(self) -> "Merged":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()


@contextmanager
def apply_lora(
    model: PreTrainedModel, weights: LoRAWeights | Sequence[LoRAWeights], rows: Sequence[int] | Tensor | None = None
) -> Iterator[None]:
    """Run `model` with LoRA weights beside its own, unmerged, so that gradients reach the LoRA matrices.

    y = W·x + (alpha / rank) · B·(A·x) in gate, up and down. Nested contexts add up. The backward pass of a model with
    gradient checkpointing runs the forward again, so it has to happen inside the context.

    weights: one value for the whole batch, or several.
    rows: with several, the index of each batch row's weights, with shape (batch,); left out, row i takes weights i.

    Raises:
        ValueError: weights and model do not fit, or (on the forward pass) the batch has another number of rows.
    """
    several = [weights] if isinstance(weights, LoRAWeights) else list(weights)
    if not several:
        raise ValueError("apply_lora needs at least one LoRAWeights")
    targets: dict[Entry, nn.Linear] = {}
    for one in several:
        targets |= _target_linears(model, one)
    index: Tensor | None = None
    if not isinstance(weights, LoRAWeights):
        index = torch.as_tensor(range(len(several)) if rows is None else rows, dtype=torch.long)
        if index.dim() != 1 or not all(0 <= row < len(several) for row in index.tolist()):
            raise ValueError(f"rows must be a list of indices below {len(several)}, got {index.tolist()}")
    elif rows is not None:
        raise ValueError("rows are for several LoRAWeights, and one was given")
    handles = []
    try:
        for entry, linear in targets.items():
            hook = _LowRankHook(*_stack(several, entry), index.to(linear.weight.device) if index is not None else None)
            handles.append(linear.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _LowRankHook:
    """Adds B·(A·x) to a linear layer's output; `a` (groups, r, in), `b` (groups, out, r) with the scaling inside."""

    def __init__(self, a: Tensor, b: Tensor, rows: Tensor | None) -> None:
        self.a, self.b, self.rows = a, b, rows

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        a, b = self.a.to(x.device, x.dtype), self.b.to(x.device, x.dtype)
        if self.rows is None:
            return output + F.linear(F.linear(x, a[0]), b[0]).to(output.dtype)
        if x.dim() != 3 or x.shape[0] != len(self.rows):
            raise ValueError(
                f"LoRA weights were given for {len(self.rows)} batch rows, and the model was run on input of shape "
                f"{tuple(x.shape)}"
            )
        low = torch.bmm(x, a[self.rows].transpose(1, 2))
        return output + torch.bmm(low, b[self.rows].transpose(1, 2)).to(output.dtype)


def _stack(several: Sequence[LoRAWeights], entry: Entry) -> tuple[Tensor, Tensor]:
    """One entry of several weights as (groups, r, in) and (groups, out, r), ranks padded with zeros, scaling in B."""
    pairs = [(weights.tensors.get(entry), weights.scaling) for weights in several]
    sample_a, sample_b = next(pair for pair, _ in pairs if pair is not None)
    rank = max(pair[0].shape[0] for pair, _ in pairs if pair is not None)
    a_side, b_side = [], []
    for pair, scaling in pairs:
        if pair is None:
            pair = sample_a.new_zeros(rank, sample_a.shape[1]), sample_b.new_zeros(sample_b.shape[0], rank)
        a, b = pair
        missing = rank - a.shape[0]
        a_side.append(F.pad(a, (0, 0, 0, missing)) if missing else a)
        b = b if scaling == 1 else b * scaling
        b_side.append(F.pad(b, (0, missing)) if missing else b)
    return torch.stack(a_side), torch.stack(b_side)


def _target_linears(model: PreTrainedModel, weights: LoRAWeights) -> dict[Entry, nn.Linear]:
    """The linear layer of every entry, checked for its shape."""
    layers = gated_ffn_layers(model)
    if len(layers) != weights.layers:
        raise ValueError(
            f"these LoRA weights are for a model of {weights.layers} layers, and this one has {len(layers)}"
        )
    linears: dict[Entry, nn.Linear] = {}
    for entry in weights.entries:
        path, mlp = layers[entry[0]]
        linear = getattr(mlp, entry[1])
        a, b = weights.tensors[entry]
        if not isinstance(linear, nn.Linear) or not linear.weight.is_floating_point():
            raise ValueError(f"{path}.{entry[1]} is a {type(linear).__name__}; LoRA weights need a plain linear layer")
        if linear.weight.shape != (b.shape[0], a.shape[1]):
            raise ValueError(
                f"{path}.{entry[1]} has the shape {tuple(linear.weight.shape)}, and the LoRA weights are for "
                f"({b.shape[0]}, {a.shape[1]})"
            )
        linears[entry] = linear
    return linears


def _whole(number: float) -> float | int:
    """`number` as an int where it is one, as PEFT writes alpha."""
    return int(number) if float(number).is_integer() else number


def _check_plain_lora(config: dict[str, Any], path: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: expected peft_type LORA, found {config.get('peft_type')!r}")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float) or alpha <= 0:
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


def _pattern(patterns: dict[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's rank_pattern and alpha_pattern: the first key that matches the end of a module's name, as a regex."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default
