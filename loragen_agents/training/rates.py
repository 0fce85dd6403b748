"""Rates of a run, summed by name over any number of episodes and processes."""

from collections.abc import Iterable

from torch import Tensor


class Rates:
    """Sums and counts by name, to be averaged over any number of episodes."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, float] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Count each of `values` in the mean of `name`."""
        self.sums[name] = self.sums.get(name, 0.0) + values.detach().float().sum().item()
        self.counts[name] = self.counts.get(name, 0.0) + values.numel()

    def means(self) -> dict[str, float]:
        """The mean of every name that was counted."""
        return {name: self.sums[name] / count for name, count in self.counts.items() if count}

    @classmethod
    def joined(cls, several: Iterable["Rates"]) -> "Rates":
        """The rates of several processes as one, in which every value counts the same."""
        joined = cls()
        for rates in several:
            for name, count in rates.counts.items():
                joined.sums[name] = joined.sums.get(name, 0.0) + rates.sums[name]
                joined.counts[name] = joined.counts.get(name, 0.0) + count
        return joined

    def clear(self) -> None:
        """Begin anew."""
        self.sums.clear()
        self.counts.clear()
