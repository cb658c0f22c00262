"""How the parts of a token table or head are called (called by `spec`, `layers`, `models.loading`).

Tokens are not alike: of a vocabulary in the order of its merges the first 2 % of the rows can
matter nearly as much as all others. So a table `[V, D]` may be stored in runs of rows, each a
matrix of its own with its own bits: `NAME.parts.0` holds the first rows, `NAME.parts.1` the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

PARTS = "parts"
TABLE, HEAD = "model.embed_tokens", "lm_head"
"""What may be in parts."""


def part_name(whole: str, number: int) -> str:
    """Return the module name of a part."""
    return f"{whole}.{PARTS}.{number}"


def is_part(name: str) -> bool:
    """Return whether a module name is a part's."""
    return name.startswith(tuple(f"{whole}.{PARTS}." for whole in (TABLE, HEAD)))


def row_parts(shapes: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Find what is stored in parts, by the names of matrices.

    Args:
        shapes: `[rows, columns]` by module name.

    Returns:
        Rows of each part, by the name of the whole.

    Raises:
        ValueError: if a part is missing or one's name is no number.
    """
    found: dict[str, dict[str, int]] = {}
    for name, shape in shapes.items():
        if is_part(name):
            whole, _, number = name.rpartition(f".{PARTS}.")
            found.setdefault(whole, {})[number] = shape[0]
    return {whole: list(_in_order(whole, rows)) for whole, rows in found.items()}


def _in_order(whole: str, rows: Mapping[str, int]) -> Iterator[int]:
    """Yield the rows of parts "0", "1" and so on."""
    for i in range(len(rows)):
        if str(i) not in rows:
            given = ", ".join(sorted(rows))
            raise ValueError(f"{whole} has parts {given}; they must be counted from 0 on")
        yield rows[str(i)]
