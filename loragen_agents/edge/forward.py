"""Chooses the forward pass that a causal LM is run with.

- `LeanForward` for models that are `is_lean`: known architectures whose modules are untouched (no hooks, no adapter).
- `ModuleForward` for any other causal LM: transformers' forward with this package's cache and masks.

Which tokens to feed and what to do with the logits is `decoding`'s part.
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from loragen_agents.edge.lean_forward import LeanForward, RotaryTable
from loragen_agents.edge.module_forward import ModuleForward
from loragen_agents.edge.passes import Forward
from loragen_agents.models.arrangement import is_lean


class Runtime:
    """Chooses how `model` is run, anew for each request, so that a model merged or wrapped in between is followed.

    Raises:
        ModelLoadError: a kind of attention that the cache does not serve.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._tables: dict[torch.dtype, RotaryTable] = {}

    def bind(self) -> Forward:
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
