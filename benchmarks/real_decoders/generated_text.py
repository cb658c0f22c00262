"""Conversations in which a model answers itself, to calibrate and to judge it on (for `texts`).

    python -m benchmarks.real_decoders.generated_text smollm2    # writes both files anew

What a model says by itself is where its own probabilities matter, and no data set is needed for it.
The prompts are drawn from short lists. The answers are sampled and differ between processors, so
they are kept in files: results on one set of answers can stand beside each other.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np

from mgvq_runtime import LLM, SamplingParams

_FILES = Path(__file__).parent / "conversations"
CALIBRATION, JUDGED = _FILES / "calibration.jsonl", _FILES / "judged.jsonl"
"""SmolLM2's own, answered in float32 on a core with AVX512."""

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
_QUESTIONS = (
    "What is the capital of France?",
    "Who wrote Hamlet?",
    "What is two plus two?",
    "Name three colours of the rainbow.",
    "How do I boil an egg?",
    "Why is the sky blue?",
    "What is a computer?",
    "Which is the largest ocean?",
    "Who painted the Mona Lisa?",
    "How many legs has a spider?",
    "What does a thermometer measure?",
    "Translate 'good morning' into French.",
    "Give me three tips for sleeping well.",
    "What is the opposite of cold?",
    "In which year did the First World War begin?",
    "How do I greet a stranger politely?",
    "Name a fruit that is yellow.",
    "What is photosynthesis?",
    "How far is the moon from the earth?",
    "Write a sentence with the word river.",
    "What do cows eat?",
    "Who was Isaac Newton?",
    "What is the freezing point of water?",
    "How many days are there in a leap year?",
    "What language is spoken in Brazil?",
    "Give me a synonym for happy.",
    "How does a bicycle stay upright?",
    "What is a prime number?",
    "List the primary colours.",
    "What is the tallest mountain?",
    "How can I save water at home?",
    "What is democracy?",
)
_TOKENS = 224


def prompts(is_judged: bool) -> list[str]:
    """Return prompts, every third a short question; the same ones every time.

    Args:
        is_judged: whether to take every fourth of all, or the others.
    """
    pairs = [form.format(subject) for form, subject in product(_FORMS, _SUBJECTS)]
    order = iter(np.random.default_rng(0).permutation(len(pairs)))
    mixed = [
        prompt
        for question in _QUESTIONS
        for prompt in (question, pairs[next(order)], pairs[next(order)])
    ]
    return [prompt for i, prompt in enumerate(mixed) if (i % 4 == 0) is is_judged]


def converse(folder: Path, questions: Sequence[str]) -> str:
    """Let a model answer at temperature 1.

    Args:
        folder: of the dense checkpoint.
        questions: one conversation each.

    Returns:
        LLaVA rows, one JSON line a question.
    """
    asked = [[{"role": "user", "content": prompt}] for prompt in questions]
    settings = [
        SamplingParams(temperature=1.0, max_tokens=_TOKENS, seed=i) for i in range(len(asked))
    ]
    with LLM(folder, device="cpu", dtype="float32", max_model_len=512, max_num_seqs=32) as llm:
        replies = llm.chat(asked, settings)
    turns = [
        [{"from": "human", "value": prompt}, {"from": "gpt", "value": reply.text}]
        for prompt, reply in zip(questions, replies, strict=True)
    ]
    return "".join(json.dumps({"conversations": turn}) + "\n" for turn in turns)


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Let SmolLM2 answer all prompts anew.")
    parser.add_argument("model", type=Path, help="folder that `smollm2` wrote")
    model: Path = parser.parse_args().model
    for file, is_judged in ((CALIBRATION, False), (JUDGED, True)):
        file.write_text(converse(model, prompts(is_judged)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
