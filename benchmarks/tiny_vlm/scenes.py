"""Pictures of objects on a grid: shapes, emoji, animals (called by `drawing`).

One layout serves all: objects in the cells of a small grid, so that what is asked (how many, where,
what is next to, which is larger) has one answer. Not here: lone things (`singles`), text (`signs`)
and charts (`charts`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from random import Random

from benchmarks.tiny_vlm.assets import Assets
from benchmarks.tiny_vlm.concepts import (
    ANIMALS,
    COLOURS,
    HELD_OUT_PAIRS,
    SHAPES,
    emoji_concepts,
)
from benchmarks.tiny_vlm.phrases import ask
from benchmarks.tiny_vlm.pictures import (
    QA,
    Array,
    Box,
    Picture,
    article,
    background,
    ground_questions,
    jittered,
    paste,
    resized,
    shape_mask,
    tint,
    visible_colours,
)

CONCEPTS = emoji_concepts()
ROW_NAMES = {1: ("",), 2: ("top", "bottom"), 3: ("top", "", "bottom")}
COLUMN_NAMES = {1: ("",), 2: ("left", "right"), 3: ("left", "", "right")}


@dataclass
class Item:
    """One object of a scene."""

    name: str
    colour: str
    row: int = 0
    column: int = 0
    size: int = 0
    drawing: int = 0
    """Which of the vendor's drawings, for emoji."""


def plural(noun: str) -> str:
    """The plural of our nouns."""
    if noun in ("sheep", "scissors", "glasses", "fries"):
        return noun
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def position_name(row: int, column: int, rows: int, columns: int) -> str:
    """Words for a cell: `top left`, `left`, `center`."""
    words = (ROW_NAMES[rows][row], COLUMN_NAMES[columns][column])
    return " ".join(word for word in words if word) or "center"


def sprite(rng: Random, assets: Assets, family: str, item: Item, size: int) -> Array:
    """Draw one item at a size."""
    if family == "shape":
        return tint(shape_mask(item.name, size), jittered(rng, item.colour))
    if family == "animal":
        label = ANIMALS.index(item.name)
        rows = (assets.animal_labels == label).nonzero()[0]
        mask = resized(assets.animals[rng.choice(rows)], size, flip=rng.random() < 0.5)
        return tint(mask, jittered(rng, item.colour))
    number = next(i for i, concept in enumerate(CONCEPTS) if concept[1] == item.name)
    drawings = assets.emoji[number]
    drawing = drawings[item.drawing % len(drawings)]
    angle = rng.uniform(-14, 14) if rng.random() < 0.4 else 0.0
    return resized(drawing, size, angle, flip=rng.random() < 0.3)


def kinds_of(rng: Random, assets: Assets, family: str, canvas: Array, count: int) -> list[Item]:
    """Different kinds of item for one scene."""
    colours = visible_colours(canvas)
    items: list[Item] = []
    while len(items) < count:
        if family == "shape":
            item = Item(rng.choice(SHAPES), rng.choice(colours))
            held_out = (item.colour, item.name) in HELD_OUT_PAIRS
            if held_out and assets.split == "train":
                continue
            if any((o.name, o.colour) == (item.name, item.colour) for o in items):
                continue
        elif family == "animal":
            item = Item(rng.choice(ANIMALS), rng.choice(colours))
        else:
            word = CONCEPTS[rng.choice(list(assets.emoji))][1]
            item = Item(word, "", drawing=rng.randrange(1000))
        if family != "shape" and any(o.name == item.name for o in items):
            continue
        items.append(item)
    return items


def _place(rng: Random, items: list[Item], rows: int, columns: int, cell: int) -> None:
    cells = rng.sample([(r, c) for r in range(rows) for c in range(columns)], len(items))
    base = rng.uniform(0.58, 0.9)
    for item, (row, column) in zip(items, cells, strict=True):
        item.row, item.column = row, column
        item.size = max(12, round(cell * base * rng.uniform(0.9, 1.05)))


def _dense_class(family: str, name: str) -> str:
    return name if family == "shape" else f"{family} {name}"


def square_box(x: float, y: float, size: float, dense_class: str, colour: str) -> Box:
    """The box of a sprite, a little inside its edges."""
    inset = 0.08 * size
    right, bottom = x + size - inset, y + size - inset
    return Box(x + inset, y + inset, right, bottom, dense_class, colour)


def _paint(
    rng: Random,
    assets: Assets,
    family: str,
    canvas: Array,
    items: list[Item],
    grid: tuple[int, int],
) -> list[Box]:
    boxes = []
    height, width = canvas.shape[:2]
    cell_h, cell_w = height / grid[0], width / grid[1]
    spread = {False: (0.4, 0.6), True: (0.25, 0.75)}  # a lone row or column is in the middle
    for item in items:
        size = min(item.size, int(cell_h), int(cell_w))
        item.size = size
        slack_x, slack_y = max(0.0, cell_w - size), max(0.0, cell_h - size)
        x = item.column * cell_w + slack_x * rng.uniform(*spread[grid[1] > 1])
        y = item.row * cell_h + slack_y * rng.uniform(*spread[grid[0] > 1])
        paste(canvas, sprite(rng, assets, family, item, size), round(x), round(y))
        boxes.append(square_box(x, y, size, _dense_class(family, item.name), item.colour))
    return boxes


def _choose_items(
    rng: Random, assets: Assets, family: str, canvas: Array, cells: int
) -> list[Item]:
    """A few different objects, several copies of one or two kinds, or two to be compared."""
    if family == "shape" and rng.random() < 0.25 and cells >= 2:
        return kinds_of(rng, assets, family, canvas, 2)
    if rng.random() < 0.45 and cells >= 2:
        kinds = kinds_of(rng, assets, family, canvas, rng.choice((1, 2, 2)))
        total = rng.randint(len(kinds), min(6, cells))
        chosen = kinds + [rng.choice(kinds) for _ in range(total - len(kinds))]
        return [Item(k.name, k.colour, drawing=k.drawing) for k in chosen]
    return kinds_of(rng, assets, family, canvas, rng.randint(1, min(5, cells)))


def grid_scene(rng: Random, assets: Assets, height: int, width: int, family: str) -> Picture:
    """One to six objects of one family on a grid."""
    canvas, ground = background(rng, height, width)
    smallest = 34 if min(height, width) < 140 else 50
    most = 2 if rng.random() < 0.8 else 3
    limits = [min(most, max(1, side // smallest)) for side in (height, width)]
    rows, columns = rng.choice((limits[0], rng.randint(1, limits[0]))), limits[1]
    if rng.random() < 0.3:
        columns = rng.randint(1, limits[1])
    items = _choose_items(rng, assets, family, canvas, rows * columns)
    cell = int(min(height / rows, width / columns))
    _place(rng, items, rows, columns, cell)
    compared = len(items) in (2, 3) and rng.random() < 0.6
    if compared:
        largest = rng.randrange(len(items))
        for index, item in enumerate(items):
            item.size = round(cell * (0.92 if index == largest else 0.92 * rng.uniform(0.38, 0.58)))
    picture = Picture(canvas)
    picture.boxes = _paint(rng, assets, family, canvas, items, (rows, columns))
    scene = {"shape": "", "emoji": "emoji_scene", "animal": "animal"}[family]
    picture.questions += _count_questions(rng, family, items, scene)
    picture.questions += _place_questions(rng, family, items, rows, columns, scene)
    if family != "emoji":
        picture.questions += _look_questions(rng, family, items, scene)
    if compared and len(items) == 2:
        picture.questions += _size_questions(rng, family, items, scene)
    picture.questions += ground_questions(rng, ground)
    if len(items) <= 3 and len({_label(family, i) for i in items}) == len(items):
        ordered = sorted(items, key=lambda i: (i.row, i.column))
        picture.subject = " and ".join(article(_label(family, i)) for i in ordered)
        chance = 0.0
        picture.questions.append(QA("caption", ask(rng, "caption"), picture.subject, chance))
    return picture


def _label(family: str, item: Item) -> str:
    return f"{item.colour} {item.name}" if family == "shape" else item.name


def _numbers(items: list[Item], name: str = "", colour: str = "") -> tuple[int, ...]:
    """Numbers of the items of a name, of a colour, or of both."""
    return tuple(
        number
        for number, item in enumerate(items)
        if name in ("", item.name) and colour in ("", item.colour)
    )


def _reference(family: str, item: Item, items: list[Item]) -> str | None:
    """The shortest phrase that means this item only, or None."""
    if sum(o.name == item.name for o in items) == 1:
        return item.name
    if family == "shape" and sum(_label(family, o) == _label(family, item) for o in items) == 1:
        return _label(family, item)
    return None


def _count_questions(rng: Random, family: str, items: list[Item], scene: str) -> list[QA]:
    """None says where to look: attention that sums to one over the things loses their number."""
    kind, chance = scene or "count", 1 / 7
    noun = {"shape": rng.choice(("objects", "shapes")), "animal": "animals"}.get(family, "objects")
    result = [QA("count", ask(rng, "count_x", x=noun), str(len(items)), 1 / 6)]
    names = Counter(item.name for item in items)
    name, count = rng.choice(list(names.items()))
    result.append(QA(kind, ask(rng, "count_x", x=plural(name)), str(count), chance))
    if family == "shape":
        absent = rng.choice([shape for shape in SHAPES if shape not in names])
        if rng.random() < 0.35:
            result.append(QA(kind, ask(rng, "count_x", x=plural(absent)), "0", chance))
        colours = Counter(item.colour for item in items)
        colour, count = rng.choice(list(colours.items()))
        result.append(QA(kind, ask(rng, "count_x", x=f"{colour} objects"), str(count), chance))
    pair = names.most_common(2)
    if len(pair) == 2 and pair[0][1] > pair[1][1]:
        more, fewer = pair[0][0], pair[1][0]
        x, y = (more, fewer) if rng.random() < 0.5 else (fewer, more)
        question = ask(rng, "more", x=plural(x), y=plural(y))
        result.append(QA(scene or "compare", question, plural(more), 1 / 2))
    return result


def _place_questions(
    rng: Random, family: str, items: list[Item], rows: int, columns: int, scene: str
) -> list[QA]:
    kind, result = scene or "position", []
    references = {id(item): _reference(family, item, items) for item in items}
    number = {id(item): (index,) for index, item in enumerate(items)}
    by_cell = {(item.row, item.column): item for item in items}
    for item in rng.sample(items, min(2, len(items))):
        place = position_name(item.row, item.column, rows, columns)
        reference = references[id(item)]
        answer = _label(family, item)
        at = number[id(item)]
        if reference:
            result.append(QA(kind, ask(rng, "where", x=reference), place, 1 / 9, at, at))
        if rng.random() < 0.7:
            choices = 96 if family == "shape" else 100 if family == "emoji" else 10
            result.append(QA(kind, ask(rng, "at", p=place), answer, 1 / choices, at, at))
    steps = {(0, -1): "left of", (0, 1): "right of", (-1, 0): "above", (1, 0): "below"}
    pairs = [
        (item, words, by_cell[item.row + dy, item.column + dx])
        for item in items
        for (dy, dx), words in steps.items()
        if references[id(item)] and (item.row + dy, item.column + dx) in by_cell
    ]
    if pairs:
        item, words, other = rng.choice(pairs)
        question = ask(rng, "next", r=words, x=references[id(item)] or "")
        choices = 96 if family == "shape" else 100 if family == "emoji" else 10
        via, at = number[id(item)], number[id(other)]
        result.append(QA(kind, question, _label(family, other), 1 / choices, via, at))
    return result


def _look_questions(rng: Random, family: str, items: list[Item], scene: str) -> list[QA]:
    result = []
    for item in rng.sample(items, min(2, len(items))):
        same_name = [o for o in items if o.name == item.name]
        if len({o.colour for o in same_name}) == 1:
            question, at = ask(rng, "colour", x=item.name), _numbers(items, name=item.name)
            result.append(QA("colour", question, item.colour, 1 / len(COLOURS), at, at))
        if family == "shape" and len({o.name for o in items if o.colour == item.colour}) == 1:
            question, at = ask(rng, "shape", c=item.colour), _numbers(items, colour=item.colour)
            result.append(QA("shape", question, item.name, 1 / len(SHAPES), at, at))
    if family == "shape" and rng.random() < 0.8:
        present = {(item.colour, item.name) for item in items}
        item = rng.choice(items)
        wanted = (item.colour, item.name)
        if rng.random() < 0.5:
            while wanted in present:
                if rng.random() < 0.5:
                    wanted = (rng.choice(list(COLOURS)), item.name)
                else:
                    wanted = (item.colour, rng.choice(SHAPES))
        answer = "yes" if wanted in present else "no"
        question = ask(rng, "exists", x=article(f"{wanted[0]} {wanted[1]}"))
        at = _numbers(items, colour=wanted[0], name=wanted[1])
        result.append(QA("exists", question, answer, 1 / 2, at, at))
    return result


def _size_questions(rng: Random, family: str, items: list[Item], scene: str) -> list[QA]:
    names = [_reference(family, item, items) for item in items]
    if None in names:
        return []
    ordered = sorted(items, key=lambda item: item.size)
    small, large = (_reference(family, item, items) or "" for item in ordered)
    result = []
    for key, answer, item in (("larger", large, ordered[1]), ("smaller", small, ordered[0])):
        x, y = (small, large) if rng.random() < 0.5 else (large, small)
        question, at = ask(rng, key, x=x, y=y), (items.index(item),)
        result.append(QA(scene or "compare", question, answer, 1 / 2, (0, 1), at))
    return result
