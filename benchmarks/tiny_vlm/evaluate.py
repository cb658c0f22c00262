"""Accuracy by kind of a Qwen2-VL folder on the 5,000 unseen questions (run by hand, and by CI).

Reads `questions.zip` (or any file of its form), feeds every question in Qwen2-VL's own template and
counts exact matches of greedy answers, beside chance and the best constant answer per question.
By default our batched graph scores the right answer (the same count, see `scoring`); with
`--generate N` transformers itself generates for N of them and the two counts are compared.
"""

from __future__ import annotations

import argparse
import io
import json
import zipfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from benchmarks.tiny_vlm.conversations import DEFAULT_SYSTEM, Encoder, Row, Turn, _padded
from benchmarks.tiny_vlm.export import load_checkpoint
from benchmarks.tiny_vlm.model import TinyVLM
from benchmarks.tiny_vlm.pictures import QA
from benchmarks.tiny_vlm.scoring import Score, block_scores

DENSE = Path(__file__).parent / "dense"
HARD_KINDS = ("emoji", "emoji_scene", "small_word")
"""Kinds a model this small does not master: where quantization shows first."""
DRAWN_KINDS = ("count", "colour", "shape", "position", "compare", "number", "chart")
"""Kinds whose sum is the training target (95 %)."""


@dataclass(frozen=True)
class Question:
    """One line of `questions.jsonl`."""

    id: str
    kind: str
    images: tuple[str, ...]
    question: str
    answer: str
    chance: float
    baseline_answer: str


def read_questions(path: Path) -> tuple[list[Question], dict[str, np.ndarray]]:
    """Questions and decoded pictures of a zip file."""
    with zipfile.ZipFile(path) as archive:
        lines = archive.read("questions.jsonl").decode().splitlines()
        rows = [json.loads(line) for line in lines]
        questions = [Question(**{**row, "images": tuple(row["images"])}) for row in rows]
        names = {name for question in questions for name in question.images}
        pictures = {}
        for name in sorted(names):
            picture = Image.open(io.BytesIO(archive.read(name))).convert("RGB")
            pictures[name] = np.asarray(picture)
    return questions, pictures


def _rows(
    questions: list[Question], pictures: dict[str, np.ndarray], encoder: Encoder
) -> dict[tuple[int, int], list[tuple[Row, list[np.ndarray], list[str]]]]:
    """Rows to run by picture size; one picture's questions share a row as separate blocks."""
    by_picture: dict[str, list[Question]] = defaultdict(list)
    rows: dict[tuple[int, int], list[tuple[Row, list[np.ndarray], list[str]]]] = defaultdict(list)
    for question in questions:
        if len(question.images) == 1:
            by_picture[question.images[0]].append(question)
            continue
        images = [pictures[name] for name in question.images]
        size = images[0].shape[:2] if images else (28, 28)
        turns = [
            Turn("system", DEFAULT_SYSTEM),
            Turn("user", "<image>" * len(images) + question.question),
            Turn("assistant", question.answer),
        ]
        row = encoder.chat_row(turns, (size[0] // 28, size[1] // 28))
        rows[size].append((row, images, [question.id]))
    for name, asked in by_picture.items():
        size = pictures[name].shape[:2]
        items = [QA(q.kind, q.question, q.answer, q.chance) for q in asked]
        row = encoder.prefix_row((size[0] // 28, size[1] // 28), items)
        rows[size].append((row, [pictures[name]], [q.id for q in asked]))
    return rows


def score(
    model: TinyVLM,
    encoder: Encoder,
    questions: list[Question],
    pictures: dict[str, np.ndarray],
    batch_rows: int = 32,
) -> dict[str, Score]:
    """Score of every question by id."""
    result: dict[str, Score] = {}
    progress = tqdm(total=len(questions), unit="question", desc="scoring")
    for size, rows in _rows(questions, pictures, encoder).items():
        for start in range(0, len(rows), batch_rows):
            part = rows[start : start + batch_rows]
            images = [image for _, row_images, _ in part for image in row_images]
            batch = _padded([row for row, _, _ in part], images, size, encoder.pad)
            for (_, _, ids), scores in zip(part, block_scores(model, batch, encoder), strict=True):
                result |= dict(zip(ids, (scores[block] for block in sorted(scores)), strict=True))
                progress.update(len(ids))
    progress.close()
    return result


def generate(folder: Path, questions: list[Question], pictures: dict[str, np.ndarray]) -> list[str]:
    """Greedy answers of transformers, one question at a time."""
    import transformers

    model = transformers.Qwen2VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    answers = []
    for question in tqdm(questions, unit="question", desc="transformers"):
        content: list[dict[str, str]] = [{"type": "image"} for _ in question.images]
        content.append({"type": "text", "text": question.question})
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        inputs: dict[str, torch.Tensor] = {}
        if question.images:
            images = [Image.fromarray(pictures[name]) for name in question.images]
            inputs = dict(processor(images=images, return_tensors="pt"))
            for grid in inputs["image_grid_thw"]:
                text = text.replace("<|image_pad|>", "<|pad|>" * int(grid.prod() // 4), 1)
            text = text.replace("<|pad|>", "<|image_pad|>")
        inputs["input_ids"] = tokenizer(text, return_tensors="pt")["input_ids"]
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == pad).int()
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(new, skip_special_tokens=True).strip())
    return answers


def by_kind(questions: list[Question], scores: dict[str, Score]) -> dict[str, dict[str, float]]:
    """Counts, accuracy, baselines and mean log-likelihood for each kind and in sums."""
    groups: dict[str, list[Question]] = defaultdict(list)
    for question in sorted(questions, key=lambda q: q.kind):
        groups[question.kind].append(question)
    groups["= drawn kinds"] = [q for q in questions if q.kind in DRAWN_KINDS]
    groups["= hard kinds"] = [q for q in questions if q.kind in HARD_KINDS]
    groups["= all"] = questions
    table = {}
    for kind, members in groups.items():
        if members:
            table[kind] = {
                "questions": len(members),
                "chance": float(np.mean([q.chance for q in members])),
                "question_only": float(np.mean([q.baseline_answer == q.answer for q in members])),
                "accuracy": float(np.mean([scores[q.id].is_right for q in members])),
                "log_likelihood": float(np.mean([scores[q.id].log_likelihood for q in members])),
            }
    return table


def print_table(table: dict[str, dict[str, float]]) -> None:
    """The README's table."""
    print("| kind | questions | chance | question only | accuracy | answer log-likelihood |")
    print("|---|---:|---:|---:|---:|---:|")
    for kind, row in table.items():
        print(
            f"| {kind} | {row['questions']} | {row['chance']:.1%} | {row['question_only']:.1%} "
            f"| {row['accuracy']:.1%} | {row['log_likelihood']:.3f} |"
        )


def main() -> None:
    """Evaluate a folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("folder", type=Path, nargs="?", default=DENSE, help="model folder")
    parser.add_argument("--questions", type=Path, default=DENSE / "questions.zip")
    parser.add_argument("--limit", type=int, default=0, help="only the first N questions")
    parser.add_argument("--generate", type=int, default=0, help="check N with transformers")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--json", action="store_true", help="last line is one JSON document")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    questions, pictures = read_questions(arguments.questions)
    if arguments.limit:
        questions = questions[: arguments.limit]
    encoder = Encoder(arguments.folder)
    scores = score(load_checkpoint(arguments.folder).eval(), encoder, questions, pictures)
    table = by_kind(questions, scores)
    print_table(table)
    report: dict[str, object] = {"kinds": table}
    if arguments.generate:
        step = max(1, len(questions) // arguments.generate)
        chosen = questions[::step][: arguments.generate]
        answers = generate(arguments.folder, chosen, pictures)
        right = [answer == q.answer for answer, q in zip(answers, chosen, strict=True)]
        same = [
            is_right == scores[q.id].is_right for is_right, q in zip(right, chosen, strict=True)
        ]
        print(f"transformers: {sum(right)} of {len(right)} right, {sum(same)} judged the same")
        report["transformers"] = {"right": sum(right), "same": sum(same), "of": len(right)}
    if arguments.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
