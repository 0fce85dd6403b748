"""GPT4Tools' five rates, computed as GPT4Tools' own evaluation script computes them.

This module compares two texts, the gold continuation and a predicted one, and knows nothing of models, prompts,
registries or files. What it calls a text is everything after the prompt, its first `Thought:` question included.

The rates (Table 3 of the LoRA-Gen paper, section 4.3; defined by GPT4Tools):

    SR_t     thought    the decision for or against a tool, step by step
    SR_act   action     the tool's name, step by step
    SR_args  arguments  what is handed to the tool: image paths by presence, other parts by BLEU-1
    SR       success    thoughts and actions all right, arguments at least 0.5
    IoU      iou        the three lists of scores together, intersection over union with the gold steps
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

from loragen_agents.errors import DataError

_THOUGHT = re.compile(r"Thought: Do I need to use a tool\? (.*)")
_ACTION = re.compile(r"Action: (.*)")
_ACTION_INPUT = re.compile(r"Action Input: (.*)")
_ANSWER = re.compile(r"AI: (.*)")

# The two constants that the COCO caption scorer adds to keep its quotients finite; GPT4Tools scores with it, and the
# reference figures carry their trace (0.9999999995 for two equal words).
_TINY, _SMALL = 1e-15, 1e-9

_ARGUMENTS_ENOUGH = 0.5


@dataclass(frozen=True)
class SampleScore:
    """One sample's five scores, each in [0, 1]."""

    thought: float
    action: float
    arguments: float
    success: float
    iou: float

    @property
    def average(self) -> float:
        """The mean of the five: the paper's "Average Score" when taken over samples."""
        return sum(astuple(self)) / 5


RATES: dict[str, str] = {
    "thought": "SR_t",
    "action": "SR_act",
    "arguments": "SR_args",
    "success": "SR",
    "iou": "IoU",
}
assert tuple(RATES) == tuple(field.name for field in fields(SampleScore))


def bleu1(gold: str, predicted: str) -> float:
    """BLEU-1 of `predicted` against `gold`, both split at white space, in [0, 1].

    The clipped share of right words times the brevity penalty (Papineni et al. 2002, n = 1), with the two constants
    of the COCO caption evaluation's scorer, which GPT4Tools uses: (c + 1e-15) / (p + 1e-9) for c right of p words,
    and exp(1 - 1/q) where q = (p + 1e-15) / (g + 1e-9) < 1. NLTK and sacrebleu give the same up to these constants
    (a difference of the order 1e-9); neither reproduces them, so the formula stands here.
    """
    gold_words, words = gold.split(), predicted.split()
    right = sum((Counter(words) & Counter(gold_words)).values())
    precision = (right + _TINY) / (len(words) + _SMALL)
    ratio = (len(words) + _TINY) / (len(gold_words) + _SMALL)
    return precision * math.exp(1 - 1 / ratio) if ratio < 1 else precision


def score(gold: str, prediction: str) -> SampleScore:
    """Score one predicted continuation against the gold one.

    Args:
        gold: what the sample's `output` says: one or more tool steps, or an answer without a tool.
        prediction: what the model wrote, from its first `Thought: Do I need to use a tool?` on.

    Raises:
        DataError: the gold text holds neither a step nor a thought, or not one input to each action.
    """
    prediction = prediction.strip()
    if "Action:" in gold and "Action Input:" in gold:
        return _score_tool_use(gold, prediction)
    return _score_answer(gold, prediction)


def _score_tool_use(gold: str, prediction: str) -> SampleScore:
    gold_actions, gold_inputs = _found(_ACTION, gold), _found(_ACTION_INPUT, gold)
    if len(gold_actions) != len(gold_inputs):
        raise DataError(
            f"A gold text has {len(gold_actions)} 'Action:' and {len(gold_inputs)} 'Action Input:' lines: "
            f"each step needs one of both. The text begins {gold[:80]!r}."
        )
    if not gold_actions:
        raise DataError(f"A gold text names no action after 'Action: '. The text begins {gold[:80]!r}.")
    gold_thoughts = _found(_THOUGHT, gold)[: len(gold_actions)]

    actions, inputs, thoughts = _found(_ACTION, prediction), _found(_ACTION_INPUT, prediction), _thoughts(prediction)
    if len(thoughts) == len(actions) + 1 and thoughts[-1] == "No":
        thoughts = thoughts[:-1]  # the answer that follows the last step is not a step of its own

    parts = [
        _compare([float(a == b) for a, b in zip(gold_list, list_, strict=False)], len(gold_list), len(list_))
        for gold_list, list_ in ((gold_thoughts, thoughts), (gold_actions, actions))
    ]
    step_scores = [_score_input(a, b) for a, b in zip(gold_inputs, inputs, strict=False)]
    parts.append(_compare(step_scores, len(gold_inputs), len(inputs)))

    thought, action, arguments = (_mean(scores) for scores, _ in parts)
    return SampleScore(
        thought=thought,
        action=action,
        arguments=arguments,
        success=float(thought == 1.0 and action == 1.0 and arguments >= _ARGUMENTS_ENOUGH),
        iou=_intersection_over_union(
            [s for scores, _ in parts for s in scores], [m for _, mask in parts for m in mask]
        ),
    )


def _score_answer(gold: str, prediction: str) -> SampleScore:
    gold_thoughts, thoughts = _thoughts(gold), _thoughts(prediction)
    if not gold_thoughts:
        raise DataError(f"A gold text has no 'Thought: Do I need to use a tool?' line. It begins {gold[:80]!r}.")
    scores, mask = _compare(
        [float(a == b) for a, b in zip(gold_thoughts, thoughts, strict=False)], len(gold_thoughts), len(thoughts)
    )
    answered = bool(thoughts) and thoughts[0] == "No" and _ANSWER.search(prediction) is not None
    thought = _mean(scores) if answered else 0.0
    right = float(thought == 1.0)
    # The IoU looks at the thoughts alone, so a bare "No" without an answer keeps it: GPT4Tools' script does so too.
    return SampleScore(thought, right, right, right, _intersection_over_union(scores, mask))


def _score_input(gold: str, predicted: str) -> float:
    """The score of one step's input: both sides split at commas, compared part by part."""
    gold_parts, parts = gold.split(","), predicted.split(",")
    if len(gold_parts) != len(parts):
        return 0.0
    scores = []
    for gold_part, part in zip(gold_parts, parts, strict=True):
        if ".png" not in gold_part:
            scores.append(bleu1(gold_part, part))
        elif ".png" in part:
            scores.append(1.0)
        else:
            return 0.0
    return _mean(scores)


def _compare(scores: list[float], gold_length: int, length: int) -> tuple[list[float], list[float]]:
    """Pad the scores of the common places with zeros to the longer list; give the gold list's mask beside it."""
    longer = max(gold_length, length)
    return scores + [0.0] * (longer - len(scores)), [1.0] * gold_length + [0.0] * (longer - gold_length)


def _intersection_over_union(scores: Sequence[float], mask: Sequence[float]) -> float:
    intersection = sum(s * m for s, m in zip(scores, mask, strict=True))
    return intersection / max(sum(max(s, m) for s, m in zip(scores, mask, strict=True)), 1.0)


def _thoughts(text: str) -> list[str]:
    return _found(_THOUGHT, text)


def _found(pattern: re.Pattern[str], text: str) -> list[str]:
    return [match.strip() for match in pattern.findall(text)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
