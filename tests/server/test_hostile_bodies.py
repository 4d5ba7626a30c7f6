"""Bodies made to be slow or to break something: each is refused at once, and harms no other."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from matrix import few
from served import Running, refused, until

CHATS, TEXTS = "/v1/chat/completions", "/v1/completions"
JSON = {"content-type": "application/json"}
TEXT = b'{"model":"shop","max_tokens":1,"prompt":'
CHAT = b'{"model":"shop","max_tokens":1,"messages":'


def many(item: bytes, size: int = 3_500_000) -> bytes:
    """A list of as many items as fill so many bytes."""
    return b"[" + b",".join([item] * (size // (len(item) + 1))) + b"]"


SLOW: list[tuple[str, bytes]] = [
    (TEXTS, TEXT + many(b'"a"') + b"}"),
    (TEXTS, TEXT + many(b"[1]") + b"}"),
    (TEXTS, TEXT + many(b"-1") + b"}"),
    (TEXTS, TEXT + many(b"1") + b"}"),
    (TEXTS, TEXT + b'"a","stop":' + many(b'"a"') + b"}"),
    (CHATS, CHAT + many(b"1") + b"}"),
    (CHATS, CHAT + many(b"{}") + b"}"),
    (CHATS, CHAT + many(b'{"role":"user","content":""}') + b"}"),
    (CHATS, CHAT + b'[{"role":"user","content":' + many(b'{"type":"text","text":""}') + b"}]}"),
    (CHATS, CHAT + b'[{"role":"user","content":"a"}],"tools":' + many(b"{}") + b"}"),
    (TEXTS, TEXT + b'"a",' + b",".join(b'"k%d":1' % i for i in range(200_000)) + b',"k0":1}'),
    (TEXTS, TEXT + b'"a","' + b"x" * 3_500_000 + b'":1}'),
]


SLOW_BY_NUMBER = {str(number): case for number, case in enumerate(SLOW)}


@contextmanager
def soon(body: bytes) -> Iterator[None]:
    """What is done meanwhile takes little more time than reading the JSON takes.

    The time is the processor's; the server runs in this process.
    """
    begun = time.process_time()
    with suppress(ValueError):
        json.loads(body)
    read = time.process_time()
    yield
    assert time.process_time() - read < 5 + 20 * (read - begun)


@pytest.mark.parametrize(("path", "body"), few(SLOW_BY_NUMBER, "0", "6", "8", "10"))
def test_a_body_of_very_many_things_holds_nobody_up(
    served: Running, path: str, body: bytes
) -> None:
    with soon(body):  # the first wrong item is enough
        error = refused(served.http.post(path, content=body, headers=JSON), 400)
    assert len(error["param"] or "") < 1200


PART, CALL = b'{"type":"text","text":""}', b'{"function":{"name":"f","arguments":{}}}'
ASKS = b'{"role":"user","content":'
BRACES = b'{\\"' * 1_000_000
NULLS = b",".join(b'"k%d":null' % i for i in range(250_000))
# Messages, and a word of why they are refused; none where they are taken.
OBJECTS: list[tuple[bytes, str]] = [
    (b"[" + ASKS + many(PART, 100_000) + b"}]", ""),
    (b"[" + ASKS + b'"a"}],"metadata":{"a":' + many(b"{}", 48_000) + b"}", ""),
    (b"[" + ASKS + b'"a"}],"metadata":{"a":' + many(b"{}", 60_000) + b"}", "16384 objects"),
    (b"[" + b",".join([ASKS + many(PART, 100_000) + b"}"] * 38) + b"]", "16384 objects"),
    (
        b'[{"role":"assistant","content":"a","tool_calls":' + many(CALL, 800_000) + b"}]",
        "16384 objects",
    ),
    (b"[" + ASKS + b'"' + BRACES + b'"}]', "context"),  # in a text they are no objects
    (b"[" + ASKS + b'"' + BRACES, "not JSON"),  # a text without end
    (b"[" + ASKS + b'"a",' + NULLS + b"}]", "k0"),
    (b"[" + ASKS + b'"a"}],"metadata":{"a":' + many(b"[]", 60_000) + b"}", "16384 lists"),
    (b"[" + ASKS + b'"' + b'[\\"' * 20_000 + b'"}]', "context"),
]


@pytest.mark.parametrize(("messages", "word"), OBJECTS, ids=range(len(OBJECTS)))
def test_objects_are_counted_before_they_are_checked(
    served: Running, messages: bytes, word: str
) -> None:
    body = CHAT + messages + (b"" if word == "not JSON" else b"}")
    with soon(body):
        response = served.http.post(CHATS, content=body, headers=JSON)
    if word:
        assert word in refused(response, 400)["message"]
    else:
        assert response.status_code == 200, response.text


DEPTHS = [100, 300, 500, 700, 900, 950, 990, 2000]


@pytest.mark.parametrize("depth", few(DEPTHS, 100, 900, 2000))
def test_deep_json_is_taken_or_refused_wherever_it_stands(served: Running, depth: int) -> None:
    deep = b'{"a":' * depth + b'"\\u0041"' + b"}" * depth
    hello = b'[{"role":"user","content":"a"}'
    call = b'{"role":"assistant","tool_calls":[{"function":{"name":"f","arguments":'
    tool = b'[{"type":"function","function":{"name":"f","parameters":'
    for path, body in (
        (TEXTS, TEXT + b'"a","metadata":' + deep + b"}"),
        (TEXTS, TEXT + b'"a","temperature":' + deep + b"}"),
        (CHATS, CHAT + hello + b"," + call + deep + b"}}]}]}"),
        (CHATS, CHAT + hello + b'],"tools":' + tool + deep + b"}}]}"),
    ):
        response = served.http.post(path, content=body, headers=JSON)
        if response.status_code != 200:
            refused(response, 400)


@pytest.fixture
def answering(served: Running) -> Iterator[None]:
    """Another's answer is written meanwhile, and goes on."""
    body = {"model": "shop", "prompt": "a", "max_tokens": 4000, "temperature": 0, "stream": True}
    with served.http.stream("POST", TEXTS, json=body) as response:
        lines = response.iter_lines()
        next(lines)
        yield
        assert served.engine.running() == 1
        assert not any("error" in next(lines) for _ in range(20))
    until(lambda: served.engine.running() == 0)


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.usefixtures("answering")
def test_sampling_at_its_limits_breaks_no_answer(served: Running, greedy: bool) -> None:
    tiny, huge = 5e-324, 1.7e308
    limits: list[dict[str, Any]] = [
        {"temperature": tiny},
        {"temperature": 1e-40},
        {"temperature": 2, "top_p": tiny},
        {"repetition_penalty": tiny},
        {"repetition_penalty": 1e-40, "presence_penalty": -2, "frequency_penalty": -2},
        {"repetition_penalty": 100},
        {"min_p": 1, "top_k": 2**31 - 1},
        {"min_p": tiny, "top_k": 1, "top_p": 1 - 1e-16},
        {"seed": -(2**63)},
        {"seed": 2**63 - 1, "n": 3},
    ]
    for fields in limits:
        if greedy:
            fields = {**fields, "temperature": 0, "logprobs": 20}
        response = served.complete(max_tokens=3, **{"temperature": 1, **fields})
        assert response.status_code == 200, response.text
        for choice in response.json()["choices"]:
            assert not choice["logprobs"] or len(choice["logprobs"]["tokens"]) == 3
    for name in ("temperature", "repetition_penalty", "presence_penalty", "top_p"):
        refused(served.complete(**{name: huge}), 400)


def test_the_smallest_temperature_takes_the_likeliest_token(served: Running) -> None:
    greedy = served.complete(max_tokens=12).json()["choices"]
    for temperature in (5e-324, 1e-40, 1e-6):
        sampled = served.complete(max_tokens=12, temperature=temperature, seed=1).json()
        assert sampled["choices"] == greedy


def test_any_character_can_stand_in_a_prompt(served: Running) -> None:
    text = "".join(map(chr, (*range(256), 0x2028, 0xFEFF, 0xFFFF, 0x10FFFF)))
    for prompt in (
        text,
        "\u0000",
        "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
    ):
        assert served.complete(prompt=prompt).status_code == 200
        messages = [{"role": "user", "content": prompt, "name": prompt}]
        body = {"model": "shop", "max_tokens": 1, "messages": messages}
        assert served.post(CHATS, body).status_code == 200


def test_special_tokens_in_a_stop_text_are_plain_text(served: Running) -> None:
    text = json.dumps({"model": "shop", "prompt": "a", "max_tokens": 3, "stop": "<|im_end|>"})
    assert served.http.post(TEXTS, content=text, headers=JSON).status_code == 200
