"""Reads tools for the associative memory: one pass of the edge LM over each description and the call it asks for.

Knows prompts and the edge LM; how the activations become keys and values is `tool_memory`'s part.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loragen_agents.adapter.tool_updates import UpdateKind
from loragen_agents.conversation.prompts import PromptRenderer, Turn
from loragen_agents.conversation.react import ACTION, ACTION_INPUT, NO_TOOL, USE_TOOL
from loragen_agents.generator.tool_memory import ToolReading
from loragen_agents.generator.tool_texts import as_request
from loragen_agents.models.language_models import gated_ffn_layers
from loragen_agents.registry import InputFormat, Tool
from loragen_agents.support.batching import of_similar_length

_OPENING = ' {"'
_MAX_DESCRIPTION = 400
# Each token of an argument's name adds one to the rank of the weights.
MAX_ARGUMENTS = 8


class TextReader(Protocol):
    """Reads texts with the edge LM, with the weights in place beside which tools are read.

    Without one, transformers' modules read them. Results of different readers differ in their last bits.
    """

    def activations(self, layers: Sequence[int], rows: Sequence[tuple[list[int], list[int]]]) -> list[Tensor]:
        """As `captured_at`."""

    def values(self, layers: Sequence[int], rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """As `argument_head.read_values`."""


@dataclass(frozen=True)
class ReadingText:
    """A reading as token ids, and the places of its updates.

    Attributes:
        places: of each update, the index in `ids` of the token before the one that it raises.
        kinds: an `UpdateKind` each.
        raised, lowered: token ids whose logit an update raises and lowers, None for none.
    """

    ids: list[int]
    places: list[int]
    kinds: list[UpdateKind]
    raised: list[int | None]
    lowered: list[int | None]


def reading_text(renderer: PromptRenderer, tool: Tool, input_format: InputFormat = "json") -> ReadingText:
    """What the edge LM reads of a tool: its description as a request, and the step that calls it.

    Argument values are left open: where a value stands in a json input, the argument's name is written in words.
    """
    prompt = renderer.user_turn([Turn(as_request(tool.description, _MAX_DESCRIPTION))])
    yes, no, opening = (renderer.encode_text(text)[0] for text in (USE_TOOL, NO_TOOL, _OPENING))
    # The step is tokenised as a whole, as it is when a model writes it; the parts say which stretch of it is which.
    parts: list[tuple[str, UpdateKind | None]] = [
        (USE_TOOL + ACTION, None),
        (f" {tool.name}", UpdateKind.NAME),
        (ACTION_INPUT, None),
    ]
    if input_format == "json":
        names = tool.argument_names[:MAX_ARGUMENTS]
        parts.append((" {" if names else " {}", UpdateKind.INPUT))
        for number, name in enumerate(names):
            written = json.dumps(name, ensure_ascii=False)[1:-1]
            parts += [(', "' if number else '"', None), (written, UpdateKind.ARGUMENT)]
            parts.append((f'": {_example(tool, name, written)}', None))
    ids, starts = renderer.encode_with_starts("".join(text for text, _ in parts))
    made = ReadingText([], [len(prompt) - 1], [UpdateKind.DECISION], [yes], [no])

    def add(index: int, kind: UpdateKind, raised: int | None, lowered: int | None = None) -> None:
        made.places.append(len(prompt) + index - 1)
        made.kinds.append(kind)
        made.raised.append(raised)
        made.lowered.append(lowered)

    ends = [*starts[1:], sum(len(text) for text, _ in parts)]
    begin = 0
    for text, kind in parts:
        end = begin + len(text)
        if kind is not None:
            inside = [n for n in range(len(ids)) if starts[n] < end and ends[n] > begin]
            if kind is UpdateKind.NAME:
                # The token behind a name tells "find" from "find_all".
                inside.append(inside[-1] + 1)
                add(inside[0], UpdateKind.NAME_START, ids[inside[0]])
                inside = inside[1:]
            elif kind is UpdateKind.INPUT:
                inside = inside[:1]
                add(inside[0], UpdateKind.OWN_INPUT, ids[inside[0]])
            for index in inside:
                add(index, kind, ids[index])
        begin = end
    if input_format == "csv":
        for kind in (UpdateKind.INPUT, UpdateKind.OWN_INPUT):
            add(len(ids), kind, None, opening)
    # Under the causal mask, tokens behind the last place change none of the activations.
    made.ids.extend((prompt + ids)[: made.places[-1] + 1])
    return made


def _example(tool: Tool, argument: str, written: str) -> str:
    schema = tool.parameters["properties"][argument]
    numeric = isinstance(schema, dict) and schema.get("type") in ("number", "integer")
    return "0" if numeric else f'"{_in_words(written)}"'


def _in_words(name: str) -> str:
    return " ".join(name.replace("_", " ").split())


def read_tools(
    model: PreTrainedModel,
    renderer: PromptRenderer,
    tools: Sequence[Tool],
    layers: Sequence[int],
    input_format: InputFormat = "json",
    max_tokens: int = 2048,
    reader: TextReader | None = None,
) -> list[ToolReading]:
    """Read tools in a few batches of similar length, each at most `max_tokens` long with its padding.

    Args:
        model: the edge LM with its format weights in place and no memory.
        layers: the memory's layers.
        reader: reads in the model's place.
    """
    texts = [reading_text(renderer, tool, input_format) for tool in tools]
    rows = [(text.ids, text.places) for text in texts]
    readings: list[ToolReading] = []
    captured = captured_at(model, layers, rows, max_tokens) if reader is None else reader.activations(layers, rows)
    for text, activations in zip(texts, captured, strict=True):
        directions = _logit_directions(model, text.raised) - _logit_directions(model, text.lowered)
        kinds = torch.tensor([int(kind) for kind in text.kinds])
        readings.append(ToolReading(activations, directions, kinds))
    return readings


def captured_at(
    model: PreTrainedModel, layers: Sequence[int], rows: Sequence[tuple[list[int], list[int]]], max_tokens: int = 2048
) -> list[Tensor]:
    """Inputs of `down_proj` at some places of each row of token ids, with shape (layers, places, intermediate size).

    Rows of similar length run together, in batches of at most `max_tokens` with padding. No gradients.
    """
    found: dict[int, Tensor] = {}
    for chunk in of_similar_length([len(ids) for ids, _ in rows], max_tokens):
        captured = capture_down_proj_inputs(model, layers, pad_right([rows[index][0] for index in chunk], model.device))
        for row, index in enumerate(chunk):
            found[index] = captured[:, row, rows[index][1]].clone()
    return [found[index] for index in range(len(rows))]


@torch.no_grad()
def _logit_directions(model: PreTrainedModel, tokens: Sequence[int | None]) -> Tensor:
    """Unembedding rows times the final norm's gain, with shape (tokens, hidden size); zeros in the place of None."""
    known = torch.tensor([token is not None for token in tokens], device=model.device)
    ids = torch.tensor([token or 0 for token in tokens], device=model.device)
    rows = model.get_output_embeddings().weight[ids].float() * known[:, None]
    norm = getattr(model.base_model, "norm", None)
    gain = getattr(norm, "weight", None)
    if gain is None:
        return rows
    # Gemma's norms multiply by 1 + weight.
    return rows * (gain.float() + (1 if "Gemma" in type(norm).__name__ else 0))


def pad_right(rows: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> Tensor:
    """Rows of token ids as one (rows, longest) tensor. Under a causal mask what stands behind a row changes nothing."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *([0] * (width - len(row)))] for row in rows], device=device)


def capture_down_proj_inputs(model: PreTrainedModel, layers: Sequence[int], input_ids: Tensor) -> Tensor:
    """Inputs of `down_proj` in `layers`, with shape (layers, rows, tokens, intermediate size). No gradients.

    Layers behind the last one wanted are not run.
    """
    with torch.no_grad(), down_proj_inputs(model, layers, and_stop=True) as found:
        model.base_model(input_ids=input_ids, use_cache=False)
    return torch.stack([found[layer] for layer in layers])


class _Enough(Exception):
    """Ends a forward pass early: all activations that are wanted are there."""


@contextmanager
def down_proj_inputs(
    model: PreTrainedModel, layers: Sequence[int], *, and_stop: bool = False
) -> Iterator[dict[int, Tensor]]:
    """Collect the inputs of `down_proj` in `layers` while the model runs, with gradients where there are any.

    Args:
        and_stop: end the forward pass at the last of the layers, and with it the block of the `with` statement.
    """
    found: dict[int, Tensor] = {}
    modules = [module for _, module in gated_ffn_layers(model)]

    def keep(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found[layer] = inputs[0]
            if and_stop and layer == max(layers):
                raise _Enough

        return hook

    handles = [modules[layer].get_submodule("down_proj").register_forward_pre_hook(keep(layer)) for layer in layers]
    try:
        with suppress(_Enough):
            yield found
    finally:
        for handle in handles:
            handle.remove()
