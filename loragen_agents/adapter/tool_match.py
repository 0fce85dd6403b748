"""Tools matched by state: which of a registry's tools a request looks like, inside the model and without a word.

A tool's keys are what the edge LM's FFNs held when the tool's description stood in the place of a request; a request's
are the same places of its own prompt. A `ToolMatch` is a plain value, made by the generator together with the LoRA
weights of a registry; it knows nothing of models, prompts or how a choice is made of it.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from loragen_agents.errors import CheckpointError
from loragen_agents.support.files import replacing

_TENSORS = ("decision_keys", "name_keys", "backgrounds", "weights", "threshold")


@dataclass(frozen=True, eq=False)
class ToolMatch:
    """Keys of a registry's tools, in its order, and what they are compared with.

    layers: edge layers whose inputs of `down_proj` are compared.
    decision_keys, name_keys: (layers, tools, intermediate size), normalised; where a tool is decided on, and where its
        name begins.
    backgrounds: (2, layers, intermediate size), taken off a request's activations at these places.
    weights: (2, layers), of the layers' cosines at these places.
    threshold: scalar, the logit of calling no tool.
    """

    layers: tuple[int, ...]
    decision_keys: Tensor
    name_keys: Tensor
    backgrounds: Tensor
    weights: Tensor
    threshold: Tensor

    def decide(self, activations: Tensor) -> Tensor:
        """Logits of each tool, and last of none, with shape (requests, tools + 1).

        activations: inputs of `down_proj` at the end of the requests' prompts, shape (layers, requests, intermediate).
        """
        logits = self._cosines(0, self.decision_keys, activations)
        return torch.cat([logits, self.threshold.expand(len(logits), 1)], dim=-1)

    def choose(self, activations: Tensor) -> Tensor:
        """Logits of each tool, given that one is called, with shape (requests, tools).

        activations: inputs of `down_proj` at the requests' own `Action:`, shape (layers, requests, intermediate).
        """
        return self._cosines(1, self.name_keys, activations)

    def _cosines(self, place: int, keys: Tensor, activations: Tensor) -> Tensor:
        x = F.normalize(activations.to(keys) - self.backgrounds[place][:, None], dim=-1)
        return torch.einsum("l,lri,lti->rt", self.weights[place], x, keys)

    def save(self, path: Path) -> None:
        """Write the tensors as float32 safetensors."""
        tensors = {name: getattr(self, name).detach().float().cpu().contiguous() for name in _TENSORS}
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata={"layers": ",".join(map(str, self.layers))})

    @classmethod
    def load(cls, path: Path) -> "ToolMatch":
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        try:
            with safe_open(path, framework="pt") as file:
                layers = tuple(int(layer) for layer in file.metadata()["layers"].split(","))
                return cls(layers, **{name: file.get_tensor(name) for name in _TENSORS})
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is not a tool match, or damaged: {error}") from error

    def to(self, device: torch.device) -> "ToolMatch":
        """The same on another device."""
        return ToolMatch(self.layers, **{name: getattr(self, name).detach().to(device) for name in _TENSORS})
