"""What the generator hands to the edge for one registry: shared weights, keys, and the updates of each tool.

With keys, the shared weights are merged, the keys choose the tool, and only the chosen tool's updates are in place
while its call is written, with the arguments that a reader finds in the request. Without keys, as for other runtimes,
all of it is one sum: `combined`.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from threading import Lock
from typing import TypeVar

import torch

from loragen_agents.adapter.argument_reader import ArgumentKeys
from loragen_agents.adapter.lora_weights import LoRAWeights
from loragen_agents.adapter.tool_keys import ToolKeys
from loragen_agents.adapter.tool_updates import ToolUpdates
from loragen_agents.adapter.updates import DownUpdates

Value = TypeVar("Value")

# The updates of a tool take some 100 KB to 1 MB; they are made again when a tool that was dropped is called.
_KEPT = 64


class RegistryWeights:
    """The parts of a registry's weights; those of single tools and the sum are made when they are first asked for.

    Safe to use from several threads.

    Args:
        shared: the weights that carry format and task.
        keys: of the registry's tools; None where the sum alone carries the registry.
        combine: makes the sum of all weights.
        update: makes the updates of one tool, by its name; None where tools have none.
        arguments: reads the arguments of one tool, by its name; None where the model alone decides which it gives.
    """

    def __init__(
        self,
        shared: LoRAWeights,
        keys: ToolKeys | None,
        combine: Callable[[], LoRAWeights],
        update: Callable[[str], DownUpdates] | None = None,
        arguments: Callable[[str], ArgumentKeys] | None = None,
    ) -> None:
        self.shared, self.keys = shared, keys
        self.tool_updates: ToolUpdates | None = None
        self._combine, self._update, self._read = combine, update, arguments
        self._combined: LoRAWeights | None = None
        self._updates = OrderedDict[str, DownUpdates]()
        self._arguments = OrderedDict[str, ArgumentKeys]()
        self._lock = Lock()

    @classmethod
    def of(cls, weights: LoRAWeights) -> "RegistryWeights":
        """Weights that were made as one sum before."""
        return cls(weights, None, lambda: weights)

    @classmethod
    def of_tools(
        cls,
        shared: LoRAWeights,
        keys: ToolKeys | None,
        updates: ToolUpdates,
        arguments: Callable[[str], ArgumentKeys] | None = None,
    ) -> "RegistryWeights":
        """Weights whose sum is that of the shared ones and of all tools' updates, which `tool_updates` keeps."""
        made = cls(shared, keys, lambda: shared.concatenate(updates.combined()), updates.of, arguments)
        made.tool_updates = updates
        return made

    def combined(self) -> LoRAWeights:
        """The sum of shared weights and all tools' updates: what is exported to other runtimes."""
        with self._lock:
            if self._combined is None:
                self._combined = _made_for_all(self._combine)
            return self._combined

    def updates(self, tool: str) -> DownUpdates | None:
        """What is in place while a call of this tool is written; None for nothing but the shared weights."""
        if self._update is None:
            return None
        return self._kept_of(self._updates, tool, self._update)

    def arguments(self, tool: str) -> ArgumentKeys | None:
        """What a tool's arguments are recognised by in a request; None where the model alone decides."""
        return None if self._read is None else self._kept_of(self._arguments, tool, self._read)

    def _kept_of(self, kept: OrderedDict[str, Value], tool: str, make: Callable[[str], Value]) -> Value:
        with self._lock:
            if tool not in kept:
                kept[tool] = _made_for_all(partial(make, tool))
            kept.move_to_end(tool)
            while len(kept) > _KEPT:
                kept.popitem(last=False)
            return kept[tool]


def _made_for_all(make: Callable[[], Value]) -> Value:
    """Make a value of ordinary tensors even where the first caller is in inference mode: others may merge them."""
    with torch.inference_mode(False), torch.no_grad():
        return make()
