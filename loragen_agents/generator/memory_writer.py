"""Writes tools into LoRA weights: reads them with the edge LM and hands what was read to the tool memory.

Keeps what it has read, so that a registry grows or shrinks by a tool without reading the others again.
"""

from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock

import torch
from torch import Tensor, nn

from loragen_agents.generator.tool_memory import ToolMemory, ToolReading
from loragen_agents.generator.tool_reading import read_tools
from loragen_agents.language_models import LanguageModel
from loragen_agents.lora_weights import LoRAWeights, apply_lora
from loragen_agents.registry import Tool
from loragen_agents.sharing import clone_sharing_tensors, shared_renderer


class MemoryWriter(nn.Module):
    """The tool memory of one edge LM.

    keep: how many tools' readings are kept (least recently used first out). Above 0 the weights beside the memory must
        be the same on every call, until `forget` is called.
    """

    def __init__(self, edge: LanguageModel, memory: ToolMemory, keep: int = 0) -> None:
        super().__init__()
        self.memory = memory
        self.memory.to(edge.model.device)
        self._renderer = shared_renderer(edge.tokenizer)
        # In a tuple, so that the frozen edge LM is no submodule; a clone, so that other threads never see its hooks.
        self._edge = (clone_sharing_tensors(edge.model),)
        self._layers = edge.model.config.get_text_config().num_hidden_layers
        self._keep, self._kept = keep, OrderedDict[tuple[str, str], ToolReading]()
        self._lock = Lock()

    def forward(self, tools: Sequence[Tool], beside: LoRAWeights) -> LoRAWeights:
        """The tools' pieces; gradients reach the memory's maps, not the weights beside which the tools are read."""
        readings = self.read(tools, beside)
        return LoRAWeights(self._layers, 1, 1, self.memory(readings, self.directions(readings)))

    def read(self, tools: Sequence[Tool], beside: LoRAWeights) -> list[ToolReading]:
        """Read tools with the edge LM and the weights `beside` in place."""
        keys = [(tool.name, tool.description) for tool in tools]
        with self._lock:
            kept = {key: self._kept[key] for key in keys if key in self._kept} if not self.training else {}
            missing = [tool for tool, key in zip(tools, keys, strict=True) if key not in kept]
            if missing:
                with torch.no_grad(), apply_lora(self._edge[0], beside.detach()):
                    fresh = read_tools(self._edge[0], self._renderer, missing, self.memory.layers)
                kept.update({(tool.name, tool.description): one for tool, one in zip(missing, fresh, strict=True)})
            if not self.training:
                for key in keys:
                    self._kept[key] = kept[key]
                    self._kept.move_to_end(key)
                while len(self._kept) > self._keep:
                    self._kept.popitem(last=False)
        return [kept[key] for key in keys]

    def forget(self) -> None:
        """Drop all readings: the weights beside the memory have changed."""
        with self._lock:
            self._kept.clear()

    def directions(self, readings: Sequence[ToolReading]) -> Tensor:
        """Unembedding rows of all pieces' tokens times the final norm's gain, with shape (pieces, hidden size)."""
        model = self._edge[0]
        tokens = torch.cat([reading.token_ids for reading in readings]).to(model.device)
        rows = model.get_output_embeddings().weight[tokens].float()
        norm = getattr(model.base_model, "norm", None)
        gain = getattr(norm, "weight", None)
        if gain is None:
            return rows
        # Gemma's norms multiply by 1 + weight.
        return rows * (gain.float() + (1 if "Gemma" in type(norm).__name__ else 0))

    def train(self, mode: bool = True) -> "MemoryWriter":
        """Training changes what a reading gives, so nothing that was kept stays valid."""
        if mode:
            self.forget()
        super().train(mode)
        return self
