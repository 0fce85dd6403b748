"""The match of requests with tools by activations: an auxiliary loss of the tool memory's training.

A tool's keys are FFN activations of the edge LM where the tool's description stood in the place of a request; a
request's are those of its own prompt at the same places. Training pulls the two together, so that the memory's updates
answer to requests. Which tool is called is decided by `tool_keys`. Knows nothing of models and prompts.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ToolMatch:
    """Keys of a registry's tools, in its order, and what they are compared with.

    Attributes:
        layers: edge layers whose inputs of `down_proj` are compared.
        decision_keys, name_keys: (layers, tools, intermediate size), normalised; where a tool is decided on, and where
            its name begins.
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

        Args:
            activations: inputs of `down_proj` at the end of the requests' prompts, shape (layers, requests,
                intermediate).
        """
        logits = self._cosines(0, self.decision_keys, activations)
        return torch.cat([logits, self.threshold.expand(len(logits), 1)], dim=-1)

    def choose(self, activations: Tensor) -> Tensor:
        """Logits of each tool, given that one is called, with shape (requests, tools).

        Args:
            activations: inputs of `down_proj` at the requests' own `Action:`, shape (layers, requests, intermediate).
        """
        return self._cosines(1, self.name_keys, activations)

    def _cosines(self, place: int, keys: Tensor, activations: Tensor) -> Tensor:
        x = F.normalize(activations.to(keys) - self.backgrounds[place][:, None], dim=-1)
        return torch.einsum("l,lri,lti->rt", self.weights[place], x, keys)
