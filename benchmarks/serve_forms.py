"""Answers of JSON schemas beside answers of any text: `python -m benchmarks.serve --parts forms`.

Eight rows of eight adapters either way, with one length: the schemas ask for more records than fit
into an answer, and the others ignore the end token. Two of the rows are sampled.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks.serve_common import MODEL, QUESTIONS, endless, show, take_turns
from lorakit.engine.grammar import Grammar
from lorakit.engine.open_engine import open_engine
from lorakit.engine.sampling import Sampling, prompt_tokens

FIELDS: dict[str, Any] = {
    "name": {"type": "string", "minLength": 3, "maxLength": 30},
    "age": {"type": "integer", "minimum": 0, "maximum": 150},
    "email": {"type": "string", "format": "email"},
    "born": {"type": "string", "format": "date"},
    "kind": {"enum": ["customer", "supplier", "employee", "visitor"]},
    "tags": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 4},
    "price": {"type": "number", "exclusiveMinimum": 0},
    "address": {
        "type": "object",
        "properties": {
            "street": {"type": "string"},
            "zip": {"type": "string", "pattern": "^\\d{5}$"},
        },
        "required": ["street", "zip"],
        "additionalProperties": False,
    },
}


def schemas() -> list[dict[str, Any]]:
    """Eight of them: lists of records of four fields each."""
    names = [*FIELDS]
    made = []
    for at in range(8):
        own = {name: FIELDS[name] for name in [names[(at + i) % 8] for i in range(4)]}
        record = {
            "type": "object",
            "properties": own,
            "required": [*own],
            "additionalProperties": False,
        }
        made.append({"type": "array", "items": record, "minItems": 400})
    return made


def forms(folders: Sequence[Path], tokens: int, rounds: int) -> None:
    """Prints tokens a second of both."""
    named = {path.name: path for path in folders}
    with endless():
        engine = open_engine(
            MODEL, named, dtype="bfloat16", max_rows=8, context_length=2048, prefix_bytes=0
        )
    with closing(engine):
        turns = [[{"role": "user", "content": question}] for question in QUESTIONS]
        prompts = [prompt_tokens(turn, engine.tokenizer) for turn in turns]
        common: dict[str, Any] = {"max_new_tokens": tokens, "ignore_eos": True}

        def side(grammars: Sequence[Grammar | None]) -> Callable[[], int]:
            def run() -> int:
                tickets = []
                for at, (prompt, name) in enumerate(zip(prompts, named, strict=True)):
                    drawn: dict[str, Any] = {"temperature": 1.0, "seed": at} if at < 2 else {}
                    sampling = Sampling(grammar=grammars[at], **common, **drawn)
                    tickets.append(engine.submit(prompt, name, sampling))
                ends = [list(ticket)[-1] for ticket in tickets]
                assert all(end.finish_reason == "length" for end in ends), ends
                return sum(end.new_tokens for end in ends)

            return run

        asked = [Grammar.of_schema(schema) for schema in schemas()]
        sides = {
            "any text": side([None] * 8),
            "eight schemas": side(asked),
            "four of each": side([*asked[:4], None, None, None, None]),
        }
        show("8 rows, 8 adapters", take_turns(sides, rounds))
