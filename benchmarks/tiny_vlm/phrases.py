"""The wordings of every question (called by `scenes`, `signs`, `charts` and `conversations`).

One key, several phrasings; `ask` picks one and now and then drops the capital or the question mark,
as people do. Not here: answers.
"""

from __future__ import annotations

from random import Random

PHRASES: dict[str, tuple[str, ...]] = {
    "colour": (
        "What color is the {x}?",
        "What is the color of the {x}?",
        "Which color does the {x} have?",
        "What colour is the {x}?",
    ),
    "ground": (
        "What color is the background?",
        "What is the background color?",
        "What colour is the background?",
    ),
    "shape": (
        "What shape is {c}?",
        "Which shape is {c}?",
        "What is the shape of the {c} object?",
        "What shape is the {c} object?",
    ),
    "count_x": (
        "How many {x} are there?",
        "How many {x} can you see?",
        "Count the {x}.",
        "What is the number of {x}?",
    ),
    "where": (
        "Where is the {x}?",
        "In which part of the picture is the {x}?",
        "What is the position of the {x}?",
    ),
    "at": (
        "What is at the {p}?",
        "What is in the {p} part?",
        "What can you see at the {p}?",
    ),
    "next": (
        "What is {r} the {x}?",
        "Which object is {r} the {x}?",
        "What do you see {r} the {x}?",
    ),
    "larger": (
        "Which is larger, the {x} or the {y}?",
        "Which is bigger, the {x} or the {y}?",
        "Is the {x} or the {y} larger?",
    ),
    "smaller": ("Which is smaller, the {x} or the {y}?", "Is the {x} or the {y} smaller?"),
    "more": (
        "Are there more {x} or more {y}?",
        "Which are more, the {x} or the {y}?",
        "What is there more of, {x} or {y}?",
    ),
    "exists": ("Is there {x}?", "Can you see {x}?", "Does the picture show {x}?"),
    "what": (
        "What is this?",
        "What does the picture show?",
        "What can you see?",
        "Name the object.",
    ),
    "group": (
        "Is it an animal, food, a vehicle, nature, an object or a face?",
        "What kind of thing is this: animal, food, vehicle, nature, object or face?",
    ),
    "animal": ("What animal is this?", "Which animal is shown?", "Name the animal."),
    "digit": ("Which digit is this?", "What digit is shown?", "Read the digit."),
    "number": (
        "What number is this?",
        "Read the number.",
        "Which number is written here?",
        "What number do you see?",
    ),
    "digit_at": ("What is the {o} digit?", "Which is the {o} digit?"),
    "digit_count": ("How many digits are there?", "How many digits does the number have?"),
    "sum": ("What is the sum of the digits?", "Add the digits.", "What do the digits add up to?"),
    "word": (
        "Read the word.",
        "What does the sign say?",
        "What word is this?",
        "What is written here?",
    ),
    "word_at": ("What is the {p} word?", "Read the {p} word.", "Which word is at the {p}?"),
    "letter_at": ("What is the {o} letter?", "Which letter comes {o}?", "Name the {o} letter."),
    "letter_count": ("How many letters are there?", "How many letters does the word have?"),
    "bars": ("How many bars are there?", "How many bars does the chart have?", "Count the bars."),
    "bar_value": ("What is the value of {b}?", "What value does bar {b} have?", "How high is {b}?"),
    "bar_with": ("Which bar has the value {v}?", "Which bar is at {v}?"),
    "tallest": ("Which bar is tallest?", "Which bar is the highest?", "What is the tallest bar?"),
    "shortest": ("Which bar is shortest?", "Which bar is the lowest?", "What is the smallest bar?"),
    "bar_colour": ("What color is bar {b}?", "What is the color of bar {b}?"),
    "colour_bar": ("Which bar is {c}?", "What is the label of the {c} bar?"),
    "bar_taller": ("Is {b} higher than {d}?", "Is bar {b} taller than bar {d}?"),
    "flag": (
        "Which country has this flag?",
        "Whose flag is this?",
        "Which flag is this?",
        "What country is this?",
    ),
    "caption": (
        "Describe the picture.",
        "Describe the image.",
        "Write a caption.",
        "What is in this picture?",
    ),
    "which": (
        "Which picture shows {x}?",
        "In which picture is {x}?",
        "Which image shows {x}?",
    ),
    "nth": (
        "What is in the {o} picture?",
        "What does the {o} picture show?",
        "Describe the {o} picture.",
    ),
    "nth_ground": ("What color is the background of the {o} picture?",),
    "pictures": ("How many pictures are there?", "How many images do you see?"),
}


def ask(rng: Random, key: str, **words: str) -> str:
    """One wording of a question, filled in."""
    text = rng.choice(PHRASES[key]).format(**words)
    habit = rng.random()
    if habit < 0.06:
        return text[0].lower() + text[1:]
    if habit < 0.10:
        return text.rstrip("?.")
    return text
