"""The least recently used goes first, by bytes (used by `multimodal.chat` and `engine`).

Knows neither pictures nor tensors: a value is whatever its owner keeps, and the owner says how many
bytes it takes. Whoever still needs a value holds it; leaving the cache takes nothing away from him.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from threading import Lock
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class LRUCache(Generic[Key, Value]):
    """A mapping that holds at most so many bytes; threads may share it."""

    def __init__(self, max_bytes: int) -> None:
        """Start empty; 0 bytes keep nothing."""
        self.max_bytes = max_bytes
        self.num_bytes = 0
        """Bytes of the values it holds."""
        self._entries: OrderedDict[Key, tuple[Value, int]] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Key) -> Value | None:
        """Return a value and make it the last to go; None where there is none."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            self._entries.move_to_end(key)
            return entry[0]

    def put(self, key: Key, value: Value, num_bytes: int) -> None:
        """Keep a value, at the cost of the oldest ones; one larger than the cache is not kept."""
        with self._lock:
            self._drop(key)
            if num_bytes > self.max_bytes:
                return
            self._entries[key] = (value, num_bytes)
            self.num_bytes += num_bytes
            while self.num_bytes > self.max_bytes:
                self._drop(next(iter(self._entries)))

    def discard(self, key: Key) -> None:
        """Forget a value, if it is there."""
        with self._lock:
            self._drop(key)

    def _drop(self, key: Key) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.num_bytes -= entry[1]
