"""Which arguments of a chosen tool a request gives, read from the values that the model keeps of its tokens.

The words of a request lie in the model's cache as keys and values when a tool is chosen. Here each argument of the
tool, as a vector, is compared with the values of every token: a token says something for one of the arguments, or for
none, and an argument is given where some token speaks for it. No token is read again. Not part of the paper.

`ArgumentReader` is learnt, and is the same for all tools; `ArgumentKeys` are one tool's. Knows nothing of models,
prompts and schemas.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Logits that stand for "not there" in a softmax; minus infinity would give NaN where nothing is there.
_ABSENT = -1e4
# Log-odds beyond this say no more; odds of 0 or infinity have no logarithm.
_MOST_ODDS = 12.0


class ArgumentKind(IntEnum):
    """What an argument's values are, as far as it bears on how a request gives them."""

    TEXT = 0
    CHOICE = 1
    NUMBER = 2
    BOOLEAN = 3
    LIST = 4
    OTHER = 5


@dataclass(frozen=True)
class Listed:
    """The arguments of some tools, padded to the longest list.

    Attributes:
        vectors: shape (tools, arguments, 2 · width).
        kinds: `ArgumentKind`, shape (tools, arguments).
        required, present: boolean, of the same shape; what is not present is padding.
    """

    vectors: Tensor
    kinds: Tensor
    required: Tensor
    present: Tensor


class ArgumentReader(nn.Module):
    """Compares the values of a conversation's tokens with arguments.

    With x_t the values of token t, standardised, and a argument vectors in two halves a₁ and a₂:

    - Token t stands for argument a with the logit s · cos(Q x_t + Q₊ x_{t+1} + Q₋ x_{t-1}, a₁), and for none with one
      of its own; m_a is the largest of the log-odds that it stands for a, over the tokens.
    - p_a is the mean of V x_t over the tokens, weighted by the softmax of s' · cos(E x_t + E₊ x_{t+1}, a₂), which also
      finds what no single token stands for, as with a boolean.
    - The logit that a is given is a small network of p_a, a₂, their product, m_a, the largest cosine, and whether a is
      required, plus w · m_a and a bias for the kind of a.

    Args:
        layers: edge layers whose values are read, in order.
        value_width: of one layer's values, over all heads.
        width: of each half of an argument's vector.

    Attributes:
        dropout: of values and vectors while it is trained; whoever trains it sets it.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, layers: Sequence[int], value_width: int, width: int) -> None:
        super().__init__()
        self.layers, self.width, self.dropout = tuple(layers), width, 0.0
        size = value_width * len(self.layers)
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("deviation", torch.ones(size))
        self.token = nn.Linear(size, width)
        self.token_behind = nn.Linear(size, width, bias=False)
        self.token_before = nn.Linear(size, width, bias=False)
        self.look = nn.Linear(size, width)
        self.look_behind = nn.Linear(size, width, bias=False)
        self.found = nn.Linear(size, width)
        self.none = nn.Linear(width, 1)
        self.log_scale = nn.Parameter(torch.tensor(2.2))
        self.log_look_scale = nn.Parameter(torch.tensor(2.2))
        self.odds_weight = nn.Parameter(torch.tensor(0.5))
        self.kind_bias = nn.Parameter(torch.zeros(len(ArgumentKind)))
        # Without dropout so far; its place is kept, since checkpoints name the tensors behind it by theirs.
        self.judge = nn.Sequential(nn.Linear(3 * width + 3, width), nn.GELU(), nn.Dropout(0.0), nn.Linear(width, 1))

    def forward(self, values: Tensor, present: Tensor, listed: Listed) -> tuple[Tensor, Tensor]:
        """What each token stands for, and whether each argument is given.

        Args:
            values: of the tokens of some requests, with shape (requests, tokens, layers · value width).
            present: which tokens are there, boolean, with shape (requests, tokens).
            listed: the arguments of the tool that each request calls.

        Returns:
            Logits of what a token stands for, none first, with shape (requests, tokens, 1 + arguments); and of each
            argument's being given, with shape (requests, arguments).
        """
        x = F.dropout((values - self.mean) / self.deviation, self.dropout, self.training)
        x = x * present[..., None]
        vectors = F.dropout(listed.vectors, self.dropout, self.training)
        claims, looks = (F.normalize(half, dim=-1) for half in vectors.chunk(2, dim=-1))
        behind, before = F.pad(x[:, 1:], (0, 0, 0, 1)), F.pad(x[:, :-1], (0, 0, 1, 0))
        tokens = F.normalize(self.token(x) + self.token_behind(behind) + self.token_before(before), dim=-1)
        likeness = self.log_scale.exp() * tokens @ claims.transpose(1, 2)
        likeness = likeness.masked_fill(~listed.present[:, None], _ABSENT)
        stands = torch.cat([self.none(tokens * self.width**0.5), likeness], dim=-1)
        odds = _log_odds(stands.log_softmax(dim=-1)[..., 1:]).masked_fill(~present[..., None], -_MOST_ODDS)
        most = odds.amax(dim=1)
        seen = F.normalize(self.look(x) + self.look_behind(behind), dim=-1)
        likeness = self.log_look_scale.exp() * looks @ seen.transpose(1, 2)
        likeness = likeness.masked_fill(~present[:, None], _ABSENT)
        pooled = likeness.softmax(dim=-1) @ self.found(x)
        scaled = looks * self.width**0.5 / 4
        facts = [most / 4, likeness.amax(dim=-1) / 4, listed.required.to(x)]
        judged = self.judge(torch.cat([pooled, scaled, pooled * scaled, torch.stack(facts, dim=-1)], dim=-1))
        return stands, judged[..., 0] + self.odds_weight * most + self.kind_bias[listed.kinds]


def _log_odds(logarithms: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p, within bounds."""
    rest = torch.log1p(-logarithms.exp().clamp(max=1 - 1e-6))
    return (logarithms - rest).clamp(-_MOST_ODDS, _MOST_ODDS)


@dataclass(frozen=True, eq=False)
class ArgumentKeys:
    """One tool's arguments, and what reads whether they are given.

    Attributes:
        vectors: shape (arguments, 2 · width).
        kinds: an `ArgumentKind` each.
        required: whether each is.
    """

    reader: ArgumentReader
    names: tuple[str, ...]
    vectors: Tensor
    kinds: tuple[int, ...]
    required: tuple[bool, ...]

    @torch.no_grad()
    def given(self, values: Tensor) -> dict[str, float]:
        """How likely a conversation gives each argument.

        Args:
            values: of its tokens, with shape (tokens, layers · value width).
        """
        if not self.names:
            return {}
        x = values.to(self.reader.mean)[None]
        device = x.device
        listed = Listed(
            self.vectors.to(x)[None],
            torch.tensor([self.kinds], device=device),
            torch.tensor([self.required], device=device),
            torch.ones(1, len(self.names), dtype=torch.bool, device=device),
        )
        _, logits = self.reader(x, torch.ones(x.shape[:2], dtype=torch.bool, device=device), listed)
        given: list[float] = logits[0].sigmoid().tolist()
        return dict(zip(self.names, given, strict=True))


def side_by_side(values: Sequence[Tensor]) -> Tensor:
    """Values of some layers, each (heads, tokens, head size), as one tensor of shape (tokens, layers · value width)."""
    return torch.cat([own.transpose(0, 1).flatten(1).float() for own in values], dim=-1)
