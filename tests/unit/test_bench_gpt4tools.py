"""GPT4Tools' scoring: cases of our own with scores worked out by hand from its rules, and the reference file."""

import json
import math
import os
import time
from pathlib import Path

import pytest

from loragen_agents.bench.gpt4tools_score import RATES, bleu1, score
from loragen_agents.errors import DataError

QUESTION = "Thought: Do I need to use a tool?"
REFERENCE = Path(os.environ.get("LORAGEN_AGENTS_SHARED", Path(__file__).parents[3] / "shared")) / "data"


def step(action: str, action_input: str, thought: str = "Yes") -> str:
    return f"{QUESTION} {thought}\nAction: {action}\nAction Input: {action_input}\nObservation: image/out.png\n"


ANSWER = f"{QUESTION} No\nAI: all done\n"
CROP = step("Crop", "image/a.png, red car")
READ = step("Read Text", "image/a.png")
PAINT = step("Paint", "a small house by the sea")

# gold, prediction, (thought, action, arguments, success, iou)
CASES = [
    # one step
    (READ, READ, (1, 1, 1, 1, 1)),
    (CROP, CROP, (1, 1, 1, 1, 1)),
    (PAINT, PAINT, (1, 1, 1, 1, 1)),
    (READ, step("Read Text", "cache/other.png"), (1, 1, 1, 1, 1)),  # any path will do
    (READ, step("Read Text", "the picture"), (1, 1, 0, 0, 2 / 3)),
    (READ, step("Read Text", "image/a.png, now"), (1, 1, 0, 0, 2 / 3)),  # another number of parts
    (READ, step("Crop", "image/a.png"), (1, 0, 1, 0, 2 / 3)),
    (READ, step("read text", "image/a.png"), (1, 0, 1, 0, 2 / 3)),  # names are exact
    (READ, step("Read Text ", "  image/a.png "), (1, 1, 1, 1, 1)),
    (CROP, step("Crop", "image/a.png, blue bus"), (1, 1, 0.5, 1, 2.5 / 3)),  # 0.5 is just enough
    (CROP, step("Crop", "image/a.png, red bus"), (1, 1, 0.75, 1, 2.75 / 3)),
    (CROP, step("Crop", "a picture, red car"), (1, 1, 0, 0, 2 / 3)),  # a missing path spoils the whole step
    (CROP, step("Crop", "red car, image/a.png"), (1, 1, 0, 0, 2 / 3)),
    (CROP, step("Crop", "image/a.png, red"), (1, 1, (1 + math.exp(-1)) / 2, 1, (2 + (1 + math.exp(-1)) / 2) / 3)),
    (PAINT, step("Paint", "a house"), (1, 1, math.exp(-2), 0, (2 + math.exp(-2)) / 3)),
    (PAINT, step("Paint", "sea sea sea sea sea sea"), (1, 1, 1 / 6, 0, (2 + 1 / 6) / 3)),  # clipped counts
    (PAINT, step("Paint", "a large house by the sea"), (1, 1, 5 / 6, 1, (2 + 5 / 6) / 3)),
    (PAINT, step("Paint", "A small house by the sea"), (1, 1, 5 / 6, 1, (2 + 5 / 6) / 3)),  # case counts
    # the decision
    (READ, ANSWER, (0, 0, 0, 0, 0)),
    (READ, "", (0, 0, 0, 0, 0)),
    (READ, "I read it for you.", (0, 0, 0, 0, 0)),
    (READ, step("Read Text", "image/a.png", thought="No"), (0, 1, 1, 0, 2 / 3)),
    (READ, READ.removeprefix(QUESTION), (0, 1, 1, 0, 2 / 3)),
    (READ, READ.replace("Action Input:", "Input:"), (1, 1, 0, 0, 2 / 3)),
    # more and fewer steps
    (READ, READ + ANSWER, (1, 1, 1, 1, 1)),  # the closing answer costs nothing
    (READ + ANSWER, READ, (1, 1, 1, 1, 1)),
    (READ + ANSWER, READ + ANSWER, (1, 1, 1, 1, 1)),
    (READ, READ + READ, (0.5, 0.5, 0.5, 0, 1)),  # extra steps weigh on the means, not on the IoU
    (CROP + READ, CROP, (0.5, 0.5, 0.5, 0, 0.5)),
    (CROP + READ, CROP + READ, (1, 1, 1, 1, 1)),
    (CROP + READ, READ + CROP, (1, 0, 0, 0, 1 / 3)),  # places count
    (CROP + READ, CROP + READ + ANSWER, (1, 1, 1, 1, 1)),
    (CROP + READ, READ, (0.5, 0, 0, 0, 1 / 6)),
    (CROP + READ + PAINT, CROP + READ, (2 / 3, 2 / 3, 2 / 3, 0, 2 / 3)),
    (READ, READ + f"{QUESTION} Yes\n", (0.5, 1, 1, 0, 1)),  # only a closing No is forgiven
    # no tool is due
    (ANSWER, ANSWER, (1, 1, 1, 1, 1)),
    (ANSWER, f"{QUESTION} No\nAI: anything else", (1, 1, 1, 1, 1)),
    (ANSWER, READ, (0, 0, 0, 0, 0)),
    (ANSWER, "", (0, 0, 0, 0, 0)),
    (ANSWER, "AI: all done", (0, 0, 0, 0, 0)),
    (ANSWER, f"{QUESTION} No", (0, 0, 0, 0, 1)),  # no answer: the IoU alone keeps the right thought
    (ANSWER, ANSWER + ANSWER, (0.5, 0, 0, 0, 1)),
    (ANSWER, READ + ANSWER, (0, 0, 0, 0, 0)),
]


@pytest.mark.parametrize(("gold", "prediction", "expected"), CASES)
def test_scores_by_the_rules(gold: str, prediction: str, expected: tuple[float, ...]) -> None:
    result = score(gold, prediction)
    assert tuple(getattr(result, key) for key in RATES) == pytest.approx(expected, abs=1e-6)
    assert result.average == pytest.approx(sum(expected) / 5, abs=1e-6)


@pytest.mark.parametrize(
    ("gold", "message"),
    [("Hello.", "no 'Thought"), ("Action: Crop\nAction: Read\nAction Input: a.png", "2 'Action:' and 1")],
)
def test_damaged_gold_is_an_error(gold: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        score(gold, ANSWER)


def test_bleu1_by_its_formula() -> None:
    assert bleu1("the cat sat", "the cat") == pytest.approx(math.exp(1 - 3 / 2), abs=1e-8)
    assert bleu1("the cat", "the cat sat down") == pytest.approx(0.5, abs=1e-8)
    assert bleu1("the cat", "") == 0.0
    assert bleu1("", "") == 0.0
    # What the caption scorer's constants leave behind.
    assert bleu1("a b", "a b") == pytest.approx(1 - 1e-9, abs=1e-12)


def test_a_whole_test_set_scores_in_under_two_seconds() -> None:
    start = time.perf_counter()
    for number in range(652):
        gold, prediction, _ = CASES[number % len(CASES)]
        score(gold, prediction)
    assert time.perf_counter() - start < 2


@pytest.mark.skipif(not (REFERENCE / "gpt4tools_metric_cases.jsonl").exists(), reason="the reference file is not here")
def test_reference_cases_to_one_millionth() -> None:
    rows = [json.loads(line) for line in (REFERENCE / "gpt4tools_metric_cases.jsonl").open(encoding="utf-8")]
    assert len(rows) == 250
    for row in rows:
        result = score(row["gold"], row["prediction"])
        assert {key: getattr(result, key) for key in RATES} == pytest.approx({key: row[key] for key in RATES}, abs=1e-6)
