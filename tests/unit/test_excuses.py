"""Behind a tool's report, answers that say that no tool serves are less likely."""

import pytest
import torch

from loragen_agents.conversation.prompts import TakenStep, Turn
from loragen_agents.conversation.renderers import shared_renderer
from loragen_agents.data.phrases import phrases
from loragen_agents.edge.excuses import Excuses, reported
from tests.tiny_models import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
RENDERER = shared_renderer(TOKENIZER)
START = " No\nAI:"


def lowered(text: str) -> bool:
    """Whether any token of an answer was made less likely on the way to it."""
    guide = Excuses(RENDERER, TOKENIZER).guide()
    ids = RENDERER.encode_text(f"{START} {text}")
    for token in ids:
        logits = torch.zeros(len(TOKENIZER))
        guide.add(logits)
        if logits[token] < 0:
            return True
        guide.accept(token)
    return False


@pytest.mark.parametrize("answer", phrases("answers")["irrelevant"])
def test_each_excuse_that_training_has_is_less_likely(answer: str) -> None:
    assert lowered(answer)


@pytest.mark.parametrize("answer", [*phrases("answers")["reported"], *phrases("answers")["failed"]])
def test_what_training_says_of_reports_and_failures_is_not(answer: str) -> None:
    assert not lowered(answer.format(result="It is noon."))


def test_only_requests_that_a_tool_has_reported_on_are_meant() -> None:
    step = TakenStep("now", "{}", "It is noon.")
    assert reported([Turn("What time is it?", (step,))])
    assert not reported([Turn("What time is it?", (step,), "Noon."), Turn("And in Rome?")])
