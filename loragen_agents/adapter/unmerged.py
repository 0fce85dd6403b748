"""LoRA weights run beside a model's frozen ones, unmerged, so that gradients reach the LoRA matrices."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from loragen_agents.adapter.lora_weights import Entry, LoRAWeights
from loragen_agents.adapter.merging import target_linears


@contextmanager
def apply_lora(
    model: PreTrainedModel, weights: LoRAWeights | Sequence[LoRAWeights], rows: Sequence[int] | Tensor | None = None
) -> Iterator[None]:
    """Run `model` with LoRA weights beside its own, unmerged, so that gradients reach the LoRA matrices.

    y = W·x + (alpha / rank) · B·(A·x) in gate, up and down. Nested contexts add up. The backward pass of a model with
    gradient checkpointing runs the forward again, so it has to happen inside the context.

    Args:
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
        targets |= target_linears(model, one)
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
