"""Makes the committed question sets: `questions.zip` (test) and `calibration.zip` (training).

The test set is drawn from the test split only (unseen writers, vendors, fonts, words, pairs of
shape and colour); calibration pictures from the training split. Pictures are stored at sizes that
Qwen2-VL's image processor leaves alone, so the evaluated pixels are the stored ones.
"""

from __future__ import annotations

import argparse
import io
import json
import zipfile
from collections import Counter, defaultdict
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image
from tqdm import tqdm

from benchmarks.tiny_vlm.assets import DEFAULT_CACHE, Assets, load
from benchmarks.tiny_vlm.conversations import conversation, several_pairs
from benchmarks.tiny_vlm.drawing import choose_size, choose_type, draw
from benchmarks.tiny_vlm.pictures import Picture
from benchmarks.tiny_vlm.smalltalk import sum_pair

QUOTA = {
    "animal": 220,
    "caption": 180,
    "chart": 400,
    "colour": 400,
    "compare": 220,
    "count": 400,
    "easy_vqa": 190,
    "emoji": 300,
    "emoji_group": 140,
    "emoji_scene": 300,
    "exists": 200,
    "flag": 150,
    "letter": 275,
    "number": 350,
    "position": 400,
    "shape": 250,
    "several": 150,
    "small_word": 75,
    "sum": 75,
    "text": 75,
    "word": 250,
}
"""Test questions of each kind, 5,000 in all."""
PER_PICTURE = 5


def encoded(pixels: np.ndarray) -> tuple[bytes, str]:
    """A PNG, or a high-quality JPEG where grain makes the PNG large; with its suffix."""
    picture = Image.fromarray(pixels)
    png, jpeg = io.BytesIO(), io.BytesIO()
    picture.save(png, "PNG", optimize=True)
    if png.tell() < 7_000:
        return png.getvalue(), ".png"
    picture.save(jpeg, "JPEG", quality=92, subsampling=0)
    if jpeg.tell() < png.tell():
        return jpeg.getvalue(), ".jpg"
    return png.getvalue(), ".png"


class Archive:
    """A zip of pictures under construction."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED)
        self.pictures = 0

    def add(self, pixels: np.ndarray) -> str:
        """Store a picture; return its name."""
        content, suffix = encoded(pixels)
        name = f"images/{self.pictures:06d}{suffix}"
        self.write(name, content)
        self.pictures += 1
        return name

    def write(self, name: str, content: bytes) -> None:
        """Store a file under a fixed date, so that equal content gives equal bytes."""
        info = zipfile.ZipInfo(name, date_time=(2026, 1, 1, 0, 0, 0))
        info.compress_type = zipfile.ZIP_DEFLATED
        self.file.writestr(info, content)


class Baseline:
    """The best constant answer for each question string, learnt from training questions."""

    def __init__(self, assets: Assets, pictures: int, seed: int) -> None:
        by_question: dict[str, Counter[str]] = defaultdict(Counter)
        by_kind: dict[str, Counter[str]] = defaultdict(Counter)
        rng = Random(f"baseline/{seed}")
        for _ in tqdm(range(pictures), desc="question-only baseline", unit="picture"):
            size = choose_size(rng)
            for item in draw(rng, assets, choose_type(rng, size), size).questions:
                by_question[item.question][item.answer] += 1
                by_kind[item.kind][item.answer] += 1
            if rng.random() < 0.1:
                pictures_of = [draw(rng, assets, choose_type(rng, size), size) for _ in range(2)]
                for question, answer, _ in several_pairs(rng, pictures_of):
                    by_question[question][answer] += 1
                    by_kind["several"][answer] += 1
        for _ in range(5000):
            question, answer = sum_pair(rng)
            by_question[question][answer] += 1
            by_kind["text"][answer] += 1
        self.by_question = {q: c.most_common(1)[0][0] for q, c in by_question.items()}
        self.by_kind = {k: c.most_common(1)[0][0] for k, c in by_kind.items()}

    def answer(self, kind: str, question: str) -> str:
        """The constant answer."""
        return self.by_question.get(question, self.by_kind[kind])


class TestSet:
    """Collects test questions until every kind has its share."""

    def __init__(self, assets: Assets, baseline: Baseline, archive: Archive, seed: int) -> None:
        self.assets, self.baseline, self.archive = assets, baseline, archive
        self.rng = Random(f"test/{seed}")
        self.left = Counter(QUOTA)
        self.rows: list[dict[str, object]] = []

    def add(self, kind: str, images: list[str], question: str, answer: str, chance: float) -> None:
        """Append one question."""
        self.rows.append(
            {
                "id": f"q{len(self.rows):05d}",
                "kind": kind,
                "images": images,
                "question": question,
                "answer": answer,
                "chance": round(chance, 6),
                "baseline_answer": self.baseline.answer(kind, question),
            }
        )
        self.left[kind] -= 1

    def fill(self) -> None:
        """Draw until all quotas are met."""
        progress = tqdm(total=sum(QUOTA.values()), desc="test set", unit="question")
        while self.left["several"] > 0:
            self._add_several()
        while self.left["text"] > 0:
            question, answer = sum_pair(self.rng)
            self.add("text", [], question, answer, 1 / 19)
        while any(count > 0 for count in self.left.values()):
            self._add_picture()
            progress.update(len(self.rows) - progress.n)
        progress.close()

    def _add_several(self) -> None:
        size = self.rng.choice(((84, 84), (112, 112), (112, 112)))
        count = self.rng.choice((2, 2, 3))
        pictures = [self._draw(size) for _ in range(count)]
        pairs = [p for p in several_pairs(self.rng, pictures) if not p.answer.isdigit()]
        if not pairs:
            return
        names = [self.archive.add(picture.pixels) for picture in pictures]
        for question, answer, _ in pairs[: min(3, self.left["several"])]:
            chance = 1 / count if answer.startswith("the ") and len(answer.split()) == 2 else 0.0
            self.add("several", names, question, answer, chance)

    def _draw(self, size: tuple[int, int]) -> Picture:
        return draw(self.rng, self.assets, choose_type(self.rng, size), size)

    def _add_picture(self) -> None:
        picture = self._draw(choose_size(self.rng))
        wanted = [item for item in picture.questions if self.left[item.kind] > 0]
        wanted.sort(key=lambda item: -self.left[item.kind] / QUOTA[item.kind])
        only_few = sum(count > 0 for count in self.left.values()) < 6
        if len(wanted) < (1 if only_few else min(3, len(picture.questions))):
            return
        name = ""
        for item in wanted[:PER_PICTURE]:
            if self.left[item.kind] > 0:
                name = name or self.archive.add(picture.pixels)
                self.add(item.kind, [name], item.question, item.answer, item.chance)


def write_test_set(cache: Path, path: Path, seed: int) -> None:
    """Draw the test set."""
    archive = Archive(path)
    baseline = Baseline(load(cache, "train"), 12_000, seed)
    test = TestSet(load(cache, "test"), baseline, archive, seed)
    test.fill()
    rows = test.rows
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    archive.write("questions.jsonl", lines.encode())
    archive.file.close()
    print(
        f"{path}: {len(rows)} questions, {archive.pictures} pictures, {path.stat().st_size} bytes"
    )


def write_calibration(cache: Path, path: Path, seed: int, pictures: int, lines: int) -> None:
    """Draw training conversations in LLaVA's format."""
    assets = load(cache, "train")
    archive = Archive(path)
    rng = Random(f"calibration/{seed}")
    rows: list[dict[str, object]] = []
    while len(rows) < lines:
        size = choose_size(rng)
        if rng.random() < 0.25:
            turns, shown = conversation(rng, assets, size)
            talks = [[(t.role, t.text) for t in turns if t.role != "system"]]
        else:
            picture = draw(rng, assets, choose_type(rng, size), size)
            asked = rng.sample(picture.questions, min(3, len(picture.questions)))
            shown = [picture]
            talks = [[("user", f"<image>\n{q.question}"), ("assistant", q.answer)] for q in asked]
        if not talks or archive.pictures + len(shown) > pictures:
            shown, talks = [], [[("user", (pair := sum_pair(rng))[0]), ("assistant", pair[1])]]
        names = [archive.add(picture.pixels) for picture in shown]
        for talk in talks:
            row: dict[str, object] = {"id": f"c{len(rows):05d}"}
            if names:
                row["image"] = names[0] if len(names) == 1 else names
            sides = {"user": "human", "assistant": "gpt"}
            row["conversations"] = [{"from": sides[role], "value": text} for role, text in talk]
            rows.append(row)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[:lines])
    archive.write("conversations.jsonl", text.encode())
    archive.file.close()
    print(
        f"{path}: {lines} conversations, {archive.pictures} pictures, {path.stat().st_size} bytes"
    )


def main() -> None:
    """Write both archives."""
    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/tiny_vlm/dense"))
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="download folder")
    parser.add_argument("--seed", type=int, default=7, help="seed of both sets")
    parser.add_argument("--calibration-pictures", type=int, default=280)
    parser.add_argument("--calibration-lines", type=int, default=512)
    arguments = parser.parse_args()
    write_calibration(
        arguments.cache,
        arguments.out / "calibration.zip",
        arguments.seed,
        arguments.calibration_pictures,
        arguments.calibration_lines,
    )
    write_test_set(arguments.cache, arguments.out / "questions.zip", arguments.seed)


if __name__ == "__main__":
    main()
