"""Calibration conversations of one run, ready to be run (for `pipeline`, `baselines`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mgvq_quantizer import calibration
from mgvq_quantizer.calibration import CalibrationError, Sample
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_runtime.checkpoint.reader import open_checkpoint
from mgvq_runtime.models.causal_lm import CausalLM
from mgvq_runtime.multimodal.chat import ChatProcessor


@dataclass(frozen=True, eq=False)
class Data:
    """Calibration samples, ready to be run."""

    name: str
    train: list[Sample]
    heldout: list[Sample]
    swapped: list[Sample]
    """The training conversations with other pictures, for tuning."""
    fingerprint: str

    @property
    def all(self) -> list[Sample]:
        """Every sample."""
        return [*self.train, *self.heldout, *self.swapped]


def read_data(folder: Path, graph: CausalLM, recipe: QuantRecipe, path: Path | None) -> Data:
    """Load, thin out, tokenize and split the calibration conversations.

    Args:
        folder: of the dense checkpoint.
        graph: its model.
        recipe: how many, and what share is held out.
        path: see `calibration.load_conversations`.

    Raises:
        CalibrationError: if the data cannot be used.
    """
    name, conversations = calibration.load_conversations(path, folder, graph.visual is not None)
    step = max(1.0, len(conversations) / recipe.max_samples)
    chosen = [
        conversations[int(i * step)] for i in range(min(len(conversations), recipe.max_samples))
    ]
    processor = ChatProcessor.from_checkpoint(
        open_checkpoint(folder), graph.config, recipe.max_image_tokens
    )
    samples = calibration.prepare(chosen, processor, processor.tokenizer)
    _check_lengths(samples, graph.config.text_config.max_position_embeddings)
    if len(samples) < 2:
        raise CalibrationError(f"{name} holds {len(samples)} conversation; at least 2 are needed")
    held = max(1, round(len(samples) * recipe.heldout_share))
    every = len(samples) / held
    picked = {int(i * every) for i in range(held)}
    train = [s for i, s in enumerate(samples) if i not in picked]
    swaps = recipe.picture_swaps if recipe.tuning_steps else 0
    return Data(
        name,
        train,
        [s for i, s in enumerate(samples) if i in picked],
        calibration.show_other_pictures(train, swaps, recipe.seed),
        calibration.fingerprint(chosen),
    )


def _check_lengths(samples: Sequence[Sample], limit: int) -> None:
    """Refuse what the model was never trained to read, before it is run."""
    for sample in samples:
        if len(sample.token_ids) > limit:
            raise CalibrationError(
                f"{sample.where}: {len(sample.token_ids)} tokens, pictures included, but the model "
                f"reads at most {limit}: shorten the conversation, or set --max-image-tokens"
            )
