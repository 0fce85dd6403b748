"""Chooses the forward pass that a causal LM is run with.

- `OpenVINOForward` on a CPU, where OpenVINO is installed and has a graph for the model.
- `LeanForward` for models that are `is_lean`: known architectures whose modules are untouched (no hooks, no adapter).
- `ModuleForward` for any other causal LM: transformers' forward with this package's cache and masks.

Which tokens to feed and what to do with the logits is `decoding`'s part.
"""

import logging
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from loragen_agents.adapter.lora_weights import LoRAWeights
from loragen_agents.adapter.merging import target_linears
from loragen_agents.edge.lean_forward import LeanForward, RotaryTable
from loragen_agents.edge.module_forward import ModuleForward
from loragen_agents.edge.passes import Forward
from loragen_agents.models.arrangement import arrange_weights, is_lean
from loragen_agents.models.clone import clone_sharing_tensors
from loragen_agents.models.runtimes import RuntimeName, chosen_runtime, openvino_is_default

logger = logging.getLogger(__name__)


class Runtime:
    """Chooses how `model` is run, anew for each request, so that a model merged or wrapped in between is followed.

    Args:
        chosen: "auto" takes what the environment variable LORAGEN_AGENTS_RUNTIME says, and where that says nothing or
            auto, OpenVINO for models on an x86-64 CPU that it has a graph for, if it is installed, and PyTorch for all
            others. "openvino" takes it on any CPU, and warns where PyTorch has to run the model all the same.
        merged: weights that are merged into the model. PyTorch needs a copy of the matrices that they change, OpenVINO
            only until its graph is written.
        fingerprint: of the model's tensors, as `LanguageModel` has it; without it, all of them are read to find the
            compiled graph.

    Attributes:
        model: what PyTorch runs, with the weights merged, or else the model as it was given.

    Raises:
        ValueError: the weights to merge are for another model.
        ModelLoadError: a kind of attention that the cache does not serve, a runtime that is not known, or OpenVINO is
            chosen by name and not installed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        chosen: RuntimeName = "auto",
        merged: LoRAWeights | None = None,
        fingerprint: str | None = None,
    ) -> None:
        self.model = model
        self.chosen = chosen_runtime(chosen)
        self._merged, self._fingerprint = merged, fingerprint
        self._parts: tuple[PreTrainedModel, list[Any]] | None = None
        self._tables: dict[torch.dtype, RotaryTable] = {}
        if merged is not None:
            target_linears(model, merged)  # weights for another model are refused now
        if self._why_torch() is not None:
            self._merge()

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
        self._parts = None
        reason = self._why_torch()
        if reason is None:
            from loragen_agents.edge.openvino.forward import OpenVINOForward

            return OpenVINOForward(self.model, self._merged, self._fingerprint)
        if self.chosen != "torch":
            level = logging.WARNING if self.chosen == "openvino" else logging.INFO
            logger.log(level, "PyTorch runs the model, not OpenVINO: %s.", reason)
        self._merge()
        if not is_lean(self.model):
            return ModuleForward(self.model)
        dtype = self.model.lm_head.weight.dtype
        if dtype not in self._tables:
            self._tables[dtype] = RotaryTable(self.model.model.rotary_emb, dtype)
        return LeanForward(self.model, self._tables[dtype])

    def _merge(self) -> None:
        if self._merged is None:
            return
        base, self.model = self.model, clone_sharing_tensors(self.model)
        self._merged.merge_into(self.model)
        arrange_weights(self.model, base)
        self._merged = self._fingerprint = None

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
        """Everything that makes the model compute what it computes: modules, parameters and hooks, by identity."""
        if self._parts is None or self._parts[0] is not self.model:
            # The tree is walked once: a module that is put into it later shows in the one that it was put into.
            dicts = [
                each
                for module in self.model.modules()
                for each in (module._modules, module._parameters, module._forward_hooks, module._forward_pre_hooks)
            ]
            self._parts = self.model, dicts
        return [one for each in self._parts[1] for one in each.values()]
