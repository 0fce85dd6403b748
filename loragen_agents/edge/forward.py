"""Chooses the forward pass that a causal LM is run with.

- `OpenVINOForward` on a CPU, where OpenVINO is installed and has a graph for the model.
- `LeanForward` for models that are `is_lean`: known architectures whose modules are untouched (no hooks, no adapter).
- `ModuleForward` for any other causal LM: transformers' forward with this package's cache and masks.

Which tokens to feed and what to do with the logits is `decoding`'s part.
"""

import logging
import os
import platform
from importlib.util import find_spec
from typing import Any, Literal, cast, get_args

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
        chosen: "auto" takes what the environment variable LORAGEN_AGENTS_RUNTIME says, and where that says nothing or
            auto, OpenVINO for models on an x86-64 CPU that it has a graph for, if it is installed, and PyTorch for all
            others. "openvino" takes it on any CPU, and warns where PyTorch has to run the model all the same.

    Raises:
        ModelLoadError: a kind of attention that the cache does not serve, a runtime that is not known, or OpenVINO is
            chosen by name and not installed.
    """

    def __init__(self, model: PreTrainedModel, chosen: RuntimeName = "auto") -> None:
        self.model = model
        self.chosen = chosen_runtime(chosen)
        self._tables: dict[torch.dtype, RotaryTable] = {}

    @property
    def name(self) -> Literal["openvino", "torch"]:
        """What runs the model as it is now."""
        return "openvino" if self._why_torch() is None else "torch"

    @property
    def exact(self) -> bool:
        """Whether states are the same in all but the last bits of float32, however many tokens a pass reads."""
        if self.name == "openvino":
            from loragen_agents.edge.openvino.compiled import quantisation

            return quantisation()[0] == "none"
        return self.model.dtype.itemsize >= 4

    def bind(self) -> Forward:
        reason = self._why_torch()
        if reason is None:
            from loragen_agents.edge.openvino.forward import OpenVINOForward

            return OpenVINOForward(self.model)
        if self.chosen != "torch":
            level = logging.WARNING if self.chosen == "openvino" else logging.INFO
            logger.log(level, "PyTorch runs the model, not OpenVINO: %s.", reason)
        if not is_lean(self.model):
            return ModuleForward(self.model)
        dtype = self.model.lm_head.weight.dtype
        if dtype not in self._tables:
            self._tables[dtype] = RotaryTable(self.model.model.rotary_emb, dtype)
        return LeanForward(self.model, self._tables[dtype])

    def _why_torch(self) -> str | None:
        """Why PyTorch runs the model as it is now; None where OpenVINO does."""
        if self.chosen == "torch":
            return "it was chosen"
        if self.model.device.type != "cpu":
            return f"the model is on {self.model.device}"
        if self.chosen == "auto" and not openvino_is_default():
            return "openvino is not installed, or this is no x86-64 CPU"
        from loragen_agents.edge.openvino.graph import why_not

        return why_not(self.model)

    def state(self) -> list[Any]:
        """Everything that makes the model compute what it computes: its parameters and hooks, by identity."""
        found: list[Any] = []
        for module in self.model.modules():
            found += module._parameters.values()
            found += module._forward_hooks.values()
            found += module._forward_pre_hooks.values()
        return found


def openvino_is_default() -> bool:
    """Whether OpenVINO runs what it can on this machine's CPU, where nothing else is said.

    Other kinds of CPUs were not measured.
    """
    return platform.machine().lower() in ("x86_64", "amd64") and find_spec("openvino") is not None


def chosen_runtime(chosen: RuntimeName = "auto") -> RuntimeName:
    """The runtime that a choice and LORAGEN_AGENTS_RUNTIME ask for; see `Runtime`.

    Raises:
        ModelLoadError: the runtime is not known, or OpenVINO is asked for by name and not installed.
    """
    name = (os.environ.get(RUNTIME_VARIABLE, "").strip() or "auto") if chosen == "auto" else chosen
    if name not in get_args(RuntimeName):
        raise ModelLoadError(f"there is no runtime {name!r}; expected {', '.join(get_args(RuntimeName))}")
    if name == "openvino" and find_spec("openvino") is None:
        raise ModelLoadError("the runtime is to be openvino, which is not installed; run: pip install openvino")
    return cast(RuntimeName, name)
