"""What a rename table is made of (used by the tables `hf_decoders`, `hf_vision` and by `hf_names`).

A rule says which tensors of a folder make one of our parameters; a dialect is all the rules of one
way of publishing a model family. Data only: matching is `hf_names`, reading is `hf_folder`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum


class Change(Enum):
    """What happens to the tensors of a parameter beside being stacked along the rows."""

    NONE = "none"
    FLATTENED = "flattened"
    """A convolution kernel `[E, C, ...]` is applied as a matrix `[E, prod(C, ...)]`."""
    SQUEEZED = "squeezed"
    """Leading axes of one are dropped."""
    HEADS_SORTED = "heads sorted"
    """Rows lie by key/value head, its queries, its key, its value; they become q, k, v."""


@dataclass(frozen=True)
class Rule:
    """One of our parameters and the tensors it is made of; `{}` is the number of a block."""

    ours: str
    theirs: tuple[str, ...]
    """More than one are stacked along the rows, in this order."""
    is_required: bool = True
    """False: may be absent from the model, but not from one block alone."""
    change: Change = Change.NONE


@dataclass(frozen=True)
class Dialect:
    """All parameters of one model family, as one way of publishing it spells them."""

    name: str
    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()
    """Regular expressions of names that are recomputed or never run, not loaded."""


def same(*names: str, is_required: bool = True) -> tuple[Rule, ...]:
    """Return rules for parameters that are called what we call them."""
    return tuple(Rule(name, (name,), is_required) for name in names)


def both(stem: str, *theirs: str, is_required: bool = True) -> tuple[Rule, ...]:
    """Return the rules of a module's weight and bias.

    Args:
        stem: What we call the module.
        *theirs: Its spelling, several where they are stacked; none if it is ours.
        is_required: Whether it must be there.
    """
    spelled = theirs or (stem,)
    return tuple(
        Rule(f"{stem}.{leaf}", tuple(f"{name}.{leaf}" for name in spelled), is_required)
        for leaf in ("weight", "bias")
    )


def prefixed(theirs: str, ours: str, rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """Put a prefix before their names, and one before ours."""
    return tuple(
        dataclasses.replace(
            rule, ours=ours + rule.ours, theirs=tuple(theirs + name for name in rule.theirs)
        )
        for rule in rules
    )
