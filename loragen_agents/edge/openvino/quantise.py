"""Matrices as OpenVINO's constants: int8, or 4 bit in groups, with the arithmetic that gives floats back.

OpenVINO's CPU plugin keeps them compressed and turns them into floats while it multiplies.
"""

from typing import Any, Literal

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import torch
from torch import Tensor

Quantisation = Literal["int8", "int4", "none"]

# Columns that share a scale and a zero point in 4 bit, as in the GGUF formats Q4_0 and Q4_1.
GROUP = 32


def quantised(weight: Tensor, to: Quantisation) -> Any:
    """A matrix (out, in) as a node of a graph that gives it in float32.

    "int8" has one scale a row and no zero point. "int4" has a scale and a zero point for each `GROUP` columns of a row;
    a matrix whose width is no multiple of that becomes int8.
    """
    weight = weight.detach().float()
    if to == "none":
        return ops.constant(weight.numpy())
    if to == "int8" or weight.shape[1] % GROUP:
        return _int8(weight)
    return _int4(weight)


def _int8(weight: Tensor) -> Any:
    scale = _nonzero(weight.abs().amax(dim=1, keepdim=True) / 127)
    whole = (weight / scale).round_().clamp_(-127, 127).to(torch.int8)
    return ops.multiply(ops.convert(ops.constant(whole.numpy()), "f32"), ops.constant(scale.numpy()))


def _int4(weight: Tensor) -> Any:
    grouped = weight.view(len(weight), -1, GROUP)
    low = grouped.amin(dim=2, keepdim=True).clamp_(max=0)
    high = grouped.amax(dim=2, keepdim=True).clamp_(min=0)
    scale = _nonzero((high - low) / 15)
    zero = (-low / scale).round_().clamp_(0, 15)
    whole = (grouped / scale + zero).round_().clamp_(0, 15)
    floats = ops.subtract(ops.convert(_packed(whole), "f32"), ops.convert(_packed(zero), "f32"))
    shape = ops.constant(np.array(weight.shape, dtype=np.int64))
    return ops.reshape(ops.multiply(floats, ops.constant(scale.numpy())), shape, False)


def _nonzero(scale: Tensor) -> Tensor:
    """Rows of zeros have any scale."""
    return scale.masked_fill_(scale == 0, 1.0)


def _packed(whole: Tensor) -> Any:
    """Numbers from 0 to 15 as a 4-bit constant: two a byte, the first in the lower half."""
    flat = whole.to(torch.uint8).flatten()
    if len(flat) % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    packed = (flat[0::2] | (flat[1::2] << 4)).numpy()
    # The tensor only points at the bytes, which the constant has to outlive.
    return ov.op.Constant(ov.Tensor(packed, list(whole.shape), ov.Type.u4), shared_memory=False)
