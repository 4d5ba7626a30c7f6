"""Requests that cannot be answered: each gets its status and OpenAI's form of an error."""

import json
from typing import Any

import openai
import pytest

from served import Running, refused

HELLO = [{"role": "user", "content": "hello"}]
CHAT = {"model": "shop", "messages": HELLO, "max_tokens": 2}
TEXT = {"model": "shop", "prompt": "a", "max_tokens": 2}
CHATS, TEXTS = "/v1/chat/completions", "/v1/completions"


UNSUPPORTED: list[tuple[str, Any]] = [
    ("suffix", "x"),
    ("stream_options", {"include_obfuscation": True}),
]
UNSUPPORTED_IN_CHATS: list[tuple[str, Any]] = [
    ("response_format", {"type": "json_schema", "json_schema": {}}),
    ("tool_choice", "required"),
    ("tool_choice", {"type": "function", "function": {"name": "f"}}),
    ("modalities", ["text", "audio"]),
    ("audio", {"voice": "alloy", "format": "wav"}),
    ("functions", [{"name": "f"}]),
    ("function_call", "auto"),
    ("reasoning_effort", "low"),
    ("verbosity", "low"),
    ("web_search_options", {}),
    ("prediction", {"type": "content", "content": "a"}),
]


@pytest.mark.parametrize(("field", "value"), UNSUPPORTED)
def test_what_cannot_be_done_for_a_text_is_named(served: Running, field: str, value: Any) -> None:
    error = refused(served.post(TEXTS, {**TEXT, "stream": True, field: value}), 400)
    assert error["param"].split(".")[0] == field
    assert error["code"].startswith("unsupported_")
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(("field", "value"), UNSUPPORTED_IN_CHATS)
def test_what_cannot_be_done_for_a_chat_is_named(served: Running, field: str, value: Any) -> None:
    error = refused(served.post(CHATS, {**CHAT, field: value}), 400)
    assert field in error["message"]
    assert error["param"].split(".")[0].split("[")[0] == field


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"model": None}, "model"),
    ({"model": 5}, "model"),
    ({"model": ""}, "model"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt[0]"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt[1]"),
    ({"prompt": [-1]}, "prompt[0]"),
    ({"prompt": [2**40]}, "prompt[0]"),
    ({"prompt": [100_000]}, "prompt"),
    ({"prompt": ["a"] * 200}, "prompt"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": 10**400}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 0.5}, "seed"),
    ({"n": 0}, "n"),
    ({"n": 1000}, "n"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop[1]"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": 21}, "logprobs"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"best_of": 1, "n": 2}, "best_of"),
    ({"best_of": 2, "stream": True}, "best_of"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"logit_bias": {"9999": 1}}, "logit_bias"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"stopp": "a"}, "stopp"),
    ({"lora_path": "/etc"}, "lora_path"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG)
def test_a_wrong_value_is_refused_and_its_field_named(
    served: Running, fields: dict[str, Any], param: str
) -> None:
    error = refused(served.post(TEXTS, {**TEXT, **fields}), 400)
    assert error["param"] == param or param in error["message"]
    assert param.split("[")[0] in error["message"]


WRONG_MESSAGES: list[tuple[list[Any], str]] = [
    ([], "messages"),
    (["hello"], "messages[0]"),
    ([{"content": "a"}], "messages[0].role"),
    ([{"role": "user"}], "messages[0]"),
    ([{"role": "user", "content": None}], "messages[0]"),
    ([{"role": "robot", "content": "a"}], "messages[0].role"),
    ([*HELLO, {"role": "user", "content": 5}], "messages[1].content"),
    ([{"role": "user", "content": "a", "tool_calls": [{}]}], "messages[0].tool_calls[0].function"),
    (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        "messages[0].content[0]",
    ),
]


@pytest.mark.parametrize(("messages", "param"), WRONG_MESSAGES)
def test_a_wrong_message_is_refused_and_its_place_named(
    served: Running, messages: list[Any], param: str
) -> None:
    error = refused(served.post(CHATS, {**CHAT, "messages": messages}), 400)
    assert error["param"].startswith(param)


def test_fields_that_contradict_each_other_are_refused(served: Running) -> None:
    both = {**CHAT, "max_completion_tokens": 4}
    assert "not both" in refused(served.post(CHATS, both), 400)["message"]
    alone = {**CHAT, "top_logprobs": 2}
    assert "logprobs: true" in refused(served.post(CHATS, alone), 400)["message"]


def test_a_field_is_missing_in_openais_words(served: Running) -> None:
    error = refused(served.post(TEXTS, {"prompt": "a"}), 400)
    assert (error["param"], error["code"]) == ("model", "missing_required_parameter")
    error = refused(served.post(TEXTS, {**TEXT, "temprature": 1}), 400)
    assert error["code"] == "unknown_parameter"
    assert "did you mean 'temperature'" in error["message"]


BODIES: list[tuple[bytes, str]] = [
    (b"", "JSON object"),
    (b"null", "JSON object"),
    (b"[]", "object"),
    (b"5", "object"),
    (b"{", "not JSON"),
    (b'{"model": "shop",}', "not JSON"),
    (b'{"model": "shop"} {}', "not JSON"),
    (b'{"model": "shop", "model": "poet", "prompt": "a"}', "twice"),
    (b'{"model": "shop", "prompt": "a", "temperature": NaN}', "NaN"),
    (b'{"model": "shop", "prompt": "a", "temperature": Infinity}', "Infinity"),
    (b'{"model": "shop", "prompt": "a", "temperature": -Infinity}', "Infinity"),
    (b'{"model": "shop", "prompt": "a", "temperature": 1e999}', "too large"),
    (b'{"model": "shop", "prompt": "a", "seed": ' + b"9" * 5000 + b"}", "JSON"),
    (b'{"model": "shop", "prompt": "\xff\xfe"}', "UTF-8"),
    (b'{"model": "shop", "prompt": "\\ud800"}', "surrogate"),
    (b'{"model": "shop", "prompt": "a", "metadata": {"\\udfff": 1}}', "surrogate"),
    (b'{"a":' * 100_000, "nested too deeply"),
    ('{"model": "shop"}'.encode("utf-16"), "UTF-8"),
]


@pytest.mark.parametrize(("body", "word"), BODIES)
def test_a_body_that_is_no_json_object_is_refused(served: Running, body: bytes, word: str) -> None:
    json_type = {"content-type": "application/json"}
    error = refused(served.http.post(TEXTS, content=body, headers=json_type), 400)
    assert word in error["message"]


def test_a_body_of_another_type_is_refused(served: Running) -> None:
    error = refused(served.http.post(TEXTS, content=json.dumps(TEXT)), 400)
    assert "content-type: application/json" in error["message"]
    refused(served.http.post(TEXTS, data={"model": "shop"}), 400)


def test_characters_beyond_the_bmp_are_no_lone_surrogates(served: Running) -> None:
    body = b'{"model": "shop", "prompt": "\\ud83d\\ude00", "max_tokens": 2}'
    json_type = {"content-type": "application/json"}
    assert served.http.post(TEXTS, content=body, headers=json_type).status_code == 200


@pytest.mark.parametrize("name", ["shopp", "../shop", "shop\u0000", "a" * 4096, "\u202eshop", "%"])
def test_an_unknown_model_is_not_found(served: Running, name: str) -> None:
    error = refused(served.post(TEXTS, {**TEXT, "model": name}), 404)
    assert error["code"] == "model_not_found"
    assert error["param"] == "model"
    with pytest.raises(openai.NotFoundError):
        served.openai.completions.create(model=name, prompt="a")


def test_an_unknown_model_is_told_with_the_nearest(served: Running) -> None:
    assert "did you mean 'shop'" in refused(served.http.get("/v1/models/shp"), 404)["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_longer_than_the_context_is_refused_in_openais_words(
    served: Running, stream: bool
) -> None:
    for fields in ({"prompt": "a" * 5000}, {"prompt": [5] * 4096}, {"max_tokens": 5000}):
        error = refused(served.post(TEXTS, {**TEXT, **fields, "stream": stream}), 400)
        assert error["code"] == "context_length_exceeded"
        assert "4096 tokens" in error["message"]
    messages = [{"role": "user", "content": "a" * 5000}]
    with pytest.raises(openai.BadRequestError) as caught:
        served.openai.chat.completions.create(model="shop", messages=messages)  # type: ignore[arg-type]
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_a_limit_that_the_context_cannot_hold_is_named_as_the_cause(
    served: Running, field: str
) -> None:
    error = refused(served.post(CHATS, {"model": "shop", "messages": HELLO, field: 5000}), 400)
    assert (error["param"], error["code"]) == (field, "context_length_exceeded")
    prompt = served.post(CHATS, CHAT).json()["usage"]["prompt_tokens"]
    for number in (5000, 4096, prompt, 4096 - prompt):  # given, the context, taken, left
        assert str(number) in error["message"]
    asked = {"model": "shop", "messages": HELLO, field: 4096 - prompt + 1}
    assert refused(served.post(CHATS, asked), 400)["param"] == field


@pytest.mark.parametrize("size", [4096, 5000, 1_000_000])
def test_a_prompt_that_the_context_cannot_hold_is_named_as_the_cause(
    served: Running, size: int
) -> None:
    messages = [{"role": "user", "content": "a" * size}]
    prompts: list[Any] = ["a" * size, [5] * size]
    for path, fields, param in (
        (CHATS, {"messages": messages}, "messages"),
        *((TEXTS, {"prompt": prompt}, "prompt") for prompt in prompts),
    ):
        for limit in ({}, {"max_tokens": 5000}):
            error = refused(served.post(path, {"model": "shop", **fields, **limit}), 400)
            assert (error["param"], error["code"]) == (param, "context_length_exceeded")


def test_a_limit_that_nobody_asked_for_is_cut_to_what_fits(served: Running) -> None:
    reply = served.post(TEXTS, {"model": "shop", "prompt": [5] * 4090, "temperature": 0}).json()
    assert reply["usage"]["completion_tokens"] == 6
    assert reply["choices"][0]["finish_reason"] == "length"


def test_what_the_template_refuses_is_a_bad_request(served: Running) -> None:
    template = served.engine.tokenizer.chat_template
    served.engine.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    try:
        error = refused(served.post(CHATS, {**CHAT, "model": served.engine.model_name}), 400)
    finally:
        served.engine.tokenizer.chat_template = template
    assert "roles must alternate" in error["message"]


def test_paths_and_methods_that_are_not_there(served: Running) -> None:
    for path in (
        "/nope",
        "/v1/",
        "/v1/completions/",
        "/docs",
        "/v1/audio/speech",
        "/page/no",
        "/%00",
    ):
        refused(served.http.get(path), 404)
    response = served.http.get(TEXTS)
    assert "Allow" in response.headers
    refused(response, 405)
    refused(served.http.delete("/v1/models"), 405)
    refused(served.http.request("BREW", "/health"), 405)


def test_after_all_of_it_the_server_answers(served: Running) -> None:
    assert served.complete().status_code == 200
