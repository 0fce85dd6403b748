"""A step of a specialised model, read to its end as the chat model reads it."""

from collections.abc import Sequence
from typing import Any

from loragen_agents.conversation.prompts import Turn
from loragen_agents.edge.completion import Completion
from loragen_agents.edge.sampling import Sampling
from loragen_agents.edge.specialized import SpecializedLM


def decoded(
    model: SpecializedLM, turns: Sequence[Turn], sampling: Sampling | None = None, **settings: Any
) -> Completion:
    """The next step of a conversation; settings as `SpecializedLM.stream` takes them."""
    stream = model.stream(turns, sampling, **settings)
    for _ in stream:
        pass
    return stream.completion
