"""Drafts looked up in prompts: an answer is the same with them, token by token."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorakit.engine.engine import Engine
from lorakit.engine.grammar import Grammar
from lorakit.engine.open_engine import open_engine
from lorakit.engine.requests import AnswerPiece
from lorakit.engine.sampling import Sampling
from lorakit.engine.speculation import NgramSpeculation
from lorakit.errors import InputError
from random_adapters import make_adapter

NGRAM = NgramSpeculation(4, prompt_lookup_max=3, prompt_lookup_min=1)
PROMPTS = ["abcabcabcabcabc", "one two one two one", "hello", '{"a": 1, "b": 1, "c": 1}']
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "array", "items": {"type": "integer"}, "maxItems": 3}},
    "required": ["a"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def folders(attentive_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"own": make_adapter(attentive_folder, tmp_path_factory.mktemp("own") / "own", 3)}


@pytest.fixture(scope="module")
def plain(attentive_folder: Path, folders: dict[str, Path]) -> Iterator[Engine]:
    with open_engine(str(attentive_folder), folders, dtype="float32", max_rows=4) as engine:
        yield engine


@pytest.fixture(scope="module")
def drafting(attentive_folder: Path, folders: dict[str, Path]) -> Iterator[Engine]:
    given: Any = {"dtype": "float32", "max_rows": 4, "speculation": NGRAM}
    with open_engine(str(attentive_folder), folders, **given) as engine:
        assert not engine.notices
        yield engine


def answers(engine: Engine, **fields: Any) -> list[tuple[list[int], str, list[Any], str | None]]:
    """Of each prompt by base and adapter in turn, all at once."""
    tickets = []
    for at, text in enumerate(PROMPTS):
        sampling = Sampling(**{"max_new_tokens": 40, "seed": at, **fields})
        ids = engine.tokenizer(text)["input_ids"]
        tickets.append(engine.submit(ids, "own" if at % 2 else None, sampling))
    found = []
    for ticket in tickets:
        pieces: list[AnswerPiece] = list(ticket)
        logprobs = [(one.token, round(one.logprob, 3)) for p in pieces for one in p.logprobs]
        text = "".join(piece.text for piece in pieces)
        found.append((ticket.tokens, text, logprobs, pieces[-1].finish_reason))
    return found


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 0.3, "top_p": 0.9, "logprobs": 2},
        {"repetition_penalty": 1.1, "min_tokens": 30},
        {"grammar": Grammar.of_schema(SCHEMA), "temperature": 1.0},
        {"stop": ("a", "e"), "max_new_tokens": 25},
    ],
)
def test_answers_are_the_same_with_drafts(
    plain: Engine, drafting: Engine, fields: dict[str, Any]
) -> None:
    assert answers(drafting, **fields) == answers(plain, **fields)


def test_what_repeats_is_drafted_and_taken(drafting: Engine) -> None:
    drafts = drafting.drafts
    assert drafts is not None
    before = drafts.proposed, drafts.accepted
    # One token alone may come, so that every draft of it is right.
    ids = drafting.tokenizer("aaaaaaaa")["input_ids"]
    sampling = Sampling(max_new_tokens=33, allowed_token_ids=(ids[0],))
    ticket = drafting.submit(ids, None, sampling)
    assert [*ticket][-1].new_tokens == 33
    assert drafts.accepted - before[1] == drafts.proposed - before[0] >= 24


@pytest.mark.parametrize(
    "text",
    [
        "4",
        "{",
        '{"method": "eagle", "num_speculative_tokens": 4}',
        '{"method": "ngram"}',
        '{"num_speculative_tokens": 0}',
        '{"num_speculative_tokens": true}',
        '{"num_speculative_tokens": 4, "model": "x"}',
        '{"num_speculative_tokens": 4, "prompt_lookup_max": 2, "prompt_lookup_min": 3}',
    ],
)
def test_settings_that_are_not_understood_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="speculative_config"):
        NgramSpeculation.from_json(text)


def test_settings_have_the_defaults_of_vllm() -> None:
    for text, expected in (
        ('{"method": "ngram", "num_speculative_tokens": 4}', (5, 5)),
        ('{"num_speculative_tokens": 4, "prompt_lookup_max": 3}', (3, 3)),
        ('{"num_speculative_tokens": 4, "prompt_lookup_min": 2}', (2, 2)),
    ):
        made = NgramSpeculation.from_json(text)
        assert (made.longest, made.shortest) == expected
