"""Tables that several matrices read, kept until all of these are done (called by `stream`).

They take as long to train as their matrices to round, so an interrupted run must find them again.
Not here: the training (`solver`), who shares (`allocation`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mgvq_quantizer.codebook import Codebook
from mgvq_quantizer.solver import Problem, Solution
from mgvq_quantizer.work_folder import WorkFolder

_SCALE = ".scale"
"""Ends the name of the tensor that a table's scale is kept in."""


def books_of(problem: Problem, solution: Solution) -> dict[str, Codebook]:
    """Return the tables of a solved problem by name, to be reused by its siblings."""
    weight = solution.weight
    return {
        name: Codebook(entries, float(scale))
        for names, band, scales in zip(
            problem.names, weight.codebooks, weight.codebook_scales, strict=True
        )
        for name, entries, scale in zip(names, band, scales, strict=True)
    }


def keep_books(work: WorkFolder, label: str, books: Mapping[str, Codebook]) -> None:
    """Write the tables of one group of matrices, whole or not at all.

    Args:
        work: of the run.
        label: what the group is named after.
        books: by name.

    Raises:
        CheckpointError: if the disk does not take them.
    """
    entries = {name: book.entries for name, book in books.items()}
    scales = {name + _SCALE: torch.tensor(book.scale) for name, book in books.items()}
    work.save_tensors(_file(label), entries | scales)


def kept_books(work: WorkFolder, label: str, device: torch.device) -> dict[str, Codebook] | None:
    """Return what `keep_books` wrote for a group, or None.

    Raises:
        ResumeError: if the file is damaged.
    """
    kept = work.load_tensors(_file(label))
    if kept is None:
        return None
    tensors = {name: tensor.to(device) for name, tensor in kept[0].items()}
    scales = {name: tensors.pop(name) for name in [*tensors] if name.endswith(_SCALE)}
    return {
        name: Codebook(entries, float(scales[name + _SCALE])) for name, entries in tensors.items()
    }


def _file(label: str) -> str:
    return f"tables of {label}"
