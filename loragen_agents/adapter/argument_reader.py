"""Which arguments of a chosen tool a request gives and where, read from the values that the model keeps of its tokens.

The words of a request lie in the model's cache as keys and values when a tool is chosen. Here each argument of the
tool, as a vector, is compared with the values of every token: a token says something for one of the arguments, or for
none; an argument is given where some token speaks for it; and a value that stands in the request begins at one token
and ends at another, as answers do in extractive question answering. No token is read again. Not part of the paper.

`ArgumentReader` is learnt, and is the same for all tools; `ArgumentKeys` are one tool's. Knows nothing of models,
prompts and schemas.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Logits that stand for "not there" in a softmax; minus infinity would give NaN where nothing is there.
_ABSENT = -1e4
# Log-odds beyond this say no more; odds of 0 or infinity have no logarithm.
_MOST_ODDS = 12.0
# Of the encoder's heads: from neighbours alone to the whole conversation. Learning moves them.
_FIRST_SLOPES = (0.5, 0.2, 0.05, 0.0)
_INNER_DROPOUT = 0.2
# What a value's tokens stand for says where it is, too, but tokens are not independent, so it counts for less.
_INSIDE_WEIGHT = 0.3


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
        vectors: shape (tools, arguments, 4 · width).
        kinds: `ArgumentKind`, shape (tools, arguments).
        required, present: boolean, of the same shape; what is not present is padding.
    """

    vectors: Tensor
    kinds: Tensor
    required: Tensor
    present: Tensor


@dataclass(frozen=True)
class Reading:
    """What the reader finds in some requests.

    Attributes:
        stands: logits of what each token stands for, none first, with shape (requests, tokens, 1 + arguments).
        given: logits of each argument's being given, with shape (requests, arguments).
        begins, ends: log-probabilities that the value of each argument begins or ends with a token; first, that it does
            not stand in the request. Shape (requests, arguments, 1 + tokens).
        inside: log-odds that a token stands for an argument, with shape (requests, arguments, tokens).
    """

    stands: Tensor
    given: Tensor
    begins: Tensor
    ends: Tensor
    inside: Tensor


class _EncoderLayer(nn.Module):
    """One layer of a pre-norm Transformer encoder whose heads look the less at a token the further away it is.

    The language model has read each token without those behind it; here they come in. A head adds -slope · distance to
    its attention logits, with a slope of its own that is learnt.

    Args:
        width: of its inputs and outputs, a multiple of the number of heads.
        dropout: of what attention and feed-forward net add, while it is trained.
    """

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm, self.feed_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * width, width)
        )
        self.slopes = nn.Parameter(torch.tensor(_FIRST_SLOPES))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, present: Tensor) -> Tensor:
        """Shape (requests, tokens, width), as `x`; `present` as `ArgumentReader.forward` takes it."""
        place = torch.arange(x.shape[1], device=x.device)
        distance = (place[:, None] - place).abs().to(x)
        bias = -self.slopes.abs()[:, None, None] * distance
        bias = bias[None].masked_fill(~present[:, None, None], _ABSENT)
        heads = self.query_key_value(self.attention_norm(x)).unflatten(-1, (3, len(self.slopes), -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(query, key, value, bias).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.out(seen))
        made: Tensor = x + self.dropout(self.feed(self.feed_norm(x)))
        return made


class ArgumentReader(nn.Module):
    """Compares the values of a conversation's tokens with arguments.

    What the model keeps of a token is standardised and brought to `hidden` numbers; a convolution over three tokens and
    an encoder layer let each token see those around it, also behind it. With x_t what comes out for token t, and a an
    argument's vector in four parts a₁ to a₄:

    - Token t stands for argument a with the logit s · cos((Q x)_t, a₁), and for none with one of its own; m_a is the
      largest of the log-odds that it stands for a, over the tokens.
    - p_a is the mean of V x_t over the tokens, weighted by the softmax of s' · cos((E x)_t, a₂), which also finds what
      no single token stands for, as with a boolean.
    - The logit that a is given is a small network of p_a, a₂, their product, m_a, the largest cosine, and whether a is
      required, plus w · m_a and a bias for the kind of a.
    - The value of a begins at token t with the logit s" · cos((B x)_t, a₃) and ends there with s" · cos((C x)_t, a₄);
      that it does not stand in the request has a logit of its own for each argument.

    Q, E, B and C are convolutions over three tokens.

    Args:
        layers: edge layers whose values are read, in order.
        value_width: of one layer's values, over all heads.
        width: of each part of an argument's vector.
        hidden: numbers that a token is brought to.

    Attributes:
        dropout: of values while it is trained; whoever trains it sets it.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, layers: Sequence[int], value_width: int, width: int, hidden: int) -> None:
        super().__init__()
        self.layers, self.value_width, self.width, self.hidden = tuple(layers), value_width, width, hidden
        self.dropout = 0.0
        size = value_width * len(self.layers)
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("deviation", torch.ones(size))
        self.bring = nn.Linear(size, hidden)
        self.around = nn.Conv1d(hidden, hidden, 3, padding=1)
        self.encoder = _EncoderLayer(hidden, _INNER_DROPOUT)
        self.token = nn.Conv1d(hidden, width, 3, padding=1)
        self.look = nn.Conv1d(hidden, width, 3, padding=1)
        self.begin = nn.Conv1d(hidden, width, 3, padding=1)
        self.end = nn.Conv1d(hidden, width, 3, padding=1)
        self.absent = nn.Linear(2 * width, 1)
        self.found = nn.Linear(hidden, width)
        self.none = nn.Linear(width, 1)
        self.log_scale = nn.Parameter(torch.tensor(2.2))
        self.log_look_scale = nn.Parameter(torch.tensor(2.2))
        self.log_span_scale = nn.Parameter(torch.tensor(2.6))
        self.odds_weight = nn.Parameter(torch.tensor(0.5))
        self.kind_bias = nn.Parameter(torch.zeros(len(ArgumentKind)))
        self.judge = nn.Sequential(
            nn.Linear(3 * width + 3, width), nn.GELU(), nn.Dropout(_INNER_DROPOUT), nn.Linear(width, 1)
        )

    @property
    def settings(self) -> dict[str, Any]:
        """What it is made with, by the names of its arguments."""
        return {
            "layers": list(self.layers),
            "value_width": self.value_width,
            "width": self.width,
            "hidden": self.hidden,
        }

    def forward(self, values: Tensor, present: Tensor, listed: Listed) -> Reading:
        """Read requests for the arguments of the tools that they call.

        Args:
            values: of the tokens of some requests, with shape (requests, tokens, layers · value width).
            present: which tokens are there, boolean, with shape (requests, tokens).
            listed: the arguments of the tool that each request calls.
        """
        x = self._encoded(values, present)
        claims, looks, firsts, lasts = (F.normalize(part, dim=-1) for part in listed.vectors.chunk(4, dim=-1))
        tokens = _around(self.token, x)
        likeness = self.log_scale.exp() * tokens @ claims.transpose(1, 2)
        likeness = likeness.masked_fill(~listed.present[:, None], _ABSENT)
        stands = torch.cat([self.none(tokens * self.width**0.5), likeness], dim=-1)
        odds = _log_odds(stands.log_softmax(dim=-1)[..., 1:]).masked_fill(~present[..., None], -_MOST_ODDS)
        most = odds.amax(dim=1)
        likeness = self.log_look_scale.exp() * looks @ _around(self.look, x).transpose(1, 2)
        likeness = likeness.masked_fill(~present[:, None], _ABSENT)
        pooled = likeness.softmax(dim=-1) @ self.found(x)
        scaled = looks * self.width**0.5 / 4
        facts = [most / 4, likeness.amax(dim=-1) / 4, listed.required.to(x)]
        judged = self.judge(torch.cat([pooled, scaled, pooled * scaled, torch.stack(facts, dim=-1)], dim=-1))
        given = judged[..., 0] + self.odds_weight * most + self.kind_bias[listed.kinds]
        absent = self.absent(torch.cat([firsts, lasts], dim=-1) * self.width**0.5)
        begins, ends = (
            self._places(_around(convolution, x), wanted, absent, present)
            for convolution, wanted in ((self.begin, firsts), (self.end, lasts))
        )
        return Reading(stands, given, begins, ends, odds.transpose(1, 2))

    def _places(self, tokens: Tensor, wanted: Tensor, absent: Tensor, present: Tensor) -> Tensor:
        """Log-probabilities of the tokens that each argument's value begins or ends with, as `Reading` has them."""
        likeness = self.log_span_scale.exp() * wanted @ tokens.transpose(1, 2)
        likeness = likeness.masked_fill(~present[:, None], _ABSENT)
        return torch.cat([absent, likeness], dim=-1).log_softmax(dim=-1)

    def _encoded(self, values: Tensor, present: Tensor) -> Tensor:
        """What is left of the values, with shape (requests, tokens, hidden); zeros where no token is."""
        # The first map is most of the work, so it is spared what is not there.
        own = F.dropout((values[present] - self.mean) / self.deviation, self.dropout, self.training)
        own = self.bring(own)
        x = own.new_zeros(*present.shape, self.hidden)
        x[present] = own
        x = x + self.around(F.gelu(x).transpose(1, 2)).transpose(1, 2)
        return self.encoder(x, present) * present[..., None]


def _around(convolution: nn.Conv1d, x: Tensor) -> Tensor:
    """Unit vectors, with shape (requests, tokens, width), of tokens and those beside them."""
    return F.normalize(convolution(x.transpose(1, 2)).transpose(1, 2), dim=-1)


def _log_odds(logarithms: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p, within bounds."""
    rest = torch.log1p(-logarithms.exp().clamp(max=1 - 1e-6))
    return (logarithms - rest).clamp(-_MOST_ODDS, _MOST_ODDS)


@dataclass(frozen=True)
class FoundArguments:
    """What a reader found of one tool's arguments in one conversation.

    Attributes:
        given: how likely the conversation gives each argument, by name.
        reading: of this conversation alone.
    """

    given: dict[str, float]
    reading: Reading

    def spans(self, argument: str, begins: Sequence[int], ends: Sequence[int]) -> tuple[Tensor, float]:
        """Log-probabilities that an argument's value is a stretch of tokens, among those that are asked for.

        Args:
            begins, ends: first and last tokens of stretches; each first token goes with each last one from there on.

        Returns:
            Of shape (begins, ends), minus infinity where an end lies before a beginning; and that it is none of them.
        """
        row = list(self.given).index(argument)
        reading = self.reading
        summed = F.pad(reading.inside[0, row].cumsum(dim=0), (1, 0))
        first = torch.tensor(begins, dtype=torch.long, device=summed.device)
        last = torch.tensor(ends, dtype=torch.long, device=summed.device)
        scores = reading.begins[0, row, 1 + first][:, None] + reading.ends[0, row, 1 + last]
        scores = scores + _INSIDE_WEIGHT * (summed[1 + last] - summed[first][:, None])
        scores = scores.masked_fill(last < first[:, None], float("-inf"))
        absent = reading.begins[0, row, :1] + reading.ends[0, row, :1]
        whole = torch.cat([absent, scores.flatten()]).logsumexp(dim=0)
        return scores - whole, float(absent - whole)


@dataclass(frozen=True, eq=False)
class ArgumentKeys:
    """One tool's arguments, and what reads whether they are given.

    Attributes:
        vectors: shape (arguments, 4 · width).
        kinds: an `ArgumentKind` each.
        required: whether each is.
    """

    reader: ArgumentReader
    names: tuple[str, ...]
    vectors: Tensor
    kinds: tuple[int, ...]
    required: tuple[bool, ...]

    @torch.no_grad()
    def find(self, values: Tensor) -> FoundArguments:
        """Look for the arguments in a conversation.

        Args:
            values: of its tokens, with shape (tokens, layers · value width).
        """
        x = values.to(self.reader.mean)[None]
        device = x.device
        listed = Listed(
            self.vectors.to(x)[None],
            torch.tensor([self.kinds], device=device),
            torch.tensor([self.required], device=device),
            torch.ones(1, len(self.names), dtype=torch.bool, device=device),
        )
        reading = self.reader(x, torch.ones(x.shape[:2], dtype=torch.bool, device=device), listed)
        return FoundArguments(dict(zip(self.names, reading.given[0].sigmoid().tolist(), strict=True)), reading)


def side_by_side(values: Sequence[Tensor]) -> Tensor:
    """Values of some layers, each (heads, tokens, head size), as one tensor of shape (tokens, layers · value width)."""
    return torch.cat([own.transpose(0, 1).flatten(1).float() for own in values], dim=-1)
