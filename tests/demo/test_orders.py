"""The demo's orders: repeatable, no leak from training to held out, and answers that are true."""

import json
import re
from typing import Any

import pytest

from lorakit.demo.orders import (
    CITIES,
    COLORS,
    ITEMS,
    MAX_ROWS,
    PHRASES,
    QUANTITIES,
    SIZES,
    SYSTEM,
    make_rows,
    to_json,
    train_and_held_out,
)
from lorakit.errors import InputError

ROWS = make_rows(2000, seed=3)


def text_of(row: dict[str, Any]) -> str:
    return row["messages"][1]["content"]


def record_of(row: dict[str, Any]) -> dict[str, Any]:
    return json.loads(row["messages"][2]["content"])


def orders(rows: list[dict[str, Any]]) -> set[tuple[Any, ...]]:
    return {tuple(v for k, v in record_of(row).items() if k != "express") for row in rows}


def found(words: dict[Any, tuple[str, ...]], text: str) -> list[Any]:
    """The keys that a word of theirs stands for in `text`."""
    return [
        key
        for key, names in words.items()
        if any(re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text, re.I) for name in names)
    ]


def read(text: str) -> dict[str, Any]:
    """The record as a reader without the generator's knowledge of it works it out."""
    items = {item: sum(names, ()) for item, names in ITEMS.items()}
    (item,) = found(items, text)
    names = "|".join(re.escape(name) for name in items[item])
    # The order stands before the item: "… half a dozen small red mugs".
    attributes = [*COLORS, *(name for names in SIZES.values() for name in names)]
    numbers = sorted(
        (
            (word, n)
            for n, words in QUANTITIES.items()
            for word in (*words, "an")[: len(words) + (n == 1)]
        ),
        key=lambda pair: -len(pair[0]),
    )
    before = rf"((?:{'|'.join(attributes)}|\s)*)(?:{names})(?!\w)"
    quantity, described = next(
        (n, match[1])
        for word, n in numbers
        if (match := re.search(rf"(?<!\w){word} {before}", text, re.I))
    )
    colors = found({color: (color,) for color in COLORS}, described)
    sizes = found(SIZES, described)
    cities = found({city: (city,) for city in CITIES}, text)
    return {
        "item": item,
        "quantity": quantity,
        "color": colors[0] if colors else None,
        "size": sizes[0] if sizes else None,
        "city": cities[0] if cities else None,
        "express": "express" in text,
    }


def test_every_value_can_be_read_off_the_text() -> None:
    for row in ROWS:
        assert read(text_of(row)) == record_of(row), text_of(row)


def test_answers_are_compact_json_with_the_same_keys_in_the_same_order() -> None:
    for row in ROWS:
        answer = row["messages"][2]["content"]
        record = json.loads(answer)
        assert list(record) == ["item", "quantity", "color", "size", "city", "express"]
        assert to_json(record) == answer
        assert " " not in answer


def test_the_same_seed_gives_the_same_rows_and_another_seed_others() -> None:
    assert make_rows(50, seed=3) == ROWS[:50]
    assert make_rows(50, seed=4) != ROWS[:50]


def test_no_text_stands_twice_so_none_has_two_answers() -> None:
    assert len({text_of(row) for row in ROWS}) == len(ROWS)


def test_held_out_orders_are_not_among_those_learned_even_with_other_words() -> None:
    train, held_out = train_and_held_out(400, 100, seed=7)
    assert (len(train), len(held_out)) == (400, 100)

    assert not orders(train) & orders(held_out)
    assert not {text_of(row) for row in train} & {text_of(row) for row in held_out}


def test_rows_can_leave_out_more_and_keep_apart_from_others() -> None:
    others = make_rows(300, seed=3)
    rows = make_rows(300, seed=3, unsaid=0.6, apart_from=others)
    for key in ("color", "size", "city"):
        share = sum(record_of(row)[key] is None for row in rows) / len(rows)
        assert 0.45 < share < 0.75

    assert not orders(rows) & orders(others)
    assert not {text_of(row) for row in rows} & {text_of(row) for row in others}


def test_the_prompt_does_not_tell_the_keys() -> None:
    assert not any(key in SYSTEM for key in record_of(ROWS[0]))
    for row in ROWS:
        assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
        assert row["messages"][0]["content"] == SYSTEM


def test_the_rows_are_varied() -> None:
    assert len(PHRASES) >= 25
    for key, least in (("item", 16), ("quantity", 12), ("color", 11), ("size", 4), ("express", 2)):
        assert len({record_of(row)[key] for row in ROWS}) == least
    assert any(record_of(row)["city"] is None for row in ROWS)


@pytest.mark.parametrize("count", [0, -1, MAX_ROWS + 1])
def test_too_few_or_too_many_rows_are_refused(count: int) -> None:
    with pytest.raises(InputError, match=f"ask for 1 to {MAX_ROWS}"):
        make_rows(count, seed=0)


def test_the_most_rows_can_be_made() -> None:
    assert len(make_rows(MAX_ROWS, seed=0)) == MAX_ROWS
