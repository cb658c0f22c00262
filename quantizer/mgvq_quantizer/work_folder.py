"""The state of an unfinished run, beside its output (called by `pipeline`).

`OUTPUT.partial/` holds `run.json` (settings, source, calibration) and one safetensors file for each
finished matrix and each tuned block, written whole or not at all. A run with other settings is
refused by name: mixing two recipes in one checkpoint would go unnoticed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mgvq_kernels.layout import VQLayout, VQWeight
from mgvq_quantizer.solver import Solution
from mgvq_runtime.errors import MgvqError


class ResumeError(MgvqError, ValueError):
    """An unfinished run cannot be continued with what was asked now."""


class WorkFolder:
    """Finished matrices of one run, on disk."""

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Open the folder, or make it.

        Args:
            path: the folder, usually `OUTPUT.partial`.
            facts: everything that decides the result: settings by name, fingerprints. JSON values.

        Raises:
            ResumeError: if the folder belongs to a run with other facts, or cannot be read.
        """
        self.path = path
        if path.exists():
            _compare(path, facts)
        else:
            path.mkdir(parents=True)
            _write_whole(path / "run.json", json.dumps(dict(facts), indent=1, sort_keys=True))

    def holds(self, name: str) -> bool:
        """Return whether a matrix is finished."""
        return self._file(name).exists()

    def load(self, name: str, layout: VQLayout) -> Solution | None:
        """Return a finished matrix, or None if it is not there yet.

        Raises:
            ResumeError: if the file is damaged.
        """
        if not self.holds(name):
            return None
        file = self._file(name)
        try:
            with safe_open(file, "pt") as tensors:
                weight = VQWeight(
                    layout,
                    _nested(tensors, layout, "codes"),
                    _nested(tensors, layout, "codebook"),
                    _nested(tensors, layout, "codebook_scale"),
                    tensors.get_tensor("scales"),
                    tensors.get_tensor("permutation") if layout.has_permutation else None,
                )
                errors = tensors.metadata()
                bias = tensors.get_tensor("bias") if "bias" in tensors.keys() else None
            return Solution(weight, float(errors["error_nearest"]), float(errors["error"]), bias)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ResumeError(
                f"{file} is damaged ({error}): delete it to quantize {name} again"
            ) from error

    def save(self, name: str, solution: Solution) -> None:
        """Write a finished matrix, whole or not at all."""
        weight = solution.weight
        tensors = {"scales": weight.scales}
        for b, band in enumerate(weight.codes):
            for s, codes in enumerate(band):
                tensors[f"codes.{b}.{s}"] = codes
                tensors[f"codebook.{b}.{s}"] = weight.codebooks[b][s]
                tensors[f"codebook_scale.{b}.{s}"] = weight.codebook_scales[b][s]
        if weight.permutation is not None:
            tensors["permutation"] = weight.permutation
        if solution.bias is not None:
            tensors["bias"] = solution.bias
        errors = {"error_nearest": repr(solution.error_nearest), "error": repr(solution.error)}
        self._save(name, tensors, errors)

    def load_tensors(self, name: str) -> dict[str, Tensor] | None:
        """Return what `save_tensors` kept under a name, or None.

        Raises:
            ResumeError: if the file is damaged.
        """
        if not self.holds(name):
            return None
        try:
            return load_file(self._file(name))
        except (SafetensorError, ValueError) as error:
            raise ResumeError(
                f"{self._file(name)} is damaged ({error}): delete it to do it again"
            ) from error

    def save_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors, whole or not at all."""
        self._save(name, tensors)

    def load_facts(self, name: str) -> dict[str, Any] | None:
        """Return what `save_facts` kept under a name, or None.

        Raises:
            ResumeError: if the file is damaged.
        """
        file = self.path / f"{name}.json"
        if not file.exists():
            return None
        try:
            facts = json.loads(file.read_text())
            if not isinstance(facts, dict):
                raise ValueError("not a JSON object")
            return facts
        except ValueError as error:
            raise ResumeError(f"{file} is damaged ({error}): delete it to do it again") from error

    def save_facts(self, name: str, facts: Mapping[str, Any]) -> None:
        """Write JSON values, whole or not at all; numbers come back bit for bit."""
        _write_whole(self.path / f"{name}.json", json.dumps(dict(facts)))

    def remove(self) -> None:
        """Delete the folder: the checkpoint has been written."""
        shutil.rmtree(self.path)

    def _save(
        self, name: str, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
    ) -> None:
        file = self._file(name)
        temporary = file.with_suffix(".tmp")
        on_host = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        save_file(on_host, temporary, metadata=metadata)
        os.replace(temporary, file)

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.safetensors"


def _nested(tensors: Any, layout: VQLayout, part: str) -> tuple[tuple[Tensor, ...], ...]:
    """Read one kind of tensor, [band][stage]."""
    return tuple(
        tuple(tensors.get_tensor(f"{part}.{b}.{s}") for s in range(len(band.stages)))
        for b, band in enumerate(layout.bands)
    )


def _compare(path: Path, facts: Mapping[str, Any]) -> None:
    try:
        old = json.loads((path / "run.json").read_text())
    except (OSError, ValueError) as error:
        raise ResumeError(
            f"{path} is not an unfinished run of mgvq-quantize ({error}): delete or rename it"
        ) from error
    for key in sorted({*old, *facts}):
        if old.get(key) != facts.get(key):
            raise ResumeError(
                f"{path} holds a run with {key} = {old.get(key)!r}, this one has "
                f"{facts.get(key)!r}: use the same, or delete that folder to start over"
            )


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
