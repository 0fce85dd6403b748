"""How the tool for a request is found: one vector for each tool, and maps that turn a request into such a vector.

A `ToolKeys` is a plain value, made by the generator's tool head. The tool with the vector nearest to the request's is
called, unless the learnt answer "none" is likelier. Knows nothing of models, prompts or how a
call is written.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RequestMaps:
    """How a request's captured activations become a vector, and a logit of calling no tool.

    The activations are inputs of `down_proj` of some layers, at the end of the prompt and at `Action:` behind it. Each
    layer and place is a slot: its activation x becomes x' = normalize(x - mean), and the request's vector is
    normalize(concatenate(x' · map)) over the slots. The logit of none is bias + sum of x' · none over the slots.

    Attributes:
        layers: edge layers whose activations are taken.
        means: (slots, intermediate size), of requests.
        maps: (slots, intermediate size, width).
        none: (slots, intermediate size).
        bias, scale: scalars; scale is what cosines are multiplied with to become logits.
    """

    layers: tuple[int, ...]
    means: Tensor
    maps: Tensor
    none: Tensor
    bias: Tensor
    scale: Tensor

    def __call__(self, activations: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors (requests, slots · width) and logits of none (requests,).

        Args:
            activations: shape (requests, places, layers, intermediate size).
        """
        x = F.normalize(activations.flatten(1, 2).to(self.means) - self.means, dim=-1)
        vectors = F.normalize(torch.einsum("rsi,siw->rsw", x, self.maps).flatten(1), dim=-1)
        return vectors, self.bias + torch.einsum("rsi,si->r", x, self.none)

    def to(self, device: torch.device) -> "RequestMaps":
        """The same on another device."""
        tensors = (self.means, self.maps, self.none, self.bias, self.scale)
        return RequestMaps(self.layers, *(tensor.to(device) for tensor in tensors))


@dataclass(frozen=True, eq=False)
class ToolKeys:
    """The vectors of a registry's tools, and the maps of requests to be compared with them.

    Attributes:
        requests: maps of requests; the same for every registry.
        vectors: (tools, slots · width), of length 1, in the registry's order.
    """

    requests: RequestMaps
    vectors: Tensor

    def logits(self, activations: Tensor) -> Tensor:
        """Logits of each tool, and last of calling none, with shape (requests, tools + 1).

        Args:
            activations: as `RequestMaps` takes them.
        """
        vectors, none = self.requests(activations)
        return torch.cat([self.requests.scale * vectors @ self.vectors.to(vectors).T, none[:, None]], dim=-1)

    def to(self, device: torch.device) -> "ToolKeys":
        """The same on another device."""
        return ToolKeys(self.requests.to(device), self.vectors.to(device))
