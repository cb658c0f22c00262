"""Where the bundled demonstration model and pictures are (used by the front doors and benchmarks).

Paths only: nothing is opened here.
"""

from __future__ import annotations

from pathlib import Path

from mgvq_runtime.errors import CheckpointError

ASSETS = Path(__file__).resolve().parent / "assets"


def demo_checkpoint_path() -> Path:
    """Return the folder of the bundled 2-bit checkpoint.

    Raises:
        CheckpointError: if this installation came without it.
    """
    path = ASSETS / "demo"
    if not path.is_dir():
        raise CheckpointError(
            f"the bundled demonstration model is not at {path}: install the package again, or name "
            "a checkpoint folder with --checkpoint"
        )
    return path


def demo_picture_paths() -> tuple[Path, ...]:
    """Return the bundled pictures, by name."""
    return tuple(sorted((ASSETS / "pictures").glob("*.png")))
