"""Writes tools into LoRA weights: reads them with the edge LM and hands what was read to the tool memory.

Caches readings, so that a registry grows or shrinks by a tool without reading the others again.
"""

from collections import OrderedDict
from contextlib import nullcontext
from threading import Lock

import torch
from torch import nn

from loragen_agents.adapter.lora_weights import LoRAWeights
from loragen_agents.adapter.tool_match import ToolMatch
from loragen_agents.adapter.tool_updates import MappedUpdates
from loragen_agents.adapter.unmerged import apply_lora
from loragen_agents.conversation.renderers import shared_renderer
from loragen_agents.generator.tool_memory import ToolMemory, ToolReading
from loragen_agents.generator.tool_reading import TextReader, read_tools
from loragen_agents.models.clone import clone_sharing_tensors
from loragen_agents.models.language_models import LanguageModel
from loragen_agents.registry import ToolRegistry


class MemoryWriter(nn.Module):
    """The tool memory of one edge LM.

    Args:
        keep: how many tools' readings are kept (least recently used first out). Above 0 the weights beside the memory
            must be the same on every call, until `forget` is called.
    """

    def __init__(self, edge: LanguageModel, memory: ToolMemory, keep: int = 0) -> None:
        super().__init__()
        self.memory = memory
        self.memory.to(edge.model.device)
        self._renderer = shared_renderer(edge.tokenizer)
        # In a tuple, so that the frozen edge LM is no submodule; a clone, so that other threads never see its hooks.
        self._edge = (clone_sharing_tensors(edge.model),)
        self._layers = edge.model.config.get_text_config().num_hidden_layers
        self._keep, self._kept = keep, OrderedDict[tuple[str, bool], ToolReading]()
        self._lock = Lock()

    def forward(self, registry: ToolRegistry, beside: LoRAWeights) -> tuple[LoRAWeights, ToolMatch]:
        """The registry's updates, and the match of requests that training adds as a loss.

        Gradients reach the memory's maps, not the weights `beside` that are in place while the tools are read.
        """
        readings = self.read(registry, beside)
        return LoRAWeights(self._layers, 1, 1, self.memory(readings)), self.memory.match(readings)

    def mapped(
        self, registry: ToolRegistry, beside: LoRAWeights, reader: TextReader | None = None
    ) -> list[MappedUpdates]:
        """The updates of each tool, before what the registry's tools have in common is taken off."""
        return [self.memory.mapped([reading]) for reading in self.read(registry, beside, reader)]

    def each(self, registry: ToolRegistry, beside: LoRAWeights) -> list[LoRAWeights]:
        """The updates of each tool as if it were alone in its registry: what is in place once it is chosen."""
        return [LoRAWeights(self._layers, 1, 1, self.memory([reading])) for reading in self.read(registry, beside)]

    def read(self, registry: ToolRegistry, beside: LoRAWeights, reader: TextReader | None = None) -> list[ToolReading]:
        """Read a registry's tools with the edge LM and the weights `beside` in place.

        Args:
            reader: reads in the place of transformers' modules, with these weights in place.
        """
        form = registry.input_format
        keys = [(f"{tool.model_dump_json()}{form}", reader is None) for tool in registry]
        with self._lock:
            kept = {key: self._kept[key] for key in keys if key in self._kept} if not self.training else {}
            missing = {key: tool for key, tool in zip(keys, registry, strict=True) if key not in kept}
            if missing:
                edge, tools = self._edge[0], list(missing.values())
                with torch.no_grad(), apply_lora(edge, beside.detach()) if reader is None else nullcontext():
                    fresh = read_tools(edge, self._renderer, tools, self.memory.layers, form, reader=reader)
                kept.update(zip(missing, fresh, strict=True))
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

    def train(self, mode: bool = True) -> "MemoryWriter":
        """Training changes what a reading gives, so nothing that was kept stays valid."""
        if mode:
            self.forget()
        super().train(mode)
        return self
