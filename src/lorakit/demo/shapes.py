"""Pictures of a digit on a colored shape, with questions and answers, made from a seed.

Each is drawn anew with Pillow's own font, at another place, size and shade, so that a picture that
is held out was never seen.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

SIZE = 64
"""Pixels of a side."""

_FINER = 2  # drawn so many times larger, then made small

COLORS = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 210),
    "yellow": (240, 210, 40),
    "purple": (140, 50, 170),
    "orange": (245, 135, 30),
    "black": (20, 20, 20),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "diamond")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

QUESTIONS = {"Which color?": (*COLORS,), "Which shape?": SHAPES, "Which digit?": DIGITS}
"""What is asked of a picture, and all answers that there are."""

Shown = tuple[str, str, str]
"""What a picture shows: the right answers, in the order of `QUESTIONS`."""

CHANCE = sum(1 / len(answers) for answers in QUESTIONS.values()) / len(QUESTIONS)
"""The share of right answers of one who sees nothing and knows all answers that there are."""


def draw(shown: Shown, choose: random.Random) -> Image:
    """A picture in RGB, `SIZE` pixels wide and high; `choose` gives place, size and shades."""
    from PIL import Image, ImageDraw, ImageFont

    color, shape, digit = shown
    side = SIZE * _FINER
    background = tuple(choose.randrange(110, 170) for _ in range(3))
    image = Image.new("RGB", (side, side), background)
    pen = ImageDraw.Draw(image)
    r = side * choose.uniform(0.42, 0.46)
    x, y = (side * (0.5 + choose.uniform(-0.03, 0.03)) for _ in range(2))
    fill = tuple(min(255, max(0, c + choose.randrange(-12, 13))) for c in COLORS[color])
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape == "square":
        pen.rectangle((x - 0.86 * r, y - 0.86 * r, x + 0.86 * r, y + 0.86 * r), fill=fill)
    elif shape == "triangle":
        corners = ((x, y - 1.15 * r), (x - 1.1 * r, y + 0.8 * r), (x + 1.1 * r, y + 0.8 * r))
        pen.polygon(corners, fill=fill)
    else:
        r *= 1.1
        pen.polygon(((x, y - r), (x + r, y), (x, y + r), (x - r, y)), fill=fill)
    font = ImageFont.load_default(side * choose.uniform(0.5, 0.54))
    ink = (255, 255, 255) if sum(fill) < 380 else (0, 0, 0)
    lower = 0.08 * side if shape == "triangle" else 0.0
    pen.text((x, y + lower), str(DIGITS.index(digit)), font=font, fill=ink, anchor="mm")
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def pictures(count: int, seed: int) -> Iterator[tuple[Image, Shown]]:
    """`count` pictures, each with what it shows; the same arguments give the same pictures."""
    choose = random.Random(seed)
    for _ in range(count):
        color, shape, digit = (choose.choice(answers) for answers in QUESTIONS.values())
        yield draw((color, shape, digit), choose), (color, shape, digit)


def write_conversations(folder: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """Draws pictures into the new folder `folder`, with a row of all questions for each.

    The questions come in any order. Rows name pictures from the folder above on.
    """
    order = random.Random(seed)
    rows = []
    for file, shown in _saved(folder, count, seed):
        messages: list[dict[str, Any]] = []
        for question, answer in order.sample([*zip(QUESTIONS, shown, strict=True)], len(shown)):
            picture = [] if messages else [{"type": "image", "path": file}]
            asked = [*picture, {"type": "text", "text": question}]
            messages += [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ]
        rows.append({"messages": messages})
    return rows


def write_questions(folder: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """Draws pictures into the new folder `folder`, with a row of one question for each, in turn."""
    questions = [*QUESTIONS]
    return [
        {
            "question": questions[i % len(questions)],
            "answer": shown[i % len(questions)],
            "image": file,
        }
        for i, (file, shown) in enumerate(_saved(folder, count, seed))
    ]


def _saved(folder: Path, count: int, seed: int) -> Iterator[tuple[str, Shown]]:
    folder.mkdir(parents=True)
    for number, (image, shown) in enumerate(pictures(count, seed)):
        file = folder / f"{number:04d}.png"
        image.save(file)
        yield f"{folder.name}/{file.name}", shown
