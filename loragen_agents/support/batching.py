"""Which texts run together in a batch."""

from collections.abc import Iterator, Sequence


def of_similar_length(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices of rows that run together: at most `max_tokens` with padding, unless one row alone is longer."""
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and lengths[order[end]] * (end + 1 - start) <= max_tokens:
            end += 1
        yield order[start:end]
        start = end
