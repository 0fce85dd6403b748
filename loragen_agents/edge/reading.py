"""Texts read for the generator by the forward pass that serves requests, in place of transformers' own.

Reads token ids; which texts, and what is made of the activations and values, is the generator's business.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from loragen_agents.adapter.argument_reader import side_by_side
from loragen_agents.edge.decoding import Decoder
from loragen_agents.edge.feeding import feed
from loragen_agents.edge.kv_cache import Snapshot
from loragen_agents.edge.passes import Captured, Forward
from loragen_agents.support.batching import of_similar_length

# Tokens of a pass with their padding. More take longer each, since their activations leave the CPU's caches.
_MOST_TOKENS = 1024


class PassReader:
    """Reads texts with the model of a decoder, which has the weights merged that tools are read beside.

    What all texts begin with, such as the chat template's first tokens, is read once. Safe for use by several threads.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    def activations(self, layers: Sequence[int], rows: Sequence[tuple[list[int], list[int]]]) -> list[Tensor]:
        """Inputs of `down_proj` at some places of each row of token ids.

        Args:
            layers: whose inputs are taken.
            rows: token ids, and places in them.

        Returns:
            For each row, shape (layers, places, intermediate size).
        """
        found: dict[int, Tensor] = {}
        first = min((min(places) for _, places in rows), default=0)
        for chunk, _, captured in self._passes([ids for ids, _ in rows], [places for _, places in rows], first, layers):
            for row, index in enumerate(chunk):
                count = len(rows[index][1])
                found[index] = torch.stack([captured[layer][row, :count] for layer in layers])  # type: ignore[index]
        return [found[index] for index in range(len(rows))]

    def values(self, layers: Sequence[int], rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """What the model keeps as values of each row's tokens, with shape (tokens, layers · value width)."""
        found: dict[int, Tensor] = {}
        for chunk, cache, _ in self._passes(rows, [[len(row) - 1] for row in rows], max(map(len, rows), default=0)):
            for row, index in enumerate(chunk):
                found[index] = side_by_side(cache.snapshot(row).values(layers))
        return [found[index] for index in range(len(rows))]

    @torch.no_grad()
    def _passes(
        self,
        rows: Sequence[Sequence[int]],
        places: Sequence[Sequence[int]],
        first: int,
        layers: Sequence[int] = (),
    ) -> Iterator[tuple[list[int], Any, Captured]]:
        """Read the rows in batches; give each batch's rows, its cache and its activations at the places.

        first: the first token that has to be read in its own row's pass.
        """
        forward, device = self._decoder._forward(), self._decoder.model.device
        shared = min(_common_beginning(rows), first) if len(rows) > 1 else 0
        states = self._beginning(forward, rows[0][:shared], layers) if shared else None
        for chunk in of_similar_length([len(row) - shared for row in rows], _MOST_TOKENS):
            parts = [rows[index][shared:] for index in chunk]
            cache: Any = forward.cache(1, layers=layers)
            cache.fill([states], [shared])
            cache.keep([0] * len(chunk))
            width, most = max(map(len, parts)), max(len(places[index]) for index in chunk)
            ids = torch.tensor([[*part, *[0] * (width - len(part))] for part in parts], device=device)
            wanted = [[place - shared for place in places[index]] for index in chunk]
            keep = torch.tensor([[*own, *[own[-1]] * (most - len(own))] for own in wanted], device=device)
            captured: Captured = dict.fromkeys(layers)
            forward(ids, cache, keep, captured=captured)
            cache.advance([len(part) for part in parts])
            yield chunk, cache, captured

    def _beginning(self, forward: Forward, tokens: Sequence[int], layers: Sequence[int]) -> Snapshot:
        cache = forward.cache(1, layers=layers)
        feed(forward, cache, [tokens], self._decoder.model.device, [None])
        return cache.snapshot(0)


def _common_beginning(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with; one of each row is left."""
    one, other = min(map(list, rows)), max(map(list, rows))
    most = min(map(len, rows)) - 1
    return next((place for place in range(most) if one[place] != other[place]), most)
