"""Reads tools for the associative memory: one pass of the edge LM over each description, up to the end of its name.

Knows prompts and the edge LM; what keys and values become of the states is `tool_memory`'s part.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loragen_agents.generator.tool_memory import ToolReading
from loragen_agents.language_models import gated_ffn_layers
from loragen_agents.prompting import PromptRenderer, Turn
from loragen_agents.registry import Tool

_CALL = " Yes\nAction:"
# Descriptions are instructions, whatever their length: what stands far behind the first lines tells little about when
# a tool is wanted, and every token is paid for at specialisation.
MAX_DESCRIPTION = 400


def description_as_request(tool: Tool) -> str:
    """A tool's description in the place of a user's request: `Please find flights to a city.`"""
    text = " ".join(tool.description.split())[:MAX_DESCRIPTION].rstrip(". ")
    if text[:1].isupper() and not text[1:2].isupper():
        text = text[0].lower() + text[1:]
    return f"Please {text}."


def reading_ids(renderer: PromptRenderer, tool: Tool) -> tuple[list[int], int]:
    """Token ids of a reading, and how many at its end are predicted: the name's and the one that ends it."""
    prompt = renderer.user_turn([Turn(description_as_request(tool))])
    # The name is tokenised together with what stands around it, as it is in a step that the model writes.
    head, step = renderer.encode_text(_CALL), renderer.encode_text(f"{_CALL} {tool.name}\n")
    if step[: len(head)] != head:
        raise AssertionError(f"{tool.name!r} changes the tokens of {_CALL!r} before it")
    return prompt + step, len(step) - len(head)


def read_tools(
    model: PreTrainedModel,
    renderer: PromptRenderer,
    tools: Sequence[Tool],
    layers: Sequence[int],
    max_tokens: int = 2048,
) -> list[ToolReading]:
    """Read tools in a few batches of similar length, each at most `max_tokens` long with its padding.

    model: the edge LM with its format weights in place and no memory.
    layers: the memory's layers.
    """
    rows = [reading_ids(renderer, tool) for tool in tools]
    order = sorted(range(len(rows)), key=lambda index: len(rows[index][0]))
    readings: dict[int, ToolReading] = {}
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and len(rows[order[end]][0]) * (end + 1 - start) <= max_tokens:
            end += 1
        chunk = order[start:end]
        start = end
        batch = pad_right([rows[index][0] for index in chunk], model.device)
        captured = capture_down_proj_inputs(model, layers, batch)
        for row, index in enumerate(chunk):
            ids, count = rows[index]
            places = slice(len(ids) - count - 1, len(ids) - 1)
            readings[index] = ToolReading(captured[:, row, places].clone(), torch.tensor(ids[-count:]))
    return [readings[index] for index in range(len(rows))]


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
    """Ends a forward pass whose rest nobody needs."""


@contextmanager
def down_proj_inputs(
    model: PreTrainedModel, layers: Sequence[int], *, and_stop: bool = False
) -> Iterator[dict[int, Tensor]]:
    """Collect the inputs of `down_proj` in `layers` while the model runs, with gradients where there are any.

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
