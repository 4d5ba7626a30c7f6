"""Pictures of digits on shapes: made from a seed, and rows that name them."""

import json
from pathlib import Path

from lorakit.data.dataset import load_samples
from lorakit.data.pictures import open_picture
from lorakit.demo.shapes import (
    CHANCE,
    COLORS,
    QUESTIONS,
    SIZE,
    pictures,
    write_conversations,
    write_questions,
)


def test_a_seed_gives_the_same_pictures_and_another_seed_others():
    def drawn(seed: int) -> list[tuple[bytes, object]]:
        return [(image.tobytes(), shown) for image, shown in pictures(6, seed)]

    assert drawn(1) == drawn(1)
    assert len({data for data, _ in [*drawn(1), *drawn(2)]}) == 12


def test_every_answer_comes_and_a_shape_has_its_color():
    made = list(pictures(150, 3))
    for place, answers in enumerate(QUESTIONS.values()):
        assert {shown[place] for _, shown in made} == {*answers}
    for image, (color, _, _) in made[:30]:
        pixels = [image.getpixel((x, y)) for x in range(0, SIZE, 2) for y in range(0, SIZE, 2)]
        near = [max(abs(a - b) for a, b in zip(p, COLORS[color], strict=True)) < 20 for p in pixels]
        assert sum(near) > 0.1 * len(near)


def test_guessing_is_right_as_often_as_there_are_answers():
    assert abs(CHANCE - (1 / 8 + 1 / 4 + 1 / 10) / 3) < 1e-12


def test_rows_are_read_with_their_pictures(tmp_path: Path):
    shown = [answers for _, answers in pictures(6, 1)]
    rows = write_questions(tmp_path / "asked", 6, 1)
    talks = write_conversations(tmp_path / "talks", 6, 1)
    for name, written in (("asked", rows), ("talks", talks)):
        text = "".join(json.dumps(row) + "\n" for row in written)
        (tmp_path / f"{name}.jsonl").write_text(text)
    asked, all_of_it = (load_samples(tmp_path / f"{n}.jsonl") for n in ("asked", "talks"))
    assert [s.reference for s in asked] == [shown[i][i % 3] for i in range(6)]
    assert [{m["content"] for m in s.messages if m["role"] == "assistant"} for s in all_of_it] == [
        {*answers} for answers in shown
    ]
    for sample in (*asked, *all_of_it):
        [picture] = sample.pictures
        image, done = open_picture(picture)
        assert (image.size, done) == ((SIZE, SIZE), [])
