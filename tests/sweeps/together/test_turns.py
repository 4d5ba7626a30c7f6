"""Functions in turn: one at a time, in order, and what becomes of those that fail."""

import threading
from contextlib import contextmanager

import pytest

from lorakit.sweeps.together.turns import take_turns


def counting(name: str, turns: int, seen: list[str]):
    def body(wait):
        for turn in range(turns):
            seen.append(f"{name}{turn}")
            assert wait((name, turn)) == 10 * turn

    return body


def test_all_go_on_when_all_have_asked_and_those_at_their_end_are_not_waited_for():
    seen: list[str] = []
    asked = []

    @contextmanager
    def around(name):
        seen.append(f"<{name}")
        yield
        seen.append(">")

    def together(requests):
        asked.append(list(requests))
        return {name: 10 * turn for name, (_, turn) in requests.items()}

    bodies = {"a": counting("a", 2, seen), "b": counting("b", 1, seen)}
    assert take_turns(bodies, together, around) == {}
    assert asked == [["a", "b"], ["a"]]
    turns = " ".join(seen)
    assert turns == "<a a0 > <b b0 > <a a1 > <b > <a >"


@contextmanager
def nothing(name):
    yield


def test_a_tolerated_error_ends_one_and_another_error_ends_all():
    ended = []

    def failing(error):
        def body(wait):
            wait(1)
            raise error

        return body

    def steady(wait):
        try:
            for _ in range(3):
                wait(1)
        finally:
            ended.append("steady")

    def together(requests):
        return dict.fromkeys(requests)

    threads = threading.active_count()
    failed = ZeroDivisionError("one")
    bodies = {"steady": steady, "bad": failing(failed)}
    assert take_turns(bodies, together, nothing, (ZeroDivisionError,)) == {"bad": failed}
    assert ended == ["steady"]
    with pytest.raises(ZeroDivisionError, match="one"):
        take_turns(bodies, together, nothing)
    assert ended == ["steady", "steady"], "one that waited was left behind"
    assert threading.active_count() == threads


def test_an_error_of_what_is_done_together_ends_all():
    def fail(requests):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take_turns({"a": lambda wait: wait(1), "b": lambda wait: wait(1)}, fail, nothing)
