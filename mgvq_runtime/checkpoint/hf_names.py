"""From the tensor names of a Hugging Face folder to our parameters (called by `hf_folder`).

The tables are data: `hf_decoders` and `hf_vision`. The dialect is found from the names themselves,
never from the config. A name no rule explains is an error, and so is a parameter no name fills. Our
own checkpoints need none of this.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from mgvq_runtime.checkpoint.hf_decoders import TEXT_DIALECTS
from mgvq_runtime.checkpoint.hf_vision import VISION_DIALECTS
from mgvq_runtime.checkpoint.name_rules import Change, Dialect
from mgvq_runtime.errors import CheckpointError

DIALECTS: tuple[Dialect, ...] = (*TEXT_DIALECTS, *VISION_DIALECTS)
"""Every dialect. Text-only ones come first: their names are part of some others'."""

_NUMBER = re.compile(r"0|[1-9][0-9]{0,4}")


@dataclass(frozen=True)
class Source:
    """Which tensors of a folder make one of our parameters."""

    parts: tuple[str, ...]
    """Names in the folder; more than one are stacked along the rows."""
    change: Change = Change.NONE


def map_names(names: Collection[str]) -> dict[str, Source]:
    """Explain every tensor of an unquantized folder.

    Args:
        names: All tensor names of the folder.

    Returns:
        Our parameter names, each with the tensors it is made of; all of `names` are consumed, but
        for those the dialect ignores.

    Raises:
        CheckpointError: if no dialect fits, listing the known ones; or with every unknown name,
            every missing tensor and every gap in the numbers of the blocks.
    """
    dialect = detect(names)
    patterns = _patterns(dialect)
    ignored = re.compile("|".join(dialect.ignored) or r"(?!)")
    found: dict[str, dict[str, str]] = defaultdict(dict)  # pattern: {number of the block: name}
    problems: list[str] = []
    for name in names:
        if ignored.fullmatch(name):
            continue
        place = _place(name, patterns)
        if place is None:
            problems.append(f"unknown tensor {name[:200]}")
        else:
            found[place[0]][place[1]] = name
    sources, missing = _collect(dialect, found)
    if problems or missing:
        raise CheckpointError(
            f"the tensors are not those of a model with {dialect.name} names", problems + missing
        )
    return sources


def detect(names: Collection[str]) -> Dialect:
    """Find the dialect that explains most names; the earlier one on a tie.

    Raises:
        CheckpointError: if none explains half of them; the message lists the known dialects.
    """
    best, best_count = None, 0
    for dialect in DIALECTS:
        patterns = _patterns(dialect)
        count = sum(_place(name, patterns) is not None for name in names)
        if count > best_count:
            best, best_count = dialect, count
    if best is None or best_count * 2 < len(names):
        known = "; ".join(dialect.name for dialect in DIALECTS)
        sample = ", ".join(sorted(name[:80] for name in names)[:3]) or "none"
        raise CheckpointError(
            f"the tensor names fit no known model; known: {known}; the first names here: {sample}"
        )
    return best


def _collect(
    dialect: Dialect, found: Mapping[str, Mapping[str, str]]
) -> tuple[dict[str, Source], list[str]]:
    """Put the tensors of each parameter together; list what is missing, in the folder's names."""
    numbers: dict[str, set[int]] = defaultdict(set)
    for pattern, names in found.items():
        numbers[_stem(pattern)] |= {int(number) for number in names if number}
    stems = {_stem(n) for r in dialect.rules if r.is_required for n in r.theirs if "{}" in n}
    problems = [problem for stem in sorted(stems) for problem in _gaps(stem, numbers[stem])]
    sources: dict[str, Source] = {}
    for rule in dialect.rules:
        if not rule.is_required and not any(pattern in found for pattern in rule.theirs):
            continue
        is_blocked = "{}" in rule.ours
        blocks = [str(n) for n in sorted(numbers[_stem(rule.theirs[0])])] if is_blocked else [""]
        for block in blocks:
            parts = [found.get(pattern, {}).get(block) for pattern in rule.theirs]
            problems += [
                f"missing tensor {pattern.replace('{}', block)}"
                for pattern, part in zip(rule.theirs, parts, strict=True)
                if part is None
            ]
            present = tuple(part for part in parts if part is not None)
            sources[rule.ours.replace("{}", block)] = Source(present, rule.change)
    return sources, problems


def _gaps(stem: str, numbers: set[int]) -> list[str]:
    """Say which block is missing where others are there."""
    if not numbers:
        return [f"there is no {stem}.0"]
    gap = next((n for n in range(len(numbers)) if n not in numbers), None)
    return [] if gap is None else [f"{stem}.{gap} is missing, later ones are there"]


def _patterns(dialect: Dialect) -> frozenset[str]:
    return frozenset(pattern for rule in dialect.rules for pattern in rule.theirs)


def _place(name: str, patterns: Collection[str]) -> tuple[str, str] | None:
    """Return the pattern a name fits and the number in it, "" where it has none."""
    if name in patterns:
        return name, ""
    words = name.split(".")
    for i, word in enumerate(words):
        if _NUMBER.fullmatch(word):
            pattern = ".".join((*words[:i], "{}", *words[i + 1 :]))
            if pattern in patterns:
                return pattern, word
    return None


def _stem(pattern: str) -> str:
    """Return the part before the block's number: "model.layers" of "model.layers.{}.mlp...."."""
    return pattern.partition(".{}.")[0]
