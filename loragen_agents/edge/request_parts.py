"""Requests that ask for several things: which tool each part calls for, and what is due now.

A request such as "dim the lights and play jazz" lies between two tools, and the nearest one is as often the second. So
each part is scored as a request of its own, and the model reads what is due as if the user had asked for one thing at a
time. Knows scorers and prompts; not how steps are generated.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

from loragen_agents.conversation.parts import Part, parts_of
from loragen_agents.conversation.prompts import PromptRenderer, Turn
from loragen_agents.edge.tool_choice import ToolProbabilities, ToolScorer

# The whole request must find the tool of each part no less likely than its best one by more than this, in nats.
_FARTHEST = 6.0
_KEPT = 64
# What an earlier part is answered with; what it did stands in its observation.
_DONE = "Done."


@dataclass(frozen=True)
class _Planned:
    """A part, and the tool that it calls for."""

    text: str
    tool: str


class RequestParts:
    """Takes requests apart by what the tools of one registry are for. Safe to use from several threads.

    Args:
        scorer: of the registry.
        renderer: of its model's prompts.
    """

    def __init__(self, scorer: ToolScorer, renderer: PromptRenderer) -> None:
        # Not of this object, which is to be freed with its last user.
        self._plan = lru_cache(_KEPT)(partial(_planned, scorer, renderer))

    def due(self, turns: Sequence[Turn]) -> Sequence[Turn]:
        """The conversation in which what is due now is all that its last turn asks for.

        Parts that were taken become turns of their own. A conversation stays as it is where its last request is one,
        where no part is left, and where the steps taken are not those that its parts call for.
        """
        if not turns or turns[-1].answer is not None:
            return turns  # no prompt, which the renderer says
        earlier, last = tuple(turns[:-1]), turns[-1]
        parts = parts_of(last.request)
        plan = self._plan(earlier, last.request, parts) if len(last.steps) < len(parts) else ()
        if len(last.steps) >= len(plan):
            return turns
        taken = list(zip(plan, last.steps, strict=False))
        if any(step.action != part.tool for part, step in taken):
            return turns
        done = [Turn(part.text, (step,), _DONE) for part, step in taken]
        return [*earlier, *done, Turn(plan[len(done)].text)]


def _planned(
    scorer: ToolScorer, renderer: PromptRenderer, earlier: tuple[Turn, ...], request: str, parts: tuple[Part, ...]
) -> tuple[_Planned, ...]:
    """The parts of a request with the tool that each calls for; nothing where it is one request."""

    def scored(turns: tuple[Turn, ...]) -> ToolProbabilities:
        return scorer(scorer.prefill(renderer.user_turn(turns)))

    whole = scored((*earlier, Turn(request))).tools
    least = max(whole.values()) * math.exp(-_FARTHEST)
    plan: list[_Planned] = []
    for part in parts:
        tool = scored((*earlier, Turn(part.text))).chosen
        # A new sentence mostly says more of the same.
        goes_on = bool(plan) and part.sentence and tool == plan[-1].tool
        if tool is None or whole[tool] < least or goes_on:
            return ()
        plan.append(_Planned(part.text, tool))
    return tuple(plan)
