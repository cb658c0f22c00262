"""Pictures of one thing: an emoji, an animal, a flag, or one of easy-VQA's (called by `drawing`).

Not here: several things on a grid (`scenes`).
"""

from __future__ import annotations

from random import Random

import numpy as np
from PIL import Image

from benchmarks.tiny_vlm.assets import Assets
from benchmarks.tiny_vlm.concepts import COLOURS, COUNTRIES
from benchmarks.tiny_vlm.phrases import ask
from benchmarks.tiny_vlm.pictures import (
    QA,
    Picture,
    article,
    background,
    ground_questions,
    paste,
    resized,
)
from benchmarks.tiny_vlm.scenes import CONCEPTS, Item, kinds_of, sprite, square_box


def single_emoji(rng: Random, assets: Assets, height: int, width: int) -> Picture:
    """One large emoji."""
    canvas, ground = background(rng, height, width)
    name, word, group = CONCEPTS[number := rng.choice(list(assets.emoji))]
    item = Item(word, "", drawing=rng.randrange(1000))
    side = min(height, width)
    size = round(side * rng.uniform(0.5, 0.95))
    x, y = rng.randint(0, width - size), rng.randint(0, height - size)
    paste(canvas, sprite(rng, assets, "emoji", item, size), x, y)
    picture = Picture(canvas, subject=article(word))
    picture.boxes.append(square_box(x, y, size, f"emoji {word}", ""))
    picture.questions.append(QA("emoji", ask(rng, "what"), word, 1 / len(CONCEPTS), at=(0,)))
    picture.questions.append(QA("emoji_group", ask(rng, "group"), group, 1 / 6, at=(0,)))
    picture.questions.append(QA("emoji", ask(rng, "caption"), picture.subject, 1 / len(CONCEPTS)))
    picture.questions += ground_questions(rng, ground)
    return picture


def single_animal(rng: Random, assets: Assets, height: int, width: int) -> Picture:
    """One animal silhouette of one colour."""
    canvas, ground = background(rng, height, width)
    item = kinds_of(rng, assets, "animal", canvas, 1)[0]
    size = round(min(height, width) * rng.uniform(0.55, 0.98))
    x, y = rng.randint(0, width - size), rng.randint(0, height - size)
    paste(canvas, sprite(rng, assets, "animal", item, size), x, y)
    picture = Picture(canvas, subject=article(item.name))
    picture.boxes.append(square_box(x, y, size, f"animal {item.name}", item.colour))
    picture.questions.append(QA("animal", ask(rng, "animal"), item.name, 1 / 10, at=(0,)))
    question = ask(rng, "colour", x=rng.choice((item.name, "animal")))
    picture.questions.append(QA("colour", question, item.colour, 1 / len(COLOURS), at=(0,)))
    picture.questions.append(QA("animal", ask(rng, "what"), item.name, 1 / 10, at=(0,)))
    picture.questions += ground_questions(rng, ground)
    return picture


def single_flag(rng: Random, assets: Assets, height: int, width: int) -> Picture:
    """One flag on a plain ground."""
    canvas, _ = background(rng, height, width)
    code = rng.choice(list(assets.flags))
    size = round(min(height, width) * rng.uniform(0.6, 1.0))
    x, y = rng.randint(0, width - size), rng.randint(0, height - size)
    paste(canvas, resized(rng.choice(assets.flags[code]), size), x, y)
    country = COUNTRIES[code]
    picture = Picture(canvas, subject=f"the flag of {country}")
    picture.boxes.append(square_box(x, y, size, f"flag {code}", ""))
    picture.questions.append(QA("flag", ask(rng, "flag"), country, 1 / len(COUNTRIES), at=(0,)))
    caption = ask(rng, "caption")
    picture.questions.append(QA("flag", caption, picture.subject, 1 / len(COUNTRIES)))
    return picture


def easy_vqa(rng: Random, assets: Assets, height: int, width: int) -> Picture:
    """One picture of easy-VQA, enlarged, with its own questions (yes and no kept balanced)."""
    number = rng.randrange(len(assets.easy_vqa))
    original = Image.fromarray(assets.easy_vqa[number])
    enlarged = original.resize((width, height), Image.Resampling.BILINEAR)
    picture = Picture(np.asarray(enlarged))
    rows = assets.easy_questions[number]
    yes = [row for row in rows if row[1] == "yes"]
    no = [row for row in rows if row[1] == "no"]
    chosen = [row for row in rows if row[1] not in ("yes", "no")]
    if rng.random() < 0.5:
        side = yes if rng.random() < 0.5 else no
        chosen += rng.sample(side, min(1, len(side)))
    for question, answer in chosen:
        chance = 1 / 8
        if answer in ("yes", "no"):
            chance = 1 / 2
        elif answer in ("circle", "rectangle", "triangle"):
            chance = 1 / 3
        text = question[0].upper() + question[1:]
        picture.questions.append(QA("easy_vqa", text, answer, chance))
    return picture
