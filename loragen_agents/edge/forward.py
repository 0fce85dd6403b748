"""Chooses the forward pass that a causal LM is run with.

- `OpenVINOForward` where OpenVINO is chosen and has a graph for the model.
- `LeanForward` for models that are `is_lean`: known architectures whose modules are untouched (no hooks, no adapter).
- `ModuleForward` for any other causal LM: transformers' forward with this package's cache and masks.

Which tokens to feed and what to do with the logits is `decoding`'s part.
"""

import logging
import os
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from transformers import PreTrainedModel

from loragen_agents.edge.lean_forward import LeanForward, RotaryTable
from loragen_agents.edge.module_forward import ModuleForward
from loragen_agents.edge.passes import Forward
from loragen_agents.errors import ModelLoadError
from loragen_agents.models.arrangement import is_lean

RuntimeName = Literal["auto", "openvino", "torch"]

RUNTIME_VARIABLE = "LORAGEN_AGENTS_RUNTIME"

logger = logging.getLogger(__name__)


class Runtime:
    """Chooses how `model` is run, anew for each request, so that a model merged or wrapped in between is followed.

    Args:
        chosen: "torch", "openvino", or "auto": what the environment variable LORAGEN_AGENTS_RUNTIME says, else "torch".
            A model that OpenVINO has no graph for is run by PyTorch, with a warning that says why.

    Raises:
        ModelLoadError: a kind of attention that the cache does not serve, a runtime that is not known, or OpenVINO is
            chosen and not installed.
    """

    def __init__(self, model: PreTrainedModel, chosen: RuntimeName = "auto") -> None:
        self.model = model
        self.name = chosen_runtime(chosen)
        self._tables: dict[torch.dtype, RotaryTable] = {}

    @property
    def exact(self) -> bool:
        """Whether states are the same in all but the last bits of float32, however many tokens a pass reads."""
        if self.name == "openvino":
            from loragen_agents.edge.openvino.compiled import quantisation
            from loragen_agents.edge.openvino.graph import why_not

            if why_not(self.model) is None:
                return quantisation()[0] == "none"
        return self.model.dtype.itemsize >= 4

    def bind(self) -> Forward:
        if self.name == "openvino":
            from loragen_agents.edge.openvino.forward import OpenVINOForward
            from loragen_agents.edge.openvino.graph import why_not

            reason = why_not(self.model)
            if reason is None:
                return OpenVINOForward(self.model)
            logger.warning("PyTorch runs the model, not OpenVINO: %s.", reason)
        if not is_lean(self.model):
            return ModuleForward(self.model)
        dtype = self.model.lm_head.weight.dtype
        if dtype not in self._tables:
            self._tables[dtype] = RotaryTable(self.model.model.rotary_emb, dtype)
        return LeanForward(self.model, self._tables[dtype])

    def state(self) -> list[Any]:
        """Everything that makes the model compute what it computes: its parameters and hooks, by identity."""
        found: list[Any] = []
        for module in self.model.modules():
            found += module._parameters.values()
            found += module._forward_hooks.values()
            found += module._forward_pre_hooks.values()
        return found


def chosen_runtime(chosen: RuntimeName = "auto") -> Literal["openvino", "torch"]:
    """The runtime that a choice stands for; see `Runtime`.

    Raises:
        ModelLoadError: the runtime is not known or not installed.
    """
    name = os.environ.get(RUNTIME_VARIABLE, "auto") if chosen == "auto" else chosen
    if name not in get_args(RuntimeName):
        raise ModelLoadError(f"there is no runtime {name!r}; expected {', '.join(get_args(RuntimeName))}")
    if name == "openvino" and find_spec("openvino") is None:
        raise ModelLoadError("the runtime is to be openvino, which is not installed; run: pip install openvino")
    return "openvino" if name == "openvino" else "torch"
