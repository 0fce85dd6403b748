"""The tool head: which tool a request calls for, learnt on activations of the frozen edge LM (no part of the paper).

A request and a tool are read by the same model, with the expert weights in place. Its FFN activations in the last
layers, at two places, become a vector by one linear map for requests and one for tools; the tool with the vector
nearest to the request's is called. A tool is read by several texts (see `tool_texts`), whose vectors are
averaged, so tools don't depend on each other: a registry grows by a tool without touching the others.

`ToolHead` is the learnt part; `ToolIndexer` reads tools with the edge LM and keeps their vectors.
"""

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import nullcontext
from threading import Lock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loragen_agents.adapter.lora_weights import LoRAWeights
from loragen_agents.adapter.tool_keys import RequestMaps, ToolKeys
from loragen_agents.adapter.unmerged import apply_lora
from loragen_agents.conversation.prompts import PromptRenderer, Turn
from loragen_agents.conversation.react import ACTION, USE_TOOL
from loragen_agents.conversation.renderers import shared_renderer
from loragen_agents.generator.tool_reading import TextReader, captured_at
from loragen_agents.generator.tool_texts import TextKind, request_texts
from loragen_agents.models.clone import clone_sharing_tensors
from loragen_agents.models.language_models import LanguageModel
from loragen_agents.registry import Tool, ToolRegistry

# Activations are taken at the end of the prompt and behind the beginning of a call.
PLACES = 2


class ToolHead(nn.Module):
    """Maps of requests and of tools into one space, and the logit of calling no tool.

    A slot is a place and a layer, and x' = normalize(x - mean) the activation of a slot. A request's vector is
    normalize(concatenate(x'_s · request_map_s)); that of a tool is made in the same way of each of its texts with
    tool_map, then averaged with the softmax of `text_weights` over the texts that it has, and normalised. Means are
    those of requests, or of one kind of text. The logit of a tool is exp(log_scale) times the cosine, that of none is
    bias + sum of x'_s · none_s over the request's slots.

    Args:
        layers: edge layers whose activations are taken, in order.
        intermediate_size: width inside the edge LM's FFN.
        width: numbers that each slot gives to a vector.
    """

    request_mean: Tensor
    tool_mean: Tensor

    def __init__(self, layers: Sequence[int], intermediate_size: int, width: int) -> None:
        super().__init__()
        self.layers, self.width = tuple(layers), width
        slots, kinds = PLACES * len(self.layers), len(TextKind)
        first = torch.randn(slots, intermediate_size, width) * 3 / intermediate_size**0.5
        self.request_map, self.tool_map = nn.Parameter(first), nn.Parameter(first.clone())
        self.text_weights = nn.Parameter(torch.zeros(kinds))
        self.none = nn.Parameter(torch.zeros(slots, intermediate_size))
        self.none_bias = nn.Parameter(torch.tensor(4.0))
        self.log_scale = nn.Parameter(torch.tensor(2.5))
        self.register_buffer("request_mean", torch.zeros(slots, intermediate_size))
        self.register_buffer("tool_mean", torch.zeros(kinds, slots, intermediate_size))

    def request_vectors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors of requests (requests, slots · width) and logits of none (requests,).

        Args:
            x: activations x' that are centred and normalised already, with shape (requests, slots, intermediate size).
        """
        vectors = F.normalize(torch.einsum("rsi,siw->rsw", x, self.request_map).flatten(1), dim=-1)
        return vectors, self.none_bias + torch.einsum("rsi,si->r", x, self.none)

    @torch.no_grad()
    def in_full(self, basis: Tensor, request_mean: Tensor, tool_mean: Tensor) -> "ToolHead":
        """The same head for activations themselves, where this one was learnt on their leading directions.

        Args:
            basis: (slots, intermediate size, this head's intermediate size).
            request_mean: (slots, intermediate size). tool_mean: (kinds, slots, intermediate size).
        """
        made = ToolHead(self.layers, basis.shape[1], self.width)
        made.request_map.copy_(torch.bmm(basis, self.request_map))
        made.tool_map.copy_(torch.bmm(basis, self.tool_map))
        made.none.copy_(torch.einsum("sik,sk->si", basis, self.none))
        for name in ("text_weights", "none_bias", "log_scale"):
            getattr(made, name).copy_(getattr(self, name))
        made.request_mean.copy_(request_mean)
        made.tool_mean.copy_(tool_mean)
        return made

    def maps(self) -> RequestMaps:
        """The maps of requests, as a value of their own."""
        scale = self.log_scale.exp()
        return RequestMaps(self.layers, self.request_mean, self.request_map, self.none, self.none_bias, scale)

    def vectors(self, activations: Tensor, present: Tensor) -> Tensor:
        """Vectors of tools, of length 1, with shape (tools, slots · width).

        Args:
            activations: of each tool and kind of text, with shape (tools, kinds, slots, intermediate size).
            present: which texts a tool has, boolean, with shape (tools, kinds); the activations of others are not used.
        """
        return self.tool_vectors(F.normalize(activations.to(self.tool_mean) - self.tool_mean, dim=-1), present)

    def tool_vectors(self, x: Tensor, present: Tensor) -> Tensor:
        """As `vectors`, of activations x' that are centred and normalised already."""
        each = F.normalize(torch.einsum("tksi,siw->tksw", x, self.tool_map).flatten(2), dim=-1)
        weights = self.text_weights.expand(present.shape).masked_fill(~present, -torch.inf).softmax(dim=-1)
        return F.normalize(torch.einsum("tk,tkv->tv", weights, each), dim=-1)


class ToolIndexer(nn.Module):
    """The head of one edge LM; reads tools for it and caches their vectors.

    Args:
        edge: the edge LM; it stays as it is.
        head: the learnt part.
        keep: how many tools' vectors are kept (least recently used first out). Above 0 the weights beside which tools
            are read must be the same on every call, until `forget` is called.
    """

    def __init__(self, edge: LanguageModel, head: ToolHead, keep: int = 0) -> None:
        super().__init__()
        self.head = head
        self.head.to(edge.model.device)
        self._renderer = shared_renderer(edge.tokenizer)
        # In a tuple, so that the frozen edge LM is no submodule; a clone, so that other threads never see its hooks.
        self._edge = (clone_sharing_tensors(edge.model),)
        self._keep, self._kept = keep, OrderedDict[tuple[str, bool], Tensor]()
        self._lock = Lock()

    @torch.no_grad()
    def forward(self, registry: ToolRegistry, beside: LoRAWeights, reader: TextReader | None = None) -> ToolKeys:
        """The keys of a registry's tools, read with the weights `beside` in place. No gradients.

        Args:
            reader: reads in the place of transformers' modules, with these weights in place.
        """
        names = [(tool.model_dump_json(), reader is None) for tool in registry]
        with self._lock:
            found = {name: self._kept[name] for name in names if name in self._kept}
            missing = {name: tool for name, tool in zip(names, registry, strict=True) if name not in found}
            if missing:
                found.update(zip(missing, self._read(list(missing.values()), beside, reader), strict=True))
            for name in names:
                self._kept[name] = found[name]
                self._kept.move_to_end(name)
            while len(self._kept) > self._keep:
                self._kept.popitem(last=False)
        return self.keys(torch.stack([found[name] for name in names]))

    def keys(self, vectors: Tensor) -> ToolKeys:
        """The keys of tools whose vectors are known."""
        return ToolKeys(self.head.maps(), vectors)

    def forget(self) -> None:
        """Drop all vectors: the head or the weights beside it have changed."""
        with self._lock:
            self._kept.clear()

    def train(self, mode: bool = True) -> "ToolIndexer":
        """Training changes the vectors, so none that was kept stays valid."""
        if mode:
            self.forget()
        super().train(mode)
        return self

    def _read(self, tools: Sequence[Tool], beside: LoRAWeights, reader: TextReader | None) -> Tensor:
        """Vectors of tools, read some dozens at a time: the activations of 1,000 tools would take much memory."""
        done = []
        with apply_lora(self._edge[0], beside.detach()) if reader is None else nullcontext():
            for begin in range(0, len(tools), 64):
                texts = [request_texts(tool) for tool in tools[begin : begin + 64]]
                rows = [request_row(self._renderer, Turn(text)) for own in texts for text in own.values()]
                if reader is None:
                    read = captured_at(self._edge[0], self.head.layers, rows)
                else:
                    read = reader.activations(self.head.layers, rows)
                x = iter(read)
                shape = (len(texts), len(TextKind), *self.head.request_mean.shape)
                activations = torch.zeros(shape, device=self.head.none.device)
                present = torch.zeros(shape[:2], dtype=torch.bool, device=activations.device)
                for place, own in enumerate(texts):
                    for kind in own:
                        # (layers, places, intermediate size), and slots go by place first
                        activations[place, kind] = next(x).transpose(0, 1).flatten(0, 1).to(activations)
                        present[place, kind] = True
                done.append(self.head.vectors(activations, present))
        # Rounded to what is kept on disk, so that a registry chooses the same when it is loaded.
        return torch.cat(done).half().float()


def request_row(renderer: PromptRenderer, turn: Turn) -> tuple[list[int], list[int]]:
    """An open turn as token ids up to `Action:`, and the places in it at which activations are taken."""
    prompt = renderer.user_turn([turn])
    call = renderer.encode_text(USE_TOOL + ACTION)
    return prompt + call, [len(prompt) - 1, len(prompt) + len(call) - 1]
