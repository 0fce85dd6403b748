"""Token rows as batches for a language model: padded side by side, or packed behind the prefix that they share.

With the definitions in the prompt, the requests of an episode have nearly all of their tokens in common. These run
through the model once, and each request sees them and its own. Knows tokens and masks; no models, no samples.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from loragen_agents.generator.tool_reading import pad_right

# A shorter prefix is not worth a mask: the template of a user's turn.
_WORTH_SHARING = 64


@dataclass(frozen=True)
class Batch:
    """Some rows of token ids, ready to run.

    Attributes:
        rows: their indices in what was given.
        ids: (batch rows, tokens).
        positions: of the tokens where rows share a prefix, with shape (1, tokens).
        mask: additive, where rows share a prefix, with shape (1, 1, tokens, tokens).
        prefix: number of tokens that all rows share, 0 where each has a batch row of its own.
        begins: for each row, where the tokens behind the prefix begin.
    """

    rows: list[int]
    ids: Tensor
    positions: Tensor | None = None
    mask: Tensor | None = None
    prefix: int = 0
    begins: tuple[int, ...] = ()

    def locate(self, row: int, places: Tensor) -> tuple[Tensor, Tensor]:
        """Batch rows and columns of places in the tokens of `rows[row]`; all tensors have shape (places,)."""
        if not self.prefix:
            return torch.full_like(places, row), places
        return torch.zeros_like(places), torch.where(
            places < self.prefix, places, places - self.prefix + self.begins[row]
        )


def batches(
    rows: Sequence[Sequence[int]], max_tokens: int, *, share: bool = True, device: torch.device | str = "cpu"
) -> Iterator[Batch]:
    """Batches of at most `max_tokens` tokens, padding and prefix included, unless one row alone has more.

    Args:
        share: whether rows may be packed behind a common prefix; the model must take a mask of its own for that, and
            attend to all tokens that the mask leaves.
    """
    alike = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*rows, strict=False))
    prefix = sum(1 for _ in alike) if len(rows) > 1 else 0
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    chunk: list[int] = []
    if share and prefix >= _WORTH_SHARING:
        own = 0
        for index in order:
            length = len(rows[index]) - prefix
            if chunk and prefix + own + length > max_tokens:
                yield _packed(rows, chunk, prefix, device)
                chunk, own = [], 0
            chunk.append(index)
            own += length
        yield _packed(rows, chunk, prefix, device)
        return
    for index in order:
        length = len(rows[index])
        # Padding costs as much as text, so rows of similar length go together.
        if chunk and (length * (len(chunk) + 1) > max_tokens or length > 1.35 * len(rows[chunk[0]]) + 10):
            yield Batch(chunk, pad_right([rows[n] for n in chunk], device))
            chunk = []
        chunk.append(index)
    if chunk:
        yield Batch(chunk, pad_right([rows[n] for n in chunk], device))


def _packed(rows: Sequence[Sequence[int]], chunk: list[int], prefix: int, device: torch.device | str) -> Batch:
    ids, positions, owners, begins = list(rows[chunk[0]][:prefix]), list(range(prefix)), [-1] * prefix, []
    for row, index in enumerate(chunk):
        begins.append(len(ids))
        ids += rows[index][prefix:]
        positions += range(prefix, len(rows[index]))
        owners += [row] * (len(rows[index]) - prefix)
    owner = torch.tensor(owners, device=device)
    seen = (owner == -1) | (owner == owner[:, None])
    mask = torch.zeros(seen.shape, device=device).masked_fill_(~seen.tril(), torch.finfo(torch.float32).min)
    return Batch(
        chunk,
        torch.tensor([ids], device=device),
        torch.tensor([positions], device=device),
        mask[None, None],
        prefix,
        tuple(begins),
    )
