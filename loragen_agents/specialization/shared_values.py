"""A thread-safe LRU: values by key, each made once, the least recently used dropped first. Knows nothing of models."""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class SharedValues(Generic[Value]):
    """Thread-safe LRU; a missing value is made once, even when several threads ask for it at the same time.

    Args:
        limit: how many values are kept; None keeps all.
        size: bytes of a value, asked when it is made; only then can `max_bytes` bound them.
    """

    def __init__(self, limit: int | None = None, size: Callable[[Value], int] | None = None) -> None:
        self.limit = limit
        self.max_bytes: int | None = None
        self._size = size
        self._sizes: dict[Hashable, int] = {}
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
            self._keep(key, made)
            return made, False

    def bound(self, limit: int | None, max_bytes: int | None) -> None:
        """Set how many values are kept, and how many bytes of them; None for no bound. The last one always stays."""
        with self._table:
            self.limit, self.max_bytes = limit, max_bytes
            self._drop()

    def __len__(self) -> int:
        with self._table:
            return len(self._values)

    @property
    def bytes(self) -> int:
        """Bytes of all values."""
        with self._table:
            return sum(self._sizes.values())

    def _drop(self) -> None:
        while len(self._values) > 1 and (
            (self.limit is not None and len(self._values) > self.limit)
            or (self.max_bytes is not None and sum(self._sizes.values()) > self.max_bytes)
        ):
            key, _ = self._values.popitem(last=False)
            del self._sizes[key]

    def _keep(self, key: Hashable, value: Value) -> None:
        size = self._size(value) if self._size is not None else 0
        with self._table:
            self._values[key], self._sizes[key] = value, size
            self._drop()

    def _look_up(self, key: Hashable) -> Value | None:
        with self._table:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def clear(self) -> None:
        """Drop all values."""
        with self._table:
            self._values.clear()
            self._sizes.clear()


class UsedValues(SharedValues[Value]):
    """Values that stay as long as somebody else refers to them, and are made again when they are asked for later."""

    def __init__(self) -> None:
        super().__init__()
        self._used: weakref.WeakValueDictionary[Hashable, Value] = weakref.WeakValueDictionary()

    def _keep(self, key: Hashable, value: Value) -> None:
        with self._table:
            self._used[key] = value

    def _look_up(self, key: Hashable) -> Value | None:
        with self._table:
            return self._used.get(key)
