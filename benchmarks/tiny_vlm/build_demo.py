"""Draws the six pictures of `demo_pictures/` (run once after training).

Each is the first test-split picture of its type of which the model answers enough questions; those
it answers are kept, judged by transformers' own greedy generation. They show what the model can do;
`evaluate` says how often it does.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random

from PIL import Image

from benchmarks.tiny_vlm.assets import DEFAULT_CACHE, Assets, load
from benchmarks.tiny_vlm.conversations import Encoder
from benchmarks.tiny_vlm.drawing import DRAWERS
from benchmarks.tiny_vlm.evaluate import DENSE, Question, generate, score
from benchmarks.tiny_vlm.export import load_checkpoint
from benchmarks.tiny_vlm.pictures import Picture

PLAN: dict[str, tuple[str, tuple[int, int], int]] = {
    "chart.png": ("chart", (168, 168), 4),
    "shapes.png": ("shapes", (168, 168), 5),
    "sign.png": ("word", (84, 168), 5),
    "emoji.png": ("emojis", (168, 168), 4),
    "number.png": ("number", (112, 168), 3),
    "flag.png": ("flag", (112, 168), 1),
}
"""File to (drawer, size, fewest questions answered)."""
SCENES = ("shapes.png", "emoji.png")
"""These show at least three objects."""


def candidate(name: str, assets: Assets, attempt: int) -> Picture | None:
    """One drawing with as many different questions as the plan asks for, or None."""
    kind, size, fewest = PLAN[name]
    picture = DRAWERS[kind](Random(f"demo/{name}/{attempt}"), assets, *size)
    counts = [int(q.answer) for q in picture.questions if q.kind == "count"]
    if name in SCENES and max(counts, default=0) < 3:
        return None
    seen: set[str] = set()
    kept = []
    for item in picture.questions:
        tidy = item.question[0].isupper() and item.question[-1] in "?."
        if tidy and item.question not in seen and "parts" not in item.question:
            kept.append(item)
            seen.add(item.question)
    picture.questions = kept
    return picture if len(kept) >= fewest else None


def main() -> None:
    """Draw until the model answers enough questions of each picture."""
    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    parser.add_argument("--model", type=Path, default=DENSE, help="model folder")
    default = Path("benchmarks/tiny_vlm/demo_pictures")
    parser.add_argument("--out", type=Path, default=default, help="folder for the pictures")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="download folder")
    parser.add_argument("--attempts", type=int, default=40, help="drawings tried for each picture")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    assets = load(arguments.cache, "test")
    model, encoder = load_checkpoint(arguments.model).eval(), Encoder(arguments.model)
    demo: dict[str, list[tuple[str, str]]] = {}
    for name in PLAN:
        for attempt in range(arguments.attempts):
            picture = candidate(name, assets, attempt)
            if picture is None:
                continue
            questions = [
                Question(str(i), q.kind, (name,), q.question, q.answer, q.chance, "")
                for i, q in enumerate(picture.questions)
            ]
            shown = {name: picture.pixels}
            scores = score(model, encoder, questions, shown)
            if sum(s.is_right for s in scores.values()) < PLAN[name][2]:
                continue
            answers = generate(arguments.model, questions, shown)
            right = [q for q, a in zip(questions, answers, strict=True) if a == q.answer][:5]
            if len(right) >= PLAN[name][2]:
                Image.fromarray(picture.pixels).save(arguments.out / name, optimize=True)
                demo[name] = [(q.question, q.answer) for q in right]
                print(f"{name}: attempt {attempt}, {len(right)} of {len(questions)} answered")
                break
        else:
            raise SystemExit(f"{name}: no drawing of {arguments.attempts} was answered well enough")
    text = json.dumps(demo, indent=2, ensure_ascii=False) + "\n"
    (arguments.out / "demo_pictures.json").write_text(text)


if __name__ == "__main__":
    main()
