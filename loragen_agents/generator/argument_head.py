"""The argument head: which arguments of the chosen tool a request gives and where, learnt on the edge LM's values.

A tool's arguments are read by the same model as requests are, in words and with the expert weights in place. The
values that it keeps of an argument's words, averaged, become the argument's vector by one linear map; `ArgumentReader`
compares it with the values of a request's tokens. What is given is then written by the model, which hears where it may
stand in the request. Not part of the paper.

`ArgumentHead` is the learnt part; `ArgumentIndexer` reads tools with the edge LM.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from loragen_agents.adapter.argument_reader import ArgumentKeys, ArgumentKind, ArgumentReader, side_by_side
from loragen_agents.adapter.lora_weights import LoRAWeights
from loragen_agents.adapter.unmerged import apply_lora
from loragen_agents.conversation.prompts import PromptRenderer, Turn
from loragen_agents.conversation.renderers import shared_renderer
from loragen_agents.generator.tool_reading import TextReader, pad_right
from loragen_agents.generator.tool_texts import argument_texts
from loragen_agents.models.clone import clone_sharing_tensors
from loragen_agents.models.language_models import LanguageModel
from loragen_agents.registry import Tool, json_schema
from loragen_agents.support.batching import of_similar_length

_KINDS = {
    "string": ArgumentKind.TEXT,
    "integer": ArgumentKind.NUMBER,
    "number": ArgumentKind.NUMBER,
    "boolean": ArgumentKind.BOOLEAN,
    "array": ArgumentKind.LIST,
}


class ArgumentHead(nn.Module):
    """The reader of requests, and the map from what was read of an argument to its vector.

    The vector of an argument with the mean values y of its words is K (y - mean) / deviation, with a bias.

    Args:
        layers: edge layers whose values are read, in order.
        value_width: of one layer's values, over all heads.
        width: of each part of a vector.
        hidden: as `ArgumentReader` takes it.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, layers: Sequence[int], value_width: int, width: int, hidden: int) -> None:
        super().__init__()
        self.reader = ArgumentReader(layers, value_width, width, hidden)
        size = value_width * len(self.reader.layers)
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("deviation", torch.ones(size))
        self.argument_map = nn.Linear(size, 4 * width)

    def vectors(self, words: Tensor) -> Tensor:
        """Vectors of arguments, with shape (..., 4 · width).

        Args:
            words: mean values of each argument's words, with shape (..., layers · value width).
        """
        x = F.dropout((words - self.mean) / self.deviation, self.reader.dropout, self.training)
        made: Tensor = self.argument_map(x)
        return made


class ArgumentIndexer(nn.Module):
    """The head of one edge LM, and what reads tools for it.

    Args:
        edge: the edge LM; it stays as it is.
        head: the learnt part.
    """

    def __init__(self, edge: LanguageModel, head: ArgumentHead) -> None:
        super().__init__()
        self.head = head
        self.head.to(edge.model.device)
        self._renderer = shared_renderer(edge.tokenizer)
        # In a tuple, so that the frozen edge LM is no submodule; a clone, so that other threads never see its hooks.
        self._edge = (clone_sharing_tensors(edge.model),)

    @torch.no_grad()
    def forward(self, tool: Tool, beside: LoRAWeights, reader: TextReader | None = None) -> ArgumentKeys:
        """The keys of a tool's arguments, read with the weights `beside` in place. No gradients.

        Args:
            reader: reads in the place of transformers' modules, with these weights in place.
        """
        with apply_lora(self._edge[0], beside.detach()) if reader is None else nullcontext():
            (words,) = read_arguments(self._edge[0], self._renderer, [tool], self.head.reader.layers, reader=reader)
        return argument_keys(self.head.reader, tool, self.head.vectors(words.to(self.head.mean)))


def argument_keys(reader: ArgumentReader, tool: Tool, vectors: Tensor) -> ArgumentKeys:
    """The keys of a tool's arguments, whose vectors are known."""
    kinds = tuple(int(kind) for kind in argument_kinds(tool))
    required = tuple(name in tool.required for name in tool.argument_names)
    return ArgumentKeys(reader, tool.argument_names, vectors, kinds, required)


def argument_kinds(tool: Tool) -> list[ArgumentKind]:
    """The kind of each argument, in order."""
    return [_kind(schema, tool.types_of(name)) for name, schema in tool.parameters["properties"].items()]


def _kind(schema: Any, types: frozenset[str]) -> ArgumentKind:
    if isinstance(schema, Mapping) and json_schema.constants(dict(schema)) is not None:
        return ArgumentKind.CHOICE
    kinds = {_KINDS.get(name, ArgumentKind.OTHER) for name in types - {"null"}}
    return kinds.pop() if len(kinds) == 1 else ArgumentKind.OTHER


def read_arguments(
    model: PreTrainedModel,
    renderer: PromptRenderer,
    tools: Sequence[Tool],
    layers: Sequence[int],
    max_tokens: int = 2048,
    reader: TextReader | None = None,
) -> list[Tensor]:
    """The mean values of each argument's words, for each tool with shape (arguments, layers · value width).

    Texts of similar length run together, in batches of at most `max_tokens` with padding. No gradients.

    Args:
        model: the edge LM with its expert weights in place.
        renderer: of its tokenizer.
        tools: to read.
        layers: whose values are kept.
        reader: reads in the model's place.
    """
    rows: list[list[int]] = []
    spans: list[list[list[int]]] = []  # of each text, the tokens of each argument
    homes: list[int] = []
    for place, tool in enumerate(tools):
        for text, places in argument_texts(tool):
            ids, tokens = argument_row(renderer, text, places)
            rows.append(ids)
            spans.append(tokens)
            homes.append(place)
    read = read_values(model, layers, rows, max_tokens) if reader is None else reader.values(layers, rows)
    width = value_width(model) * len(layers)
    found: list[list[Tensor]] = [[] for _ in tools]
    for home, tokens, values in zip(homes, spans, read, strict=True):
        found[home] += [values[own].mean(dim=0) for own in tokens]
    return [torch.stack(own) if own else torch.zeros(0, width) for own in found]


def argument_row(
    renderer: PromptRenderer, text: str, places: Sequence[tuple[int, int]]
) -> tuple[list[int], list[list[int]]]:
    """A text in the place of a request as token ids, and the tokens in which each of some stretches of it lies."""
    ids, prompt, starts = renderer.user_turn_with_starts([Turn(text)])
    offset = prompt.index(text)
    ends = [*starts[1:], len(prompt)]
    return ids, [
        [n for n in range(len(ids)) if starts[n] < offset + end and ends[n] > offset + begin] for begin, end in places
    ]


def read_values(
    model: PreTrainedModel, layers: Sequence[int], rows: Sequence[Sequence[int]], max_tokens: int = 2048
) -> list[Tensor]:
    """What the model keeps as values of each row's tokens, with shape (tokens, layers · value width). No gradients."""
    found: dict[int, Tensor] = {}
    for chunk in of_similar_length([len(row) for row in rows], max_tokens):
        ids = pad_right([rows[index] for index in chunk], model.device)
        with torch.no_grad():
            kept = model.base_model(input_ids=ids, use_cache=True).past_key_values
        for row, index in enumerate(chunk):
            length = len(rows[index])
            found[index] = side_by_side([kept.layers[n].values[row, :, :length] for n in layers])
    return [found[index] for index in range(len(rows))]


def value_width(model: PreTrainedModel) -> int:
    """Width of what one layer keeps as the values of a token, over all heads."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int(heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads))


def layers_read(count: int, of: int) -> tuple[int, ...]:
    """Every second layer of the last 2 · count: neighbours keep much the same."""
    return tuple(range(of - 2 * count, of, 2))
