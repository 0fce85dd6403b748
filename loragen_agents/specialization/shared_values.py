"""A thread-safe LRU: values by key, each made once, the least recently used dropped first. Knows nothing of models."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class SharedValues(Generic[Value]):
    """Thread-safe LRU; a missing value is made once, even when several threads ask for it at the same time.

    Args:
        limit: how many values are kept; None keeps all.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self._values: OrderedDict[Hashable, Value] = OrderedDict()
        self._table = threading.Lock()
        # One lock for all keys: making a value keeps every core busy, so two at a time would not end sooner, and the
        # generator hooks into the cloud LM's modules while it runs.
        self._making = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Value]) -> tuple[Value, bool]:
        """Return the value of `key`, made by `make` where it is missing, and whether it was there already."""
        found = self._look_up(key)
        if found is not None:
            return found, True
        with self._making:
            found = self._look_up(key)
            if found is not None:
                return found, True
            made = make()
            with self._table:
                self._values[key] = made
                while self.limit is not None and len(self._values) > self.limit:
                    self._values.popitem(last=False)
            return made, False

    def _look_up(self, key: Hashable) -> Value | None:
        with self._table:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def clear(self) -> None:
        """Drop all values."""
        with self._table:
            self._values.clear()
