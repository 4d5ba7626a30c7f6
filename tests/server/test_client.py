"""OpenAI's own client as it is, sync and async: many requests at once, its errors' classes."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from lorakit.server.options import ApiKey
from served import Running, in_background, until

HELLO: list[Any] = [{"role": "user", "content": "hello"}]


@asynccontextmanager
async def client_of(served: Running) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(
        base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60
    ) as client:
        yield client


def _requests(base: str) -> list[dict[str, Any]]:
    """Forty-eight of all kinds: model, length, sampling, n, stop, log-probabilities."""
    made = []
    for i in range(48):
        messages = [{"role": "user", "content": f"number {i}, " * (1 + i % 5)}]
        made.append(
            {
                "model": ("shop", "poet", base)[i % 3],
                "messages": messages,
                "max_tokens": 3 + i % 11,
                "temperature": 0 if i % 2 else 1.2,
                "seed": i,
                "n": 1 + (i % 7 == 0),
                "stop": list("aeiounrst 0123.,") if i % 5 == 0 else None,
                "logprobs": i % 4 == 0,
            }
        )
    return made


def _told(choice: Any) -> tuple[Any, ...]:
    tokens = [t.token for t in choice.logprobs.content] if choice.logprobs else None
    return choice.message.content, choice.finish_reason, tokens


def counts(usage: Any) -> tuple[int, int]:
    """All but what was known before."""
    return usage.prompt_tokens, usage.completion_tokens


def test_many_requests_at_once_are_each_answered_as_alone(served: Running) -> None:
    asked = _requests(served.engine.model_name)
    alone = [served.openai.chat.completions.create(**fields) for fields in asked]

    async def together() -> list[Any]:
        async with client_of(served) as client:
            return await asyncio.gather(*(client.chat.completions.create(**f) for f in asked))

    for first, second in zip(alone, asyncio.run(together()), strict=True):
        assert [_told(c) for c in second.choices] == [_told(c) for c in first.choices]
        assert counts(second.usage) == counts(first.usage)
        assert second.model == first.model
    assert any(c.finish_reason == "stop" for answer in alone for c in answer.choices)


def test_many_streams_at_once_are_each_the_whole_answer(served: Running) -> None:
    asked = _requests(served.engine.model_name)[:24]
    alone = [served.openai.chat.completions.create(**fields) for fields in asked]

    async def read(client: AsyncOpenAI, fields: dict[str, Any]) -> tuple[list[str], Any]:
        texts, usage = [""] * fields["n"], None
        stream = await client.chat.completions.create(
            **fields, stream=True, stream_options={"include_usage": True}
        )
        async for chunk in stream:
            usage = chunk.usage
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
        return texts, usage

    async def together() -> list[Any]:
        async with client_of(served) as client:
            return await asyncio.gather(*(read(client, fields) for fields in asked))

    for whole, (texts, usage) in zip(alone, asyncio.run(together()), strict=True):
        assert texts == [choice.message.content for choice in whole.choices]
        assert counts(usage) == counts(whole.usage)


def test_texts_models_and_extensions_are_asked_for_asynchronously_too(served: Running) -> None:
    fields: dict[str, Any] = {"model": "shop", "prompt": "hello", "max_tokens": 8, "logprobs": 1}

    async def ask() -> tuple[Any, Any, list[str], str]:
        async with client_of(served) as client:
            sampled = await client.completions.create(
                **fields, temperature=2, seed=1, extra_body={"top_k": 1}
            )
            greedy = await client.completions.create(**fields, temperature=0)
            names = [model.id async for model in client.models.list()]
            return sampled, greedy, names, (await client.models.retrieve("poet")).id

    sampled, greedy, names, poet = asyncio.run(ask())
    assert sampled.choices[0].text == greedy.choices[0].text
    assert greedy.choices[0].logprobs.token_logprobs == sampled.choices[0].logprobs.token_logprobs
    assert names == [served.engine.model_name, "shop", "poet"]
    assert poet == "poet"


def test_the_clients_helper_for_streams_puts_the_answer_together(served: Running) -> None:
    fields: dict[str, Any] = {"model": "shop", "messages": HELLO, "max_tokens": 8, "seed": 4}
    text = served.openai.chat.completions.create(**fields).choices[0].message.content or ""
    stop = next(c for c in text[2:] if c.isprintable())  # the helper takes a cut answer for a fault
    with served.openai.chat.completions.stream(**fields, stop=stop) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == text[: text.index(stop)]
    assert final.choices[0].finish_reason == "stop"


def test_a_stream_that_is_closed_early_frees_its_row(served: Running) -> None:
    async def leave() -> None:
        async with client_of(served) as client:
            stream = await client.completions.create(
                model="shop", prompt="a", max_tokens=4000, stream=True
            )
            async for _ in stream:
                break
            await stream.close()

    asyncio.run(leave())
    until(lambda: served.engine.running() == 0)


def test_an_error_is_of_the_clients_own_class(served: Running) -> None:
    ask = served.openai.chat.completions.create
    with pytest.raises(openai.NotFoundError) as missing:
        ask(model="shopp", messages=HELLO)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        served.openai.models.retrieve("shopp")
    with pytest.raises(openai.NotFoundError):
        served.openai.images.generate(model="shop", prompt="a")
    with pytest.raises(openai.BadRequestError) as wrong:
        ask(model="shop", messages=HELLO, temperature=3)
    assert (wrong.value.code, wrong.value.param) == ("invalid_value", "temperature")
    assert "temperature: input should be less than or equal to 2" in str(wrong.value)
    with pytest.raises(openai.BadRequestError):
        ask(model="shop", messages=HELLO, max_tokens=0, stream=True)


def test_keys_and_limits_are_of_the_clients_own_classes(serve: Any) -> None:
    server = serve(
        {"body_bytes": 2000, "waiting": 0},
        max_rows=1,
        api_keys=(ApiKey("secret"),),
        admin_key="other",
    )
    with pytest.raises(openai.AuthenticationError) as unknown:
        server.openai.models.list()
    assert unknown.value.code == "invalid_api_key"
    client = OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0)
    with pytest.raises(openai.PermissionDeniedError):
        client.post("/unload_lora_adapter", body={"lora_name": "shop"}, cast_to=object)
    with pytest.raises(openai.APIStatusError) as large:
        client.completions.create(model="shop", prompt="a" * 3000)
    assert large.value.status_code == 413
    stream = client.completions.create(model="shop", prompt="a", max_tokens=3000, stream=True)
    next(stream)
    with pytest.raises(openai.RateLimitError) as many:
        client.completions.create(model="shop", prompt="a")
    assert many.value.code == "rate_limit_exceeded"
    stream.close()
    server.server.drain()
    with pytest.raises(openai.InternalServerError) as ending:
        client.completions.create(model="shop", prompt="a")
    assert ending.value.status_code == 503


def test_a_client_that_is_told_to_wait_asks_again_and_is_answered(serve: Any) -> None:
    server = serve({"waiting": 0}, max_rows=1)
    first = in_background(server, max_tokens=1500)
    until(lambda: server.engine.running() == 1)
    started = time.monotonic()
    patient = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=60)
    answer = patient.completions.create(model="shop", prompt="a", max_tokens=2)
    assert time.monotonic() - started > 0.9, "it was never told to wait"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 2
    assert first() == 200
