"""All constants of the training run, written once (read by `train` and `build_sets`)."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """A training run; two runs with equal recipes see equal batches.

    The defaults are for a run from nothing; `CONTINUED` is for one that starts from weights.
    """

    seed: int = 1
    """Seed of the weights and of every drawn batch."""
    steps: int = 4600
    """Optimizer steps in all; may be changed on resume while the rate is still level."""
    warmup_steps: int = 60
    decay_share: float = 0.4
    """Last part of the steps, in which the rate falls along a cosine to `final_share`."""
    levels: tuple[tuple[int, float, float], ...] = ((0, 7e-4, 1.5e-3), (1000, 1.2e-3, 1e-3))
    """From which step which rate of AdamW and of Muon, before the decay."""
    final_share: float = 0.02
    """What is left of the rates at the end."""
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.98
    muon_momentum: float = 0.95
    clip_norm: float = 1.0
    micro_batches: int = 2
    """Per step; summed in order, so one or two workers make the same step."""
    tower_steps: int = 1000
    """First steps, in which the picture tower learns alone, from dense labels (what each patch
    shows); nothing is asked yet."""
    tower_pictures: int = 20
    """Pictures of 112x112 drawn for that, in such a step's micro-batch."""
    rows: int = 10
    """Rows of a later micro-batch of 112x112 pictures; other sizes get as many as cost the same."""
    pictures: int = 5
    """Pictures drawn for the dense labels alone, in a later micro-batch."""
    dense_weight: float = 1.0
    """Weight of the loss of the dense labels."""
    word_weight: float = 0.8
    """Weight of the loss that draws the merged rows to the words for what they show."""
    look_weight: float = 0.5
    """Weight of the loss that teaches two heads to look at what is asked about."""
    questions: int = 7
    """Question blocks on one picture at most."""
    conversation_share: float = 0.17
    """Rows that are whole conversations."""

    def rates(self, step: int) -> tuple[float, float]:
        """AdamW's and Muon's rate: warm-up, level, cosine decay."""
        share = self.rate_share(step)
        _, adam, muon = max(level for level in self.levels if level[0] <= step)
        return adam * share, muon * share

    def rate_share(self, step: int) -> float:
        """How much of the level rates a step uses."""
        since = step if step < self.tower_steps else step - self.tower_steps
        if since < self.warmup_steps:
            return (since + 1) / self.warmup_steps
        start = self.steps * (1 - self.decay_share)
        if step < start:
            return 1.0
        share = min(1.0, (step - start) / max(1.0, self.steps - start))
        return self.final_share + (1 - self.final_share) * 0.5 * (1 + math.cos(math.pi * share))

    def amounts(self, step: int, size: tuple[int, int]) -> tuple[int, int]:
        """Rows, and pictures for dense labels alone, of a micro-batch of pictures of `size`."""
        area = 112 * 112 / (size[0] * size[1])
        if step < self.tower_steps:
            return 0, max(2, round(self.tower_pictures * area))
        share = _cost(112, 112) / _cost(*size)
        return max(2, round(self.rows * share)), round(self.pictures * area)


CONTINUED = Recipe(seed=3, steps=2400, tower_steps=0, levels=((0, 8e-4, 8e-4),), decay_share=0.55)
"""A run that goes on from a model whose tower sees well already."""


def _cost(height: int, width: int) -> float:
    """Rough arithmetic of one row with a picture of this size."""
    patches, tokens = height * width / 196, height * width / 784
    return 2.65 * patches + 0.002 * patches**2 + 0.8 * tokens + 3.9 * (116 + tokens)
