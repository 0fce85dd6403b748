"""What has a say in which token comes next, beside the model and the grammar."""

from typing import Protocol

from torch import Tensor


class Guide(Protocol):
    """Goes along with one sequence."""

    def accept(self, token: int) -> None:
        """Take note of the next token."""

    def add(self, logits: Tensor) -> None:
        """Add to the logits of the next token, of shape (vocabulary,), in place."""


class Guided(Protocol):
    """Gives each sequence behind one prompt a guide of its own."""

    def guide(self) -> Guide: ...
