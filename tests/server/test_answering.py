"""Answers over HTTP, asked for by the official client as it is, and by plain requests."""

import json
from typing import Any

import pytest

from lorakit.engine.sampling import Sampling, prompt_tokens
from served import Running

HELLO: list[Any] = [{"role": "user", "content": "hello"}]


def alone(served: Running, prompt: list[int], adapter: str | None, tokens: int) -> str:
    """What the engine itself answers, greedily."""
    ticket = served.engine.submit(prompt, adapter, Sampling(max_new_tokens=tokens))
    return "".join(piece.text for piece in ticket)


@pytest.mark.parametrize("adapter", ["shop", "poet", None])
def test_a_chat_is_answered_by_the_adapter_that_model_names(
    served: Running, adapter: str | None
) -> None:
    answer = served.openai.chat.completions.create(
        model=adapter or served.engine.model_name,
        messages=HELLO,
        max_completion_tokens=12,
        temperature=0,
    )
    prompt = prompt_tokens(HELLO, served.engine.tokenizer)
    assert answer.choices[0].message.content == alone(served, prompt, adapter, 12)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    usage = answer.usage.model_dump(exclude_none=True)
    assert usage.pop("prompt_tokens_details")["cached_tokens"] <= len(prompt)
    assert usage == {
        "prompt_tokens": len(prompt),
        "completion_tokens": 12,
        "total_tokens": len(prompt) + 12,
    }


def test_adapters_and_the_base_answer_differently(served: Running) -> None:
    prompt = prompt_tokens(HELLO, served.engine.tokenizer)
    assert len({alone(served, prompt, name, 12) for name in ("shop", "poet", None)}) == 3


def test_a_streamed_chat_is_the_whole_one_in_pieces(served: Running) -> None:
    asked: dict[str, Any] = {
        "model": "shop",
        "messages": HELLO,
        "max_tokens": 12,
        "temperature": 0.8,
        "seed": 3,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = served.openai.chat.completions.create(**asked)
    chunks = list(
        served.openai.chat.completions.create(
            **asked, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(c.delta.content or "" for c in choices) == whole.choices[0].message.content
    assert [c.finish_reason for c in choices if c.finish_reason] == ["length"]
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens  # asked the same twice
    assert usage.total_tokens == whole.usage.total_tokens
    assert chunks[-1].choices == []
    parts = [token for c in choices if c.logprobs for token in c.logprobs.content or []]
    assert whole.choices[0].logprobs is not None
    assert parts == whole.choices[0].logprobs.content
    assert len(parts) == 12
    assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in parts)


def test_each_event_has_the_counts_so_far_where_they_are_wanted(served: Running) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    asked: dict[str, Any] = {"model": "shop", "max_tokens": 6, "n": 2, "stream": True}
    asked |= {"stream_options": options, "ignore_eos": True}
    for path, prompt in (
        ("chat/completions", {"messages": HELLO}),
        ("completions", {"prompt": "a"}),
    ):
        lines = served.post(f"/v1/{path}", {**asked, **prompt}).text.splitlines()
        usages = [json.loads(line[6:])["usage"] for line in lines if line.startswith("data: {")]
        counts = [usage["completion_tokens"] for usage in usages]
        assert counts[-2:] == [12, 12]
        assert counts == sorted(counts)
        assert len({*counts}) > 3
        assert len({usage["prompt_tokens"] for usage in usages}) == 1


def test_a_stream_is_events_that_end_with_done(served: Running) -> None:
    body = {"model": "shop", "messages": HELLO, "max_tokens": 3, "stream": True}
    with served.http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line[6:]) for line in lines[:-1]]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)


def test_several_choices_are_seeded_apart_and_stream_as_they_are_whole(served: Running) -> None:
    asked: dict[str, Any] = {
        "model": "poet",
        "messages": HELLO,
        "max_tokens": 8,
        "temperature": 1.5,
        "seed": 7,
        "n": 3,
    }
    whole = served.openai.chat.completions.create(**asked)
    texts = [choice.message.content for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    streamed = ["", "", ""]
    for chunk in served.openai.chat.completions.create(**asked, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts
    alone = served.openai.chat.completions.create(**{**asked, "n": 1})
    assert alone.choices[0].message.content == texts[0]
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 24


def test_a_completion_takes_texts_and_tokens_alike(served: Running) -> None:
    ids = list(served.engine.tokenizer("hello")["input_ids"])
    both: Any = ["hello", ids]
    answer = served.openai.completions.create(
        model="shop", prompt=both, max_tokens=8, temperature=0
    )
    expected = alone(served, ids, "shop", 8)
    assert [choice.text for choice in answer.choices] == [expected, expected]
    for prompt in ("hello", ids, ["hello"], [ids]):
        reply = served.complete(prompt=prompt, max_tokens=8).json()
        assert [choice["text"] for choice in reply["choices"]] == [expected]


def test_a_completion_has_sixteen_tokens_unless_told_otherwise(served: Running) -> None:
    body = {"model": "shop", "prompt": "hello", "temperature": 0}
    reply = served.post("/v1/completions", body).json()
    assert reply["usage"]["completion_tokens"] == 16


def test_choices_of_several_prompts_are_numbered_prompt_by_prompt(served: Running) -> None:
    reply = served.complete(prompt=["one", "two"], n=2, temperature=0).json()
    texts = [choice["text"] for choice in reply["choices"]]
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    assert texts[0] == texts[1] != texts[2] == texts[3]
    tokens = [len(served.engine.tokenizer(text)["input_ids"]) for text in ("one", "two")]
    assert reply["usage"]["prompt_tokens"] == sum(tokens)


def test_a_streamed_completion_has_the_same_logprobs_and_offsets(served: Running) -> None:
    asked: dict[str, Any] = {"model": "shop", "prompt": "hello", "max_tokens": 8, "logprobs": 2}
    asked["seed"] = 1
    whole = served.openai.completions.create(**asked).choices[0]
    chunks = list(served.openai.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text
    assert whole.logprobs is not None
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        parts = [chunk.choices[0].logprobs for chunk in chunks]
        joined = [value for part in parts if part for value in getattr(part, name) or []]
        assert joined == getattr(whole.logprobs, name)
        assert len(joined) == 8


def test_a_stop_text_ends_an_answer_and_is_no_part_of_it(served: Running) -> None:
    asked: dict[str, Any] = {"prompt": "hello", "max_tokens": 30, "seed": 2, "temperature": 1}
    text = served.complete(**asked).json()["choices"][0]["text"]
    stop = next(c for c in text[3:] if c.isascii() and c.isprintable())
    ended = served.complete(**asked, stop=[stop, "never"]).json()["choices"][0]
    assert ended["text"] == text[: text.index(stop)]
    assert ended["finish_reason"] == "stop"


def test_vllms_sampling_fields_change_the_choice_of_tokens(served: Running) -> None:
    greedy = served.complete(max_tokens=12).json()["choices"][0]["text"]
    for narrow in ({"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-6}):
        sampled = served.complete(max_tokens=12, temperature=1.5, seed=5, **narrow).json()
        assert sampled["choices"][0]["text"] == greedy
    wide = served.complete(max_tokens=12, temperature=1.5, seed=5, top_k=-1).json()
    assert wide["choices"][0]["text"] != greedy
    penalised = served.complete(prompt="a", max_tokens=40, repetition_penalty=50.0).json()
    text = penalised["choices"][0]["text"]
    assert text != served.complete(prompt="a", max_tokens=40).json()["choices"][0]["text"]


def test_what_changes_no_answer_is_accepted(served: Running) -> None:
    plain = served.complete().json()["choices"]
    harmless = {
        "user": "someone",
        "metadata": {"a": "b"},
        "store": True,
        "logit_bias": {},
        "suffix": None,
        "echo": False,
        "best_of": 1,
        "n": None,
        "stop": None,
    }
    assert served.complete(**harmless).json()["choices"] == plain


def test_messages_in_all_their_forms_reach_the_template(served: Running) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    forms: list[list[dict[str, Any]]] = [
        [{"role": "user", "content": parts}],
        [{"role": "developer", "content": "be brief"}, {"role": "user", "content": "hello"}],
        [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "f()"},
            {"role": "tool", "content": "1", "tool_call_id": "call00001"},
        ],
    ]
    texts = []
    for messages in forms:
        body = {"model": "shop", "messages": messages, "max_tokens": 6, "temperature": 0}
        reply = served.post("/v1/chat/completions", body)
        assert reply.status_code == 200, reply.text
        texts.append(reply.json()["choices"][0]["message"]["content"])
    prompt = prompt_tokens(HELLO, served.engine.tokenizer)
    assert texts[0] == alone(served, prompt, "shop", 6)
    system = [{"role": "system", "content": "be brief"}, *HELLO]
    prompt = prompt_tokens(system, served.engine.tokenizer)
    assert texts[1] == alone(served, prompt, "shop", 6)


def test_an_earlier_answer_can_be_sent_back_as_the_client_has_it(served: Running) -> None:
    asked: dict[str, Any] = {"model": "shop", "max_tokens": 4, "temperature": 0}
    first = served.openai.chat.completions.create(messages=HELLO, **asked)
    again: list[Any] = [*HELLO, first.choices[0].message, *HELLO]
    second = served.openai.chat.completions.create(messages=again, **asked)
    assert second.choices[0].finish_reason == "length"


def test_models_are_the_base_and_its_adapters(served: Running) -> None:
    base = served.engine.model_name
    cards = served.openai.models.list().data
    assert [(card.id, card.parent) for card in cards] == [  # type: ignore[attr-defined]
        (base, None),
        ("shop", base),
        ("poet", base),
    ]
    shop = served.http.get("/v1/models/shop").json()
    assert shop["root"].endswith("/adapters/shop")
    assert shop["max_model_len"] == served.engine.context_length == 4096
    assert served.openai.models.retrieve("poet").id == "poet"
    assert served.http.get(f"/v1/models/{base}").json()["id"] == base


def test_figures_count_requests_and_tokens(served: Running) -> None:
    names = ("lorakit_prompt_tokens_total", "lorakit_generated_tokens_total")
    ok = 'lorakit_requests_total{route="/v1/completions",status="200"}'
    before = [served.figure(name) for name in (*names, ok)]
    first = served.figure("lorakit_time_to_first_token_seconds_count")
    between = served.figure("lorakit_time_between_tokens_seconds_count")
    usage = served.complete(max_tokens=6).json()["usage"]
    after = [served.figure(name) for name in (*names, ok)]
    grown = [new - old for new, old in zip(after, before, strict=True)]
    assert grown == [usage["prompt_tokens"], 6, 1]
    assert served.figure("lorakit_time_to_first_token_seconds_count") == first + 1
    assert served.figure("lorakit_time_between_tokens_seconds_count") > between
    assert served.figure("lorakit_adapters_loaded") == 2


def test_tokens_that_were_computed_for_earlier_requests_are_told(served: Running) -> None:
    names = ("lorakit_prefix_cache_queries_total", "lorakit_prefix_cache_hits_total")

    def asked(prompt: str, **fields: Any) -> list[int]:
        before = [served.figure(name) for name in names]
        usage = served.complete(prompt=prompt, max_tokens=3, **fields).json()["usage"]
        grown = [int(served.figure(name) - old) for name, old in zip(names, before, strict=True)]
        return [usage["prompt_tokens_details"]["cached_tokens"], *grown]

    first = "what prompts begin with is computed once for each adapter; "
    size = len(first)  # the tokenizer's tokens are bytes
    assert asked(first, model="shop") == [0, size, 0]
    assert asked(first, model="shop") == [size, size, size]
    assert asked(first + "more", model="shop") == [size, size + 4, size]
    assert asked(first, model="poet") == [0, size, 0]
    assert asked(first, model="shop", cache_salt="secret") == [0, size, 0]
    assert asked(first, model="shop", cache_salt="secret") == [size, size, size]
    # Answers to one prompt read it once, and it counts as computed.
    several = first.upper()
    assert asked(several, model="shop", n=3) == [0, 3 * size, 2 * size]
    assert served.figure("lorakit_prefix_cache_bytes") > 0


def test_health_is_told_without_a_word_of_the_models(served: Running) -> None:
    assert served.http.get("/health").json() == {"status": "ok"}


def test_every_reply_is_utf8_and_json(served: Running) -> None:
    replies = [served.complete(temperature=2, seed=seed, max_tokens=20) for seed in range(8)]
    for reply in replies:
        json.loads(reply.content.decode())
