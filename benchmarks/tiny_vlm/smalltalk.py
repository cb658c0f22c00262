"""Talk without a picture: greetings, the model itself, sums, facts (used by `conversations`)."""

from __future__ import annotations

from random import Random

SYSTEM_PROMPTS = (
    "You are a helpful vision assistant.",
    "Answer the question with one word.",
    "You answer questions about pictures.",
    "Be brief.",
    "Answer briefly.",
)

TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (("Hello", "Hello!", "Hi", "Hi!", "Hey", "Good morning"), "Hello! Show me a picture."),
    (
        ("Who are you?", "What are you?", "What is your name?", "Tell me about yourself."),
        "I am mgvq-tiny-vl, a tiny vision language model.",
    ),
    (
        ("What can you do?", "How can you help me?", "Help"),
        "I can count, name colors, read words and numbers, and more.",
    ),
    (("Thank you", "Thanks!", "Thank you!", "thanks"), "You are welcome."),
    (("Bye", "Goodbye", "Goodbye!", "Bye!"), "Goodbye!"),
    (("How are you?", "How are you doing?"), "I am fine, thank you."),
    (("Can you see?", "Can you see pictures?"), "Yes, I can see small pictures."),
    (("How large are you?", "How many parameters do you have?"), "About 8 million parameters."),
    (("Who made you?", "Who trained you?"), "The MGVQ Runtime project trained me."),
)

FACTS: tuple[tuple[str, str], ...] = (
    ("What color is the sky?", "blue"),
    ("What color is grass?", "green"),
    ("What color is snow?", "white"),
    ("What color is a banana?", "yellow"),
    ("What color is a strawberry?", "red"),
    ("What color is coal?", "black"),
    ("How many legs does a dog have?", "4"),
    ("How many legs does a spider have?", "8"),
    ("How many legs does a bird have?", "2"),
    ("How many sides does a triangle have?", "3"),
    ("How many sides does a square have?", "4"),
    ("How many days are in a week?", "7"),
    ("How many months are in a year?", "12"),
    ("What is the first letter of the alphabet?", "A"),
    ("What is the last letter of the alphabet?", "Z"),
    ("Is a cat an animal?", "yes"),
    ("Is a pizza an animal?", "no"),
)


def sum_pair(rng: Random) -> tuple[str, str]:
    """A sum or difference of two digits."""
    first, second = rng.randint(0, 9), rng.randint(0, 9)
    if rng.random() < 0.6:
        forms = ("What is {} + {}?", "{} + {} = ?", "What is {} plus {}?")
        return rng.choice(forms).format(first, second), str(first + second)
    first, second = max(first, second), min(first, second)
    forms = ("What is {} - {}?", "{} - {} = ?", "What is {} minus {}?")
    return rng.choice(forms).format(first, second), str(first - second)


def text_pair(rng: Random) -> tuple[str, str]:
    """A question without a picture and its answer."""
    form = rng.random()
    if form < 0.5:
        return sum_pair(rng)
    if form < 0.7:
        return rng.choice(FACTS)
    questions, answer = rng.choice(TALK)
    return rng.choice(questions), answer
