"""Tokens to a forward pass: prompts in passes of bounded width, and continuations of one prompt side by side."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from loragen_agents.edge.passes import Cache, Forward, Layout, RowUpdates

# Tokens read in one pass: bounds the memory that a long prompt takes, and the wait for a cancellation to be noticed.
CHUNK = 512


def feed(
    forward: Forward,
    cache: Cache,
    tokens: Sequence[Sequence[int]],
    device: torch.device,
    updates: RowUpdates,
    cancelled: Callable[[], bool] = lambda: False,
    width: int | None = None,
) -> list[Tensor | None]:
    """Feed each row its tokens, at most `width` a pass; return the logits (vocabulary,) behind each row's last.

    None for a row without tokens, and for those whose last token was not reached before `cancelled`.
    """
    width = width or CHUNK
    logits: list[Tensor | None] = [None] * len(tokens)
    for begin in range(0, max(map(len, tokens)), width):
        if begin and cancelled():
            break
        parts = [row[begin : begin + width] for row in tokens]
        counts = [len(part) for part in parts]
        longest = max(counts)
        ids = torch.tensor([[*part, *[0] * (longest - len(part))] for part in parts], device=device)
        keep = torch.tensor([[max(0, count - 1)] for count in counts], device=device)
        result = forward(ids, cache, keep, updates=updates)
        cache.advance(counts)
        for row, count in enumerate(counts):
            if count and begin + count == len(tokens[row]):
                logits[row] = result[row, 0]
    return logits


def updated_layers(updates: RowUpdates) -> set[int]:
    """The layers that any of the updates change."""
    return {layer for one in updates if one is not None for layer in one.tensors}


def in_groups(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Places of the positive lengths in order, grouped so that a group of several sums up to at most `most`."""
    group: list[int] = []
    total = 0
    for place, length in enumerate(lengths):
        if length <= 0:
            continue
        if group and total + length > most:
            yield group
            group, total = [], 0
        group.append(place)
        total += length
    if group:
        yield group


def side_by_side(prefix: int, lengths: Sequence[int], device: torch.device) -> Layout:
    """Continuations of these lengths one after another in a row behind `prefix` slots, none of which sees another."""
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    own_place = torch.cat([torch.arange(length) for length in lengths])
    ours = (owner[:, None] == owner) & (own_place[:, None] >= own_place)
    visible = torch.cat((torch.ones(len(owner), prefix, dtype=torch.bool), ours), dim=1)
    positions = prefix + own_place
    slots = torch.cat((torch.arange(prefix), positions))
    return Layout(positions[None].to(device), visible[None].to(device), slots[None].to(device))
