"""A conversation as plain values: turns of a request, the steps taken for it, and the answer."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TakenStep:
    """A tool call that was made, and what the tool reported."""

    action: str
    action_input: str
    observation: str


@dataclass(frozen=True)
class Turn:
    """A request, the steps taken for it, and the answer; the last turn of a conversation has no answer yet."""

    request: str
    steps: tuple[TakenStep, ...] = ()
    answer: str | None = None
