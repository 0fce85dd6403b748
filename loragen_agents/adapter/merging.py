"""LoRA weights merged into a model, and the original weights put back bit for bit."""

from types import TracebackType

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loragen_agents.adapter.lora_weights import Entry, LoRAWeights
from loragen_agents.models.language_models import gated_ffn_layers


def merge(weights: LoRAWeights, model: PreTrainedModel) -> "Merged":
    """Put W + (alpha / rank) · B·A in the place of every W that changes; see `Merged` for the way back.

    Worked out in float32 and then cast to W's dtype. W's tensor itself is left alone, so a model that shares it
    does not change. Entries whose update is exactly zero change nothing and cost no memory.

    Raises:
        ValueError: the model's FFNs have another number or other shapes than these weights.
    """
    linears = target_linears(model, weights)
    replaced: list[tuple[nn.Linear, Tensor, nn.Parameter]] = []
    buffers: dict[tuple[torch.Size, torch.device], Tensor] = {}
    with torch.no_grad():
        for entry in weights.entries:
            a, b = weights.tensors[entry]
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
            merged = buffers[key].copy_(original).addmm_(b, a, alpha=weights.scaling)
            replaced.append((linear, original, nn.Parameter(merged.to(original.dtype, copy=True), requires_grad=False)))
    for linear, _, merged_weight in replaced:
        linear.weight = merged_weight
    return Merged(replaced)


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


def target_linears(model: PreTrainedModel, weights: LoRAWeights) -> dict[Entry, nn.Linear]:
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
