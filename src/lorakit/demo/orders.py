"""Orders in free text and the JSON record that a shop's system wants of them, made from a seed.

The base model cannot know the record's exact form, and an adapter learns it in two or three
minutes: the size of a task that people bring. Every value can be read off the customer's text.
"""

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from lorakit.errors import InputError

Record = dict[str, Any]
"""`item`, `quantity`, `color`, `size`, `city` and `express`, in this order."""

SYSTEM = "Turn the order into JSON."
"""Short, and silent about the keys: those are what has to be learned."""

MAX_ROWS = 20_000
"""Rows that a seed gives at most; there are about 140,000 different orders to draw from."""

# What a customer may call an item, one and several; the first name is the record's.
ITEMS: dict[str, tuple[tuple[str, str], ...]] = {
    "mug": (("mug", "mugs"), ("cup", "cups")),
    "t-shirt": (("t-shirt", "t-shirts"), ("tee", "tees")),
    "notebook": (("notebook", "notebooks"), ("notepad", "notepads")),
    "backpack": (("backpack", "backpacks"), ("rucksack", "rucksacks")),
    "lamp": (("lamp", "lamps"),),
    "chair": (("chair", "chairs"),),
    "pillow": (("pillow", "pillows"), ("cushion", "cushions")),
    "blanket": (("blanket", "blankets"),),
    "umbrella": (("umbrella", "umbrellas"),),
    "scarf": (("scarf", "scarves"),),
    "candle": (("candle", "candles"),),
    "vase": (("vase", "vases"),),
    "apron": (("apron", "aprons"),),
    "towel": (("towel", "towels"),),
    "basket": (("basket", "baskets"),),
    "bowl": (("bowl", "bowls"),),
}
QUANTITIES: dict[int, tuple[str, ...]] = {
    1: ("a", "one", "1"),
    2: ("two", "2", "a couple of"),
    3: ("three", "3"),
    4: ("four", "4"),
    5: ("five", "5"),
    6: ("six", "6", "half a dozen"),
    7: ("seven", "7"),
    8: ("eight", "8"),
    9: ("nine", "9"),
    10: ("ten", "10"),
    11: ("eleven", "11"),
    12: ("twelve", "12", "a dozen"),
}
COLORS = ("red", "blue", "green", "black", "white", "yellow", "purple", "orange", "grey", "pink")
SIZES: dict[str, tuple[str, ...]] = {
    "small": ("small",),
    "medium": ("medium", "medium-sized"),
    "large": ("large", "big"),
}
CITIES = (
    "Leeds", "Porto", "Lyon", "Oslo", "Turin", "Graz", "Ghent", "Cork", "Malmö", "Basel",
    "Seville", "Utrecht", "Bergen", "Krakow", "Bremen", "Dundee",
)  # fmt: skip
DELIVERIES = (
    ", delivered to {city}", ", delivery to {city}", " for our shop in {city}",
    " for my flat in {city}", ", shipped to {city}", " (I live in {city})",
)  # fmt: skip
# A true or false is one token of thirty, so its cue is a plain word: subtler ones ("by Friday",
# "it is urgent") are not learned from a few hundred rows.
URGENT = (", by express", ", express please", ", express delivery", ", sent by express")
CALM = ("", "", "", ", no rush")

# {what} is quantity, size, color and item, {rest} where it goes and how soon.
PHRASES = (
    "I'd like to order {what}{rest}.",
    "Please send {what}{rest}.",
    "Hi, could you send me {what}{rest}?",
    "We need {what}{rest}.",
    "Can I get {what}{rest}?",
    "Hello! {what}{rest}, please.",
    "My sister wants {what}{rest}.",
    "Order for our office: {what}{rest}.",
    "Good morning, I want to buy {what}{rest}.",
    "{what}{rest}. Nothing else.",
    "Would it be possible to get {what}{rest}?",
    "I am looking for {what}{rest}.",
    "Put me down for {what}{rest}.",
    "Same as last year: {what}{rest}.",
    "If you have {what} in stock, I'll take that{rest}.",
    "Let me have {what}{rest}.",
    "Hey, I'd love {what}{rest}.",
    "New order. {what}{rest}.",
    "After some thought, I'll take {what}{rest}.",
    "For the birthday party: {what}{rest}.",
    "Dear shop, kindly set aside {what}{rest}.",
    "It's me again, I need {what}{rest}.",
    "My boss asked for {what}{rest}.",
    "Could we please have {what}{rest}?",
    "I was told you sell these: {what}{rest}.",
    "Quick one: {what}{rest}.",
    "We ran out, so {what}{rest}, please.",
    "A gift for a friend: {what}{rest}.",
)
CLOSINGS = ("", "", "", " Thanks!", " Many thanks, Ana", " Cheers")


def make_rows(
    count: int,
    seed: int,
    unsaid: float | None = None,
    apart_from: Sequence[dict[str, Any]] = (),
) -> list[dict[str, Any]]:
    """`count` rows in the `messages` format, no two with the same text or the same order.

    The same arguments give the same rows, and a smaller `count` the first of them.

    Args:
        unsaid: how often a color, a size and a city is left out, within 0 and 1; by default each
            as often as another value, or a little more. As no order comes twice, later rows have
            fewer of those of which there are few.
        apart_from: rows whose texts and orders are not made again.

    Raises:
        InputError: `count` is not within 1 and `MAX_ROWS`.
    """
    if not 1 <= count <= MAX_ROWS:
        raise InputError(f"{count} rows of orders cannot be made: ask for 1 to {MAX_ROWS}")
    rows: list[dict[str, Any]] = []
    texts = ([m["content"] for m in row["messages"][1:]] for row in apart_from)
    seen = {one for text, answer in texts for one in (text, _order(json.loads(answer)))}
    choose = random.Random(seed)
    for record in _records(choose, unsaid):
        text, order = _text(record, choose), _order(record)
        if order in seen or text in seen:
            continue
        seen |= {order, text}
        rows.append(
            {
                "messages": [
                    {"role": "system", "content": SYSTEM},
                    {"role": "user", "content": text},
                    {"role": "assistant", "content": to_json(record)},
                ]
            }
        )
        if len(rows) == count:
            break
    return rows


def train_and_held_out(
    train: int, held_out: int, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """`train` rows to learn from and `held_out` others: no text and no order stands in both.

    Raises:
        InputError: the sum is not within 1 and `MAX_ROWS`.
    """
    rows = make_rows(train + held_out, seed)
    return rows[:train], rows[train:]


def to_json(record: Record) -> str:
    """The one text that counts as right: fixed keys in fixed order, no spaces."""
    return json.dumps(record, separators=(",", ":"), ensure_ascii=False)


def _order(record: Record) -> tuple[Any, ...]:
    """All but `express`: two orders that differ in it alone would be near copies."""
    return tuple(value for key, value in record.items() if key != "express")


def _records(choose: random.Random, unsaid: float | None) -> Iterator[Record]:
    def one_of(values: Iterable[str], nothing: int) -> str | None:
        if unsaid is None:
            return choose.choice((*values, *[None] * nothing))
        return None if choose.random() < unsaid else choose.choice((*values,))

    while True:
        yield {
            "item": choose.choice(list(ITEMS)),
            "quantity": choose.choice(list(QUANTITIES)),
            "color": one_of(COLORS, 2),
            "size": one_of(SIZES, 1),
            "city": one_of(CITIES, 2),
            "express": choose.random() < 0.5,
        }


def _text(record: Record, choose: random.Random) -> str:
    """What a customer who wants `record` writes."""
    one, several = choose.choice(ITEMS[record["item"]])
    words = [choose.choice(QUANTITIES[record["quantity"]])]
    if record["size"]:
        words.append(choose.choice(SIZES[record["size"]]))
    if record["color"]:
        words.append(record["color"])
    words.append(one if record["quantity"] == 1 else several)
    if words[0] == "a" and words[1][0] in "aeiou":
        words[0] = "an"
    rest = choose.choice(DELIVERIES).format(city=record["city"]) if record["city"] else ""
    rest += choose.choice(URGENT if record["express"] else CALM)
    text = choose.choice(PHRASES).format(what=" ".join(words), rest=rest)
    return text[0].upper() + text[1:] + choose.choice(CLOSINGS)
