"""Rows of one batch have their own adapter, length and end, and none changes another's answer."""

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest

from answered import each_alone, text, tokens
from lorakit.engine import batch
from lorakit.engine.engine import Engine
from lorakit.engine.open_engine import open_engine
from lorakit.engine.rows_at_once import FEW_ROWS, MAX_ROWS
from lorakit.engine.sampling import Sampling
from lorakit.errors import InputError, LorakitError
from matrix import few

GREEDY = Sampling(max_new_tokens=24, logprobs=0)
Start = Callable[..., Engine]


def prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(256), k=length)


def requests() -> list[tuple[list[int], str | None]]:
    """Ten prompts of other lengths, of which the batch has room for four at once."""
    names = ["shop", None, "poet", "few", "mixed", "shop", "mixed", None, "poet", "few"]
    return [(prompt(i, 1 + 7 * i), name) for i, name in enumerate(names)]


@pytest.fixture(scope="module")
def expected(base: Path, adapters: dict[str, Path]) -> list[list[int]]:
    """What each of `requests` is answered by its adapter alone."""
    return each_alone(base, adapters, requests(), 24)


def test_each_row_of_a_mixed_batch_is_answered_as_its_adapter_alone_answers(
    start: Start, expected: list[list[int]]
):
    engine = start()
    assert engine.notices == []
    tickets = [engine.submit(ids, name, GREEDY) for ids, name in requests()]
    assert [tokens(ticket) for ticket in tickets] == expected
    assert len({tuple(answer) for answer in expected}) == len(expected)
    # Those that want no log-probabilities take the short way to the likeliest token.
    plain = [engine.submit(ids, name, Sampling(max_new_tokens=24)) for ids, name in requests()]
    read = engine.tokenizer.decode
    assert [text(t) for t in plain] == [read(e, skip_special_tokens=True) for e in expected]


@pytest.mark.parametrize("seed", few(range(4), 0))
def test_joining_leaving_and_cancelling_rows_change_nothing_for_the_others(
    start: Start, expected: list[list[int]], seed: int
):
    engine, chance = start(), random.Random(seed)
    kept = list(enumerate(requests()))
    chance.shuffle(kept)
    answers = {}
    with ThreadPoolExecutor(8) as threads:
        for number, (ids, name) in kept:
            for _ in range(chance.randrange(3)):
                other = engine.submit(prompt(seed, 30), chance.choice(["shop", "few", None]))
                threads.submit(leave_after, other, chance.randrange(6))
            ticket = engine.submit(ids, name, GREEDY)
            answers[number] = threads.submit(tokens, ticket)
    assert [answers[i].result() for i in range(len(expected))] == expected
    assert engine.waiting() == 0


def leave_after(ticket: Any, pieces: int) -> None:
    for _ in zip(range(pieces), ticket, strict=False):
        pass
    ticket.cancel()


@pytest.mark.parametrize("chunk", few([5, 50, 2000], 5))  # the longest prompt has 64 tokens
def test_prompts_are_read_in_parts_or_together_while_others_write(
    start: Start, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch, chunk: int
):
    monkeypatch.setattr(batch, "CHUNK", chunk)
    engine = start()
    tickets = [engine.submit(ids, name, GREEDY) for ids, name in requests()]
    assert [tokens(ticket) for ticket in tickets] == expected


def test_the_room_of_a_row_that_is_cancelled_is_free_at_once(start: Start):
    engine = start(max_rows=1)
    long = engine.submit(prompt(1, 5), "shop", Sampling(max_new_tokens=500))
    waiting = engine.submit(prompt(2, 5), "poet", Sampling(max_new_tokens=500))
    short = engine.submit(prompt(3, 5), None, Sampling(max_new_tokens=2))
    next(iter(long))  # which is left at its first piece, and so cancelled
    waiting.cancel()
    assert list(waiting)[-1].finish_reason == "cancelled"
    assert list(short)[-1].new_tokens == 2


def test_those_who_were_cancelled_while_they_waited_do_not_wait_any_more(start: Start):
    engine = start(max_rows=1)
    long = engine.submit(prompt(1, 5), "shop", Sampling(max_new_tokens=400))
    waiting = [engine.submit(prompt(2, 5)) for _ in range(5)]
    for ticket in waiting[1:]:
        ticket.cancel()
        assert [piece.finish_reason for piece in ticket] == ["cancelled"]
    assert engine.waiting() == 1
    long.cancel()
    waiting[0].cancel()


def test_an_answer_ends_where_the_context_does(start: Start):
    engine = start(context_length=40)
    ticket = engine.submit(prompt(1, 35), "few", Sampling(max_new_tokens=100))
    last = list(ticket)[-1]
    assert (last.finish_reason, last.new_tokens) == ("length", 5)


def test_a_request_that_cannot_be_answered_is_refused_with_the_reason(start: Start):
    engine = start(context_length=40)
    for ids, name, words in (
        ([], None, "prompt is empty"),
        (prompt(1, 40), None, "has 40 tokens, and with the answer at most 40"),
        ([3, 259], None, "tokens must be from 0 to 258"),
        ([3, -1], None, "tokens must be from 0 to 258"),
        ([3], "shob", r"no model 'shob' \(did you mean 'shop'\?\)"),
    ):
        with pytest.raises(InputError, match=words):
            engine.submit(ids, name)
    engine.close()
    with pytest.raises(LorakitError, match="closed"):
        engine.submit([3])


def test_closing_lets_answers_finish_for_as_long_as_it_is_given(start: Start):
    engine = start(max_rows=2)
    tickets = [engine.submit(prompt(i, 5), "shop", Sampling(max_new_tokens=30)) for i in range(5)]
    engine.close(drain=60)
    ends = [list(ticket)[-1].finish_reason for ticket in tickets]
    assert set(ends) <= {"stop", "length"}
    engine = start(max_rows=1)
    tickets = [engine.submit(prompt(i, 5), None, Sampling(max_new_tokens=500)) for i in range(3)]
    next(iter_pieces := iter(tickets[0]))
    engine.close()
    assert list(iter_pieces)[-1].finish_reason == "cancelled"
    assert [list(ticket)[-1].finish_reason for ticket in tickets[1:]] == ["cancelled"] * 2


def test_a_step_that_fails_ends_its_rows_and_the_engine_goes_on(
    start: Start, expected: list[list[int]]
):
    engine = start()
    layer = engine._model.get_submodule("model.layers.1")
    hook = layer.register_forward_pre_hook(lambda *_: 1 / 0)
    last = list(engine.submit([5, 6], "shop"))[-1]
    assert (last.finish_reason, last.error) == (
        "error",
        "the model failed while answering: ZeroDivisionError: division by zero",
    )
    hook.remove()
    ids, name = requests()[2]
    assert tokens(engine.submit(ids, name, GREEDY)) == expected[2]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_whose_thread_ends_leaves_nobody_waiting(
    start: Start, monkeypatch: pytest.MonkeyPatch
):
    engine = start(max_rows=1)
    tickets = [engine.submit(prompt(i, 5), None, Sampling(max_new_tokens=500)) for i in range(3)]
    monkeypatch.setattr(engine._answers, "advance", lambda: 1 / 0)
    assert [list(ticket)[-1].finish_reason for ticket in tickets] == ["cancelled"] * 3
    with pytest.raises(LorakitError, match="closed"):
        engine.submit([5, 6])
    engine.close()
    assert not engine.alive()


def test_as_many_rows_as_fit_are_at_least_as_many_as_usual(base: Path):
    with open_engine(str(base), {}, max_rows=None) as engine:
        assert engine.max_rows == MAX_ROWS  # a tiny model
    with (
        patch("psutil.virtual_memory", return_value=Mock(available=1)),
        open_engine(str(base), {}, max_rows=None) as engine,
    ):
        assert engine.max_rows == FEW_ROWS


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_memory_of_idle_places_is_not_taken(start: Start, dtype: str):
    engine = start(dtype=dtype, max_rows=64)
    assert text(engine.submit(prompt(1, 9), "shop", Sampling(max_new_tokens=3)))
    keys = engine._answers.batch._cache.layers[0].keys  # type: ignore[attr-defined]
    assert keys.shape[0] == 64
    assert keys[1:].count_nonzero() == 0
