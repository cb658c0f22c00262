"""Text that a model writes itself, to calibrate it on (called by `table`).

What a model says by itself is where its own probabilities matter, and no data set is needed for it.
The prompts are drawn from short lists; the answers are sampled, so they differ between processors.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np

from mgvq_runtime import LLM, SamplingParams

_FORMS = (
    "Write a short story about {}.",
    "Explain {} to a curious child.",
    "Write a letter to a friend about {}.",
    "Write a newspaper article about {}.",
    "Write a chapter of a novel that begins with {}.",
    "Give a lecture on {}.",
    "Describe {} in detail.",
    "Write a conversation between two people about {}.",
)
_SUBJECTS = (
    "a family dinner",
    "the moon and the tides",
    "an old lighthouse",
    "a country wedding",
    "how bread is made",
    "a long walk in the rain",
    "the history of printing",
    "a proud young man",
    "the price of wheat",
    "a visit to London",
    "how bees find flowers",
    "a lost dog",
    "the rules of chess",
    "a ball at a great house",
    "learning to program",
    "a quarrel between sisters",
    "volcanoes",
    "an honest merchant",
    "the first day of school",
    "a ship in a storm",
    "good manners",
    "the human heart",
    "a doctor in a small town",
    "the night sky",
)
_TOKENS = 224


def prompts(count: int) -> list[str]:
    """Draw prompts, at most all pairs of a form and a subject; the same ones every time."""
    pairs = [form.format(subject) for form, subject in product(_FORMS, _SUBJECTS)]
    return [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))[:count]]


def generate(folder: Path, count: int) -> str:
    """Sample answers to `count` prompts, at temperature 1.

    Args:
        folder: of the dense checkpoint.
        count: see `prompts`.

    Returns:
        The answers, with empty lines between them.
    """
    asked = [[{"role": "user", "content": prompt}] for prompt in prompts(count)]
    settings = [
        SamplingParams(temperature=1.0, max_tokens=_TOKENS, seed=i) for i in range(len(asked))
    ]
    with LLM(folder, device="cpu", dtype="float32", max_model_len=512, max_num_seqs=32) as llm:
        return "\n\n".join(reply.text for reply in llm.chat(asked, settings)) + "\n"
