"""The graph of a causal LM that OpenVINO runs without this package, with the inputs that its other tools expect.

Inputs (rows, width: the tokens fed; span: all tokens of a row so far, those fed last):

- `input_ids` and `position_ids` (rows, width); a row's positions count from 0
- `attention_mask` (rows, span): 1 for a token, 0 for padding
- `beam_idx` (rows,): which row of the states each row continues

Output: `logits` (rows, 1, vocabulary), behind the last token. Keys and values are states of an infer request, so a
conversation is fed token by token, and `reset_state()` begins another one.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import torch
from transformers import PreTrainedModel

from loragen_agents.edge.openvino.compiled import quantisation
from loragen_agents.edge.openvino.graph import GraphWriter, layer_kinds

# Far below any score, and finite in every precision.
_MASKED = np.float32(-1e30)


def save_standalone(model: PreTrainedModel, file: Path) -> list[Path]:
    """Write the graph of a model for which `why_not` gives None to `file` (.xml) and its weights beside it (.bin).

    Matrices are kept as LORAGEN_AGENTS_QUANTISATION says.
    """
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        graph = Path(folder) / file.name
        ov.save_model(_StandaloneWriter(model).graph(), graph, compress_to_fp16=False)
        written = [graph.with_suffix(".bin"), graph]
        return [one.replace(file.parent / one.name) for one in written]


class _StandaloneWriter(GraphWriter):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model, (), *quantisation())

    def _begin(self) -> Any:
        ids = self._input("input_ids", [-1, -1], ov.Type.i64)
        attended = self._input("attention_mask", [-1, -1], ov.Type.i64)
        positions = self._input("position_ids", [-1, -1], ov.Type.i64)
        self._beam = self._input("beam_idx", [-1], ov.Type.i32)
        shape = ops.shape_of(ids, "i64")
        self._rows = ops.gather(shape, _whole([0]), _whole(0))
        width, span = (ops.gather(of, _whole(1), _whole(0)) for of in (shape, ops.shape_of(attended, "i64")))
        kinds = sorted(set(layer_kinds(self._model)))
        self._positions = {kind: self._rotary(kind, positions) for kind in kinds}
        self._masks = {kind: self._mask(kind, attended, width, span) for kind in kinds}
        return ops.gather(self._embeddings(), ids, _whole(0))

    def _embeddings(self) -> Any:
        table: Any = self._model.get_input_embeddings()
        with torch.no_grad():
            # By the module itself, since those of some models are scaled.
            rows = table(torch.arange(table.weight.shape[0])).float()
        if self._to == "none":
            return ops.constant(rows.numpy())
        return ops.convert(ops.constant(rows.half().numpy()), "f32")

    def _rotary(self, kind: str, positions: Any) -> tuple[Any, Any]:
        """Cosines and sines at the positions, each with shape (rows, 1, width, head size)."""
        module: Any = self._model.model.rotary_emb
        # Models that have several kinds of layers have frequencies for each.
        prefix = f"{kind}_" if hasattr(module, f"{kind}_inv_freq") else ""
        frequencies = getattr(module, f"{prefix}inv_freq").float().numpy()
        scaling = ops.constant(np.float32(getattr(module, f"{prefix}attention_scaling")))
        wide = ops.unsqueeze(ops.convert(positions, "f32"), _whole([1, 3]))
        angles = ops.multiply(wide, ops.constant(np.concatenate((frequencies, frequencies))))
        return ops.multiply(ops.cos(angles), scaling), ops.multiply(ops.sin(angles), scaling)

    def _mask(self, kind: str, attended: Any, width: Any, span: Any) -> Any:
        """0 where a token attends to a slot, a large negative number elsewhere: (rows, 1, width, span)."""
        slots = ops.range(_whole(0), span, _whole(1), "i64")
        fed = ops.unsqueeze(ops.range(ops.subtract(span, width), span, _whole(1), "i64"), _whole(1))
        visible = ops.less_equal(slots, fed)
        if kind == "sliding_attention":
            window = _whole(int(self._model.config.sliding_window))
            visible = ops.logical_and(visible, ops.less(ops.subtract(fed, slots), window))
        real = ops.unsqueeze(ops.greater(attended, _whole(0)), _whole([1, 2]))
        return ops.select(ops.logical_and(real, visible), ops.constant(np.float32(0)), ops.constant(_MASKED))

    def _kept(self, x: Any) -> Any:
        return ops.slice(x, _whole([-1]), _whole([2**31 - 1]), _whole([1]), _whole([1]))


def _whole(values: int | list[int]) -> Any:
    return ops.constant(np.array(values, dtype=np.int64))
