"""What the generator hands to the edge for one registry: weights that are shared, keys, and the updates of each tool.

With keys, the shared weights are merged, the keys choose the tool, and only the chosen tool's updates are in place
while its call is written. Without keys, as for other runtimes, all of it is one sum: `combined`.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from threading import Lock
from typing import TypeVar

import torch

from loragen_agents.adapter.lora_weights import LoRAWeights
from loragen_agents.adapter.tool_keys import ToolKeys
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
    """

    def __init__(
        self,
        shared: LoRAWeights,
        keys: ToolKeys | None,
        combine: Callable[[], LoRAWeights],
        update: Callable[[str], DownUpdates] | None = None,
    ) -> None:
        self.shared, self.keys = shared, keys
        self._combine, self._update = combine, update
        self._combined: LoRAWeights | None = None
        self._updates = OrderedDict[str, DownUpdates]()
        self._lock = Lock()

    @classmethod
    def of(cls, weights: LoRAWeights) -> "RegistryWeights":
        """Weights that were made as one sum before."""
        return cls(weights, None, lambda: weights)

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
        with self._lock:
            if tool not in self._updates:
                self._updates[tool] = _made_for_all(partial(self._update, tool))
            self._updates.move_to_end(tool)
            while len(self._updates) > _KEPT:
                self._updates.popitem(last=False)
            return self._updates[tool]


def _made_for_all(make: Callable[[], Value]) -> Value:
    """Make what others may use outside the inference mode of whoever asks first."""
    with torch.inference_mode(False), torch.no_grad():
        return make()
