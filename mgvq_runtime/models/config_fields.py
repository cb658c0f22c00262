"""Typed, loud reading of a JSON mapping (used by `models.config` and the image processors).

Every getter names the key, what was expected and what came. A default stands for a missing key and
for null. Nothing here knows what a key means.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, NoReturn

from mgvq_runtime.errors import ConfigError


class _Required:
    """Marks a key that has no default."""


REQUIRED: Final = _Required()

MAX_INTEGER = 2**24
"""The most a count or width may be where nothing else is said; vocabularies are the largest, of
some 2**18 tokens. Products of three still fit an index."""
MAX_LAYERS = 1000
"""Blocks of a decoder or a vision tower: making a graph takes a millisecond for each."""
MAX_SIDE = 2**13
"""Pixels or patches along a side of a square."""


class Fields:
    """One mapping of a JSON file, with the prefix its keys have in messages."""

    def __init__(self, values: Mapping[str, Any], prefix: str, file: str = "config.json") -> None:
        """Wrap a mapping.

        Args:
            values: The mapping.
            prefix: What stands before a key in messages, such as "vision_config.".
            file: The file's name in messages.
        """
        self.values, self.prefix, self.file = values, prefix, file

    def has(self, key: str) -> bool:
        """Return whether the key is there and not null."""
        return self.values.get(key) is not None

    def refuse(self, key: str, value: object, expected: str) -> NoReturn:
        """Raise ConfigError: `key` has `value`, where `expected` was needed."""
        raise ConfigError(f"{self.file}: {self.prefix}{key} must be {expected}, got {value!r}")

    def divides(self, part_key: str, part: int, whole_key: str, whole: int) -> None:
        """Raise ConfigError unless `part` divides `whole`."""
        if whole % part:
            raise ConfigError(
                f"{self.file}: {self.prefix}{whole_key} ({whole}) is not divisible by "
                f"{part_key} ({part})"
            )

    def integer(
        self,
        key: str,
        default: int | _Required = REQUIRED,
        low: int = 1,
        high: int = MAX_INTEGER,
    ) -> int:
        """Return an integer of at least `low` and at most `high`."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            self.refuse(key, value, f"an integer of at least {low}")
        if value > high:
            self.refuse(key, value, f"at most {high}")
        return value

    def number(self, key: str, default: float | _Required = REQUIRED) -> float:
        """Return a finite number above zero."""
        value = self._get(key, default)
        if not _is_finite(value) or value <= 0:
            self.refuse(key, value, "a number above 0")
        return float(value)

    def boolean(self, key: str, default: bool | _Required = REQUIRED) -> bool:
        """Return true or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            self.refuse(key, value, "true or false")
        return value

    def one_of(self, key: str, known: Sequence[str], default: str | _Required = REQUIRED) -> str:
        """Return a string out of `known`."""
        value = self._get(key, default)
        if value not in known:
            self.refuse(key, value, " or ".join(repr(name) for name in known))
        return str(value)

    def mapping(
        self, key: str, default: Mapping[str, Any] | _Required = REQUIRED
    ) -> Mapping[str, Any]:
        """Return a nested mapping."""
        value = self._get(key, default)
        if not isinstance(value, Mapping):
            self.refuse(key, value, "an object")
        return value

    def integers(self, key: str, length: int) -> tuple[int, ...]:
        """Return a list of `length` integers that are not negative."""
        value = self._get(key, REQUIRED)
        is_list = isinstance(value, list | tuple) and len(value) == length
        if not is_list or not all(type(item) is int and item >= 0 for item in value):
            self.refuse(key, value, f"a list of {length} integers that are not negative")
        return tuple(value)

    def numbers(
        self, key: str, length: int, default: Sequence[float] | _Required = REQUIRED
    ) -> tuple[float, ...]:
        """Return a list of `length` finite numbers."""
        value = self._get(key, default)
        is_list = isinstance(value, list | tuple) and len(value) == length
        if not is_list or not all(_is_finite(item) for item in value):
            self.refuse(key, value, f"a list of {length} numbers")
        return tuple(float(item) for item in value)

    def strings(self, key: str, default: Sequence[str]) -> list[str]:
        """Return a list of strings."""
        value = self._get(key, default)
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            self.refuse(key, value, "a list of strings")
        return list(value)

    def square(self, key: str, default: int | _Required = REQUIRED) -> int:
        """Return a side, written as one integer or as a list of equal ones."""
        value = self._get(key, default)
        if isinstance(value, list | tuple) and value and all(one == value[0] for one in value):
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.refuse(key, value, "one integer of at least 1")
        if value > MAX_SIDE:
            self.refuse(key, value, f"at most {MAX_SIDE}")
        return value

    def _get(self, key: str, default: object) -> Any:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is REQUIRED:
            raise ConfigError(f"{self.file}: {self.prefix}{key} is missing")
        return default


def _is_finite(value: object) -> bool:
    """Return whether a value is a number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer of more than 308 digits
        return False
