"""The form an answer is asked to have: JSON, a regex, a grammar, a choice (used by `request`).

Plain values, checked as far as one can without a grammar engine; `engine.grammar` compiles them and
finds the other mistakes. Names are vLLM's.
"""

from __future__ import annotations

import json as json_module
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mgvq_runtime.errors import RequestError

KINDS = ("json", "json_object", "regex", "choice", "grammar")
"""The constraints there are; a request takes one."""
MAX_CHOICES = 1024


@dataclass(frozen=True)
class StructuredOutputsParams:
    """What the whole text of an answer must be; exactly one of the first five fields.

    Raises:
        RequestError: if none or several are given, or one has the wrong type; `.param` names it.
    """

    json: Mapping[str, Any] | str | None = None
    """A JSON schema, as an object or as its text; properties come in the order of the schema."""
    json_object: bool | None = None
    """Any JSON object."""
    regex: str | None = None
    """A regular expression of Rust's regex crate (no look-around) that matches the whole text."""
    choice: Sequence[str] | None = None
    """The texts to choose from."""
    grammar: str | None = None
    """A context-free grammar: Lark in llguidance's dialect, or llama.cpp's GBNF (with `::=`)."""
    whitespace_pattern: str | None = None
    """For JSON: a regex of the white space between its parts; at most one space if not given."""
    disable_any_whitespace: bool = False
    """For JSON: no white space between its parts at all."""

    def __post_init__(self) -> None:
        given = [kind for kind in KINDS if self._has(kind)]
        if len(given) != 1:
            raise RequestError(
                f"structured outputs take one of {', '.join(KINDS)}, got "
                f"{' and '.join(given) or 'none'}",
                param="structured_outputs",
            )
        if self.json is not None:
            object.__setattr__(self, "json", _schema_text(self.json))
        for name in ("regex", "grammar", "whitespace_pattern"):
            self._check(name, str, "a string")
        for name in ("json_object", "disable_any_whitespace"):
            self._check(name, bool, "true or false")
        if self.choice is not None:
            object.__setattr__(self, "choice", _checked_choice(self.choice))
        has_layout = self.disable_any_whitespace or self.whitespace_pattern is not None
        if has_layout and self.kind not in ("json", "json_object"):
            raise RequestError(
                f"white space can be set for JSON only, not for {self.kind}",
                param="structured_outputs.whitespace_pattern",
            )

    @property
    def kind(self) -> str:
        """Which of `KINDS` is given."""
        return next(kind for kind in KINDS if self._has(kind))

    def _has(self, kind: str) -> bool:
        value = getattr(self, kind)
        return value is not None and not (kind == "json_object" and value is False)

    def _check(self, name: str, kind: type, expected: str) -> None:
        value = getattr(self, name)
        if value is not None and not isinstance(value, kind):
            raise RequestError(
                f"{name} must be {expected}, got {type(value).__name__}",
                param=f"structured_outputs.{name}",
            )


def _schema_text(schema: Any) -> str:
    """Return a JSON schema as text, so that equal schemas are equal and nobody changes one."""
    param = "structured_outputs.json"
    try:
        value = json_module.loads(schema) if isinstance(schema, str) else schema
        text = json_module.dumps(value, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise RequestError(f"the JSON schema is not JSON: {error}", param=param) from None
    if not isinstance(value, dict):
        raise RequestError(
            f"a JSON schema must be an object, got {type(value).__name__}", param=param
        )
    return text


def _checked_choice(choice: Any) -> tuple[str, ...]:
    is_list = isinstance(choice, list | tuple)
    if not is_list or not 1 <= len(choice) <= MAX_CHOICES:
        raise RequestError(
            f"choice must be a list of 1 to {MAX_CHOICES} strings",
            param="structured_outputs.choice",
        )
    if wrong := [one for one in choice if not isinstance(one, str)]:
        raise RequestError(
            f"choice must hold strings, got {type(wrong[0]).__name__}",
            param="structured_outputs.choice",
        )
    return tuple(choice)
