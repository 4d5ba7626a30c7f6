"""Work before an answer's row: short requests do not wait for long ones."""

import asyncio
import threading
import time
from functools import partial
from typing import Any

import httpx
import pytest

from lorakit.data.templates import render
from lorakit.engine.bounded_tokens import TooManyTokensError, tokens_within
from lorakit.server.fair_turns import Turns
from served import Running, refused, until

CHATS, TEXTS = "/v1/chat/completions", "/v1/completions"


async def order_of(jobs: list[tuple[str, int, str]]) -> list[str]:
    """The order in which work of these names, lengths and clients is done that comes at once."""
    turns, done, gate = Turns("test"), list[str](), threading.Event()
    first = asyncio.ensure_future(turns.run(gate.wait, 0, "opening"))
    await asyncio.sleep(0)
    rest = [
        asyncio.ensure_future(turns.run(partial(done.append, name), size, client))
        for name, size, client in jobs
    ]
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(first, *rest)
    return done


def test_short_work_overtakes_long_work_of_the_same_client() -> None:
    jobs = [*((f"long{i}", 4_000_000, "a") for i in range(6)), ("short", 100, "a")]
    assert asyncio.run(order_of(jobs))[0] == "short"


def test_equal_work_of_two_clients_takes_turns_whoever_came_first() -> None:
    jobs = [(f"a{i}", 1_000_000, "a") for i in range(4)] + [("b0", 1_000_000, "b")]
    order = asyncio.run(order_of(jobs))
    assert order.index("b0") <= 1
    assert [name for name in order if name[0] == "a"] == ["a0", "a1", "a2", "a3"]


def test_long_work_is_not_put_off_for_ever() -> None:
    async def run() -> list[str]:
        turns, done = Turns("test"), list[str]()

        def work(name: str) -> None:
            time.sleep(0.01)
            done.append(name)

        def start(name: str, size: int) -> asyncio.Future[None]:
            return asyncio.ensure_future(turns.run(lambda: work(name), size, name))

        waiting = [start("short", 10), start("long", 100_000)]
        for _ in range(60):  # without end one short piece of work waits
            waiting.append(start("short", 10))
            await asyncio.sleep(0.008)
        await asyncio.gather(*waiting)
        return done

    assert asyncio.run(run()).index("long") < 40


def test_a_turn_that_is_given_up_is_not_worked_off() -> None:
    async def run() -> list[str]:
        turns, done, gate = Turns("test"), list[str](), threading.Event()
        first = asyncio.ensure_future(turns.run(gate.wait, 0, "a"))
        left = asyncio.ensure_future(turns.run(lambda: done.append("left"), 1, "a"))
        stays = asyncio.ensure_future(turns.run(lambda: done.append("stays"), 2, "a"))
        await asyncio.sleep(0)
        first.cancel()  # its work goes on in the thread, and the next turn waits for it
        left.cancel()
        await asyncio.sleep(0.05)
        assert done == []
        gate.set()
        await stays
        return done

    assert asyncio.run(run()) == ["stays"]


def test_a_turn_that_comes_while_it_is_given_up_goes_to_the_next() -> None:
    async def run() -> int:
        turns = Turns("test")
        for _ in range(3):
            left = asyncio.ensure_future(turns.run(int, 1, "a"))
            await asyncio.sleep(0)  # its turn has come, and it has not noticed
            left.cancel()
        return await asyncio.wait_for(turns.run(int, 1, "a"), 5)

    assert asyncio.run(run()) == 0


class Counting:
    """The tokenizer of a test, and how many characters it has read."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.read = tokenizer, 0

    def __call__(self, text: str, **options: Any) -> Any:
        self.read += len(text)
        return self.tokenizer(text, **options)


@pytest.mark.parametrize("limit", [1, 63, 500])
def test_a_text_that_is_far_too_long_is_not_read_to_its_end(tokenizer: Any, limit: int) -> None:
    counting = Counting(tokenizer)
    counted: Any = counting
    with pytest.raises(TooManyTokensError) as caught:
        tokens_within("word " * 1_000_000, counted, limit)
    assert not caught.value.counted
    assert counting.read <= max(limit * 8, 4096)


def test_up_to_the_limit_every_text_has_the_tokens_of_the_whole(tokenizer: Any) -> None:
    # Marks of the template are one token of many characters, so few tokens make a long text.
    for text in ("a", "<|im_end|>" * 2000, "é<|im_end|>" * 1000, "x" * 3000):
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokens_within(text, tokenizer, len(whole)) == whole
        with pytest.raises(TooManyTokensError) as caught:
            tokens_within(text, tokenizer, len(whole) - 1)
        assert caught.value.counted
        assert caught.value.tokens == len(whole)


CALL = {"type": "function", "function": {"name": "f", "arguments": {"city": "Oslo", "n": 1}}}
PYTHON = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.arguments }}{% endfor %}{{ m.content }}{% endfor %}"  # noqa: E501
JSON = PYTHON.replace(
    "arguments }}",
    "arguments if c.function.arguments is string else c.function.arguments | tojson }}",
)


def test_checking_calls_takes_time_in_proportion_to_the_conversation(tokenizer: Any) -> None:
    tokenizer.chat_template = JSON

    def seconds(number: int) -> float:
        turns: list[dict[str, Any]] = [{"role": "user", "content": "x" * 40}] * number
        calls = {"role": "assistant", "content": "", "tool_calls": [CALL] * number}
        start = time.process_time()
        render([*turns, calls], tokenizer)
        return time.process_time() - start

    seconds(10)
    assert seconds(8000) < 40 * seconds(800) + 0.3, "ten times as much took far more than that"


def test_arguments_that_a_template_prints_as_python_are_given_to_it_as_json(
    tokenizer: Any,
) -> None:
    quoted: Any = [
        {"role": "user", "content": str(CALL["function"]["arguments"])},  # type: ignore[index]
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
    ]
    for template in (PYTHON, JSON):
        tokenizer.chat_template = template
        text = render(quoted, tokenizer)
        assert '{"city": "Oslo", "n": 1}' in text
        assert text.count("'city'") == 1  # what the user wrote


def test_a_short_chat_does_not_wait_for_prompts_of_megabytes(serve: Any) -> None:
    server: Running = serve()
    long = {"model": "shop", "messages": [{"role": "user", "content": "word " * 800_000}]}
    statuses: list[int] = []

    def ask() -> None:
        reply = httpx.post(server.url + CHATS, json=long, timeout=60)
        statuses.append(refused(reply, 400)["code"] == "context_length_exceeded")

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    until(lambda: server.figure("lorakit_requests") >= 1)
    started = time.monotonic()
    short = {"model": "shop", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    assert server.post(CHATS, short).status_code == 200
    assert time.monotonic() - started < 20
    for thread in threads:
        thread.join()
    assert statuses == [True] * 6


def test_answers_that_can_never_be_taken_are_refused_before_any_prompt_is_read(
    serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server: Running = serve({"waiting": 4})
    kind = type(server.engine.tokenizer)
    read, plain = list[Any](), kind.__call__

    def counted(self: Any, text: Any, *args: Any, **options: Any) -> Any:
        read.append(text)
        return plain(self, text, *args, **options)

    monkeypatch.setattr(kind, "__call__", counted)
    fields = {"model": "shop", "prompt": ["word " * 5000] * 100, "n": 1, "max_tokens": 1}
    assert refused(server.post(TEXTS, fields), 400)["param"] == "n"
    assert read == []
    assert server.complete().status_code == 200
    assert read == ["hello"]
