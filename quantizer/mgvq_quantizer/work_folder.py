"""The state of an unfinished run, beside its output (called by `pipeline`, `stream`, `survey`).

`OUTPUT.partial/` holds `run.json` (settings, source, calibration) and one safetensors file for each
finished matrix, shared set of tables and tuned block, written whole or not at all. A run with other
settings is refused by name: mixing two recipes in one checkpoint would go unnoticed. So is a second
process at work in the folder. Runs of one comparison share folders, each with the facts that decide
what is in it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mgvq_kernels.layout import VQLayout, VQWeight
from mgvq_quantizer.solver import Solution
from mgvq_runtime.checkpoint.files import unwritable
from mgvq_runtime.errors import MgvqError

_RUN, _LOCK = "run.json", "lock"
_OURS = {_RUN, _LOCK, "run.tmp"}
"""What a folder may hold in which no work is finished."""


_MEANINGS = {
    "calibration": "other conversations, texts or pictures",
    "calibration_tokens": "the same data read by another chat template, tokenizer or preprocessor",
    "source": "other weights or another config.json",
    "own_answer_tokens": "with --stream the model gives no answers that the data lack",
}
"""What it means that a digest among the facts differs."""


class ResumeError(MgvqError, ValueError):
    """An unfinished run cannot be continued with what was asked now."""


@dataclass(frozen=True)
class Work:
    """Where a run keeps what it has finished, by stage."""

    survey: WorkFolder
    rounding: WorkFolder


class WorkFolder:
    """Finished matrices of one run, on disk; a context manager that holds the folder's lock."""

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Open the folder, or make it.

        Args:
            path: the folder, usually `OUTPUT.partial`.
            facts: everything that decides the result: settings by name, fingerprints. JSON values.

        Raises:
            ResumeError: if the folder belongs to a run with other facts, cannot be read, or another
                process is at work in it.
            CheckpointError: if it cannot be made.
        """
        self.path = path
        if path.exists() and not (path / _RUN).exists() and not _is_empty(path):
            raise ResumeError(
                f"{path} is not an unfinished run of mgvq-quantize (it holds no {_RUN}): delete or "
                "rename it"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = (path / _LOCK).open("ab")
        except OSError as error:
            raise unwritable(path / _LOCK, error) from error
        try:
            _take(self._lock, path)
            # A run that was killed before it wrote this has not done anything yet.
            if (path / _RUN).exists():
                _compare(path, facts)
            else:
                self._write(path / _RUN, json.dumps(dict(facts), indent=1, sort_keys=True).encode())
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> WorkFolder:
        """Return itself; the lock is held already."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let another process have the folder; delete it if nothing in it is finished."""
        if self.path.exists() and _is_empty(self.path):
            self.remove()
        self._lock.close()

    def holds(self, name: str) -> bool:
        """Return whether a matrix is finished."""
        return self._file(name).exists()

    def load(self, name: str, layout: VQLayout) -> Solution | None:
        """Return a finished matrix, or None if it is not there yet.

        Raises:
            ResumeError: if the file is damaged.
        """
        kept = self.load_tensors(name)
        if kept is None:
            return None
        tensors, words = kept
        try:
            weight = VQWeight(
                layout,
                _nested(tensors, layout, "codes"),
                _nested(tensors, layout, "codebook"),
                _nested(tensors, layout, "codebook_scale"),
                tensors["scales"],
                tensors["permutation"] if layout.has_permutation else None,
            )
            nearest, final = float(words["error_nearest"]), float(words["error"])
            tails = tuple(json.loads(words["tails"]))
            return Solution(weight, nearest, final, tensors.get("bias"), tails)
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(name, error) from error

    def save(self, name: str, solution: Solution) -> None:
        """Write a finished matrix, whole or not at all.

        Raises:
            CheckpointError: if the disk does not take it.
        """
        weight = solution.weight
        tensors = {"scales": weight.scales}
        for b, band in enumerate(weight.codes):
            for s, codes in enumerate(band):
                tensors[f"codes.{b}.{s}"] = codes
                # Bands that read one table hold it once; a safetensors file may not.
                tensors[f"codebook.{b}.{s}"] = weight.codebooks[b][s].clone()
                tensors[f"codebook_scale.{b}.{s}"] = weight.codebook_scales[b][s]
        if weight.permutation is not None:
            tensors["permutation"] = weight.permutation
        if solution.bias is not None:
            tensors["bias"] = solution.bias
        words = {"error_nearest": repr(solution.error_nearest), "error": repr(solution.error)}
        words["tails"] = json.dumps(solution.tails)
        self.save_tensors(name, tensors, words)

    def load_tensors(self, name: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """Return what `save_tensors` kept under a name, on the CPU, or None.

        Raises:
            ResumeError: if the file is damaged.
        """
        if not self.holds(name):
            return None
        try:
            with safe_open(self._file(name), "pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise self._damaged(name, error) from error

    def save_tensors(
        self, name: str, tensors: Mapping[str, Tensor], words: Mapping[str, str] | None = None
    ) -> None:
        """Write tensors and words about them, whole or not at all.

        Raises:
            CheckpointError: if the disk does not take them.
        """
        plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        self._write(self._file(name), save(plain, dict(words) if words else None))

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
        """Write JSON values, whole or not at all; numbers come back bit for bit.

        Raises:
            CheckpointError: if the disk does not take them.
        """
        self._write(self.path / f"{name}.json", json.dumps(dict(facts)).encode())

    def remove(self) -> None:
        """Delete the folder: the checkpoint has been written.

        What names the run goes last, so that a kill leaves a run that can be continued.
        """
        with contextlib.suppress(OSError):
            for file in sorted(self.path.iterdir(), key=lambda file: file.name == _RUN):
                file.unlink()
            self.path.rmdir()

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.safetensors"

    def _damaged(self, name: str, error: Exception) -> ResumeError:
        return ResumeError(
            f"{self._file(name)} is damaged ({error}): delete it to have it made again"
        )

    def _write(self, path: Path, data: bytes) -> None:
        """Replace a file by one that has reached the disk."""
        temporary = path.with_suffix(".tmp")
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            kept = f"what is finished stays in {self.path}"
            raise unwritable(path, error, len(data), kept) from error


def shared_folder(parent: Path, facts: Mapping[str, Any]) -> WorkFolder:
    """Open the folder of all runs that have these facts, or make it.

    Args:
        parent: where such folders lie.
        facts: what decides the results that are kept there. JSON values.
    """
    text = json.dumps(dict(facts), sort_keys=True)
    name = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    return WorkFolder(parent / name, facts)


def _nested(
    tensors: Mapping[str, Tensor], layout: VQLayout, part: str
) -> tuple[tuple[Tensor, ...], ...]:
    """Pick one kind of tensor, [band][stage]."""
    return tuple(
        tuple(tensors[f"{part}.{b}.{s}"] for s in range(len(band.stages)))
        for b, band in enumerate(layout.bands)
    )


def _compare(path: Path, facts: Mapping[str, Any]) -> None:
    try:
        old = json.loads((path / _RUN).read_text())
    except (OSError, ValueError) as error:
        raise ResumeError(
            f"{path} is not an unfinished run of mgvq-quantize ({error}): delete or rename it"
        ) from error
    for key in sorted({*old, *facts}):
        if old.get(key) != facts.get(key):
            meaning = f" ({_MEANINGS[key]})" if key in _MEANINGS else ""
            raise ResumeError(
                f"{path} holds a run with {key} = {old.get(key)!r}, this one has "
                f"{facts.get(key)!r}{meaning}: use the same, or delete that folder to start over"
            )


def _is_empty(path: Path) -> bool:
    """Whether no work is finished in a folder, and nothing else lies there."""
    return path.is_dir() and {file.name for file in path.iterdir()} <= _OURS


def _take(lock: IO[bytes], path: Path) -> None:
    """Take the folder for this process; the system frees it however the process ends."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ResumeError(
            f"another mgvq-quantize is at work in {path}: wait until it has ended, or choose "
            "another --output"
        ) from error
    except OSError:  # some network file systems have no locks
        return
