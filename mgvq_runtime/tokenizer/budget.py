"""What a render of a chat template may cost (called by `sandbox`).

Counts steps and characters, and finds out how long a value is as text before anybody writes it.
Which operations cost what is `sandbox`'s.
"""

from __future__ import annotations

import threading
from collections.abc import ItemsView, KeysView, Mapping, ValuesView
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.utils import Namespace

MAX_STEPS = 100_000
"""Loop turns and macro calls in one render; the longest conversation accepted takes 10,000."""

MAX_CHARS = 4_000_000
"""Characters of any string a template builds, and of what it renders."""

MAX_WORK = 500_000_000
"""Characters of all strings it builds or reads together: about a second, at most 500 MB kept."""

ELEMENT_CHARS = 4
"""What an element of a list counts as text beside its own: brackets, comma, space."""

ELEMENT_WORK = 32
"""Characters that could be copied while one element of a list is made or visited."""

_SCALARS = (int, float, type(None))
_LISTS = (list, tuple, set, frozenset, ItemsView, KeysView, ValuesView)


class Budget(threading.local):
    """What the render in progress may still spend; every thread has its own."""

    steps = MAX_STEPS
    work = MAX_WORK

    def refill(self) -> None:
        """Begin a render."""
        self.steps, self.work = MAX_STEPS, MAX_WORK

    def count_step(self) -> None:
        """Count one loop turn or macro call.

        Raises:
            SecurityError: if there have been too many.
        """
        self.steps -= 1
        if self.steps < 0:
            raise SecurityError(f"it takes more than {MAX_STEPS} steps")

    def take(self, length: int, work: int = 1) -> None:
        """Pay for a text or list before it is made.

        Args:
            length: Its characters or elements.
            work: What one of them costs.

        Raises:
            SecurityError: if it is too long, or all together are.
        """
        if length > MAX_CHARS:
            raise SecurityError(f"it builds a text or list longer than {MAX_CHARS}")
        self.work -= length * work
        if self.work < 0:
            raise SecurityError(f"it builds more than {MAX_WORK} characters in all")

    def measure(self, value: Any, is_written: bool = True) -> int:
        """Return about how many characters a value has as text, and pay for writing it.

        Lists that hold one another many times are counted as often as they would be written.

        Args:
            value: Anything.
            is_written: Whether it is, or only compared: then the texts in it cost nothing.

        Raises:
            SecurityError: if it is too long.
        """
        if isinstance(value, str):
            length = len(value) if is_written else 0
            self.take(length)
            return length
        if isinstance(value, _SCALARS):
            return ELEMENT_CHARS
        length = num_elements = 0
        waiting = [value]
        while waiting:
            item = waiting.pop()
            if isinstance(item, str):
                length += len(item) if is_written else 0
            elif isinstance(item, _SCALARS):
                continue
            elif isinstance(item, Namespace):
                num_elements += 1
                waiting.append(item._Namespace__attrs)  # it shows its attributes alone
            elif isinstance(item, Mapping):
                num_elements += 2 * len(item)
                waiting += [*item.keys(), *item.values()]
            elif isinstance(item, _LISTS):
                num_elements += len(item)
                if num_elements <= MAX_CHARS:  # else it is refused below
                    waiting += item
            if length + num_elements * ELEMENT_CHARS > MAX_CHARS:
                break
        length += num_elements * ELEMENT_CHARS
        self.take(length)
        self.work -= num_elements * ELEMENT_WORK
        return length
