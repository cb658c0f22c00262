"""Bar charts with lettered bars and a value axis (called by `drawing`).

Values are tens from 10 to 50 on a fixed axis. Not here: the wordings (`phrases`).
"""

from __future__ import annotations

from random import Random

from benchmarks.tiny_vlm.assets import Assets
from benchmarks.tiny_vlm.concepts import COLOURS
from benchmarks.tiny_vlm.phrases import ask
from benchmarks.tiny_vlm.pictures import (
    QA,
    Box,
    Picture,
    Rgb,
    background,
    distance,
    ground_questions,
    jittered,
    mean_colour,
    paste,
    text_mask,
    tint,
    visible_colours,
)

LABELS = "ABCDE"
VALUES = (10, 20, 30, 40, 50)


def bar_chart(rng: Random, assets: Assets, height: int, width: int) -> Picture:
    """Three to five bars with different colours and values in tens; one per 28 pixels at most."""
    canvas, ground = background(rng, height, width)
    count = rng.randint(3, min(5, max(3, width // 36)))
    colours = visible_colours(canvas)
    same = rng.random() < 0.15
    names = [rng.choice(colours)] * count if same else rng.sample(colours, count)
    values = [rng.choice(VALUES) for _ in range(count)]
    light = distance(mean_colour(canvas), (0, 0, 0)) > 220
    ink: Rgb = (20, 20, 20) if light else (235, 235, 235)
    path = rng.choice([name for name in assets.fonts if "Condensed" not in name])
    size = max(9, min(16, height // 11))
    left, top, bottom = int(size * 1.7), size // 2, height - int(size * 1.3)
    unit = (bottom - top) / 52
    grid = rng.random() < 0.7
    for value in (0, *VALUES):
        y = round(bottom - value * unit)
        if grid or value == 0:
            shade = 1.0 if value == 0 else 0.25
            line = canvas[y : y + 1, left - 2 : width - 2]
            line[:] = (line * (1 - shade) + [c * shade for c in ink]).astype("uint8")
        mask = text_mask(str(value), path, max(8, size - 3))
        paste(canvas, tint(mask, ink), left - 4 - mask.shape[1], y - mask.shape[0] // 2)
    boxes: list[Box] = []
    slot = (width - left - 4) / count
    thick = slot * rng.uniform(0.5, 0.85)
    for index, (name, value) in enumerate(zip(names, values, strict=True)):
        x = left + round(index * slot + (slot - thick) / 2)
        y = round(bottom - value * unit)
        canvas[y:bottom, x : x + round(thick)] = jittered(rng, name)
        boxes.append(Box(x, y, x + thick, bottom, f"bar {value}", name, LABELS[index]))
        mask = text_mask(LABELS[index], path, size)
        label_x = x + round(thick - mask.shape[1]) // 2
        paste(canvas, tint(mask, ink), label_x, bottom + 3)
        edges = (label_x - 2, bottom + 1, label_x + mask.shape[1] + 2, height)
        boxes.append(Box(*edges, LABELS[index], name, f"bar {value}"))
    subject = f"a bar chart with {count} bars"
    picture = Picture(canvas, subject=subject, boxes=boxes)
    picture.questions += _questions(rng, values, names, same)
    picture.questions += ground_questions(rng, ground)
    return picture


def _questions(rng: Random, values: list[int], names: list[str], same: bool) -> list[QA]:
    count = len(values)
    bars, labels = tuple(range(0, 2 * count, 2)), tuple(range(1, 2 * count, 2))  # box numbers
    result = [QA("chart", ask(rng, "bars"), str(count), 1 / 3)]
    for index in rng.sample(range(count), 2):
        question = ask(rng, "bar_value", b=LABELS[index])
        via, at = labels[index : index + 1], bars[index : index + 1]
        result.append(QA("chart", question, str(values[index]), 1 / len(VALUES), via, at))
    for key, extreme in (("tallest", max(values)), ("shortest", min(values))):
        if values.count(extreme) == 1:
            index = values.index(extreme)
            via, at = bars[index : index + 1], labels[index : index + 1]
            result.append(QA("chart", ask(rng, key), LABELS[index], 1 / count, via, at))
    value = rng.choice(values)
    if values.count(value) == 1:
        question, index = ask(rng, "bar_with", v=str(value)), values.index(value)
        via, at = bars[index : index + 1], labels[index : index + 1]
        result.append(QA("chart", question, LABELS[index], 1 / count, via, at))
    index = rng.randrange(count)
    label = LABELS[index]
    question = ask(rng, "bar_colour", b=label)
    bar, letter = bars[index : index + 1], labels[index : index + 1]
    result.append(QA("chart", question, names[index], 1 / len(COLOURS), letter, bar))
    if not same:
        question = ask(rng, "colour_bar", c=names[index])
        result.append(QA("chart", question, label, 1 / count, bar, letter))
    one, two = rng.sample(range(count), 2)
    if values[one] != values[two] and rng.random() < 0.6:
        question = ask(rng, "bar_taller", b=LABELS[one], d=LABELS[two])
        answer = "yes" if values[one] > values[two] else "no"
        via, at = (labels[one], labels[two]), (bars[one], bars[two])
        result.append(QA("chart", question, answer, 1 / 2, via, at))
    caption = f"a bar chart with {count} bars"
    result.append(QA("chart", ask(rng, "caption"), caption, 1 / 3))
    return result
