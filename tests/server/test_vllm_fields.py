"""Fields of vLLM beside OpenAI's: where an answer ends, what is read, what is shown."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from served import Running, refused

CHATS, TEXTS = "/v1/chat/completions", "/v1/completions"
ASKS = {"role": "user", "content": "a"}
TEMPLATES = Path(__file__).parents[1] / "data" / "templates"


def ids(server: Running, text: str) -> list[int]:
    return list(server.engine.tokenizer(text, add_special_tokens=False)["input_ids"])


def choice(response: Any) -> Any:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


@pytest.fixture
def end(served: Running) -> int:
    return int(served.engine.tokenizer.eos_token_id)


def test_an_end_token_ends_an_answer_unless_it_is_ignored(served: Running, end: int) -> None:
    bias = {"logit_bias": {str(end): 100}, "max_tokens": 6}
    ended = served.complete(**bias).json()
    assert (ended["choices"][0]["text"], ended["usage"]["completion_tokens"]) == ("", 1)
    assert ended["choices"][0]["finish_reason"] == "stop"
    ignored = served.complete(**bias, ignore_eos=True).json()
    assert ignored["usage"]["completion_tokens"] == 6
    assert ignored["choices"][0]["finish_reason"] == "length"
    form = served.complete(guided_choice=["ab"], ignore_eos=True, max_tokens=9)
    assert choice(form)["text"] == "ab"


def test_no_end_before_the_least_number_of_tokens(served: Running, end: int) -> None:
    bias = {str(end): 100, str(ids(served, "x")[0]): 50}
    late = served.complete(logit_bias=bias, min_tokens=3, max_tokens=9).json()
    assert late["choices"][0]["text"] == "xxx"
    assert late["usage"]["completion_tokens"] == 4
    x = {"logit_bias": {str(ids(served, "x")[0]): 100}, "max_tokens": 8}
    assert choice(served.complete(**x, stop=["xx"], min_tokens=5))["text"] == "xxxxx"
    stopped = served.complete(**x, stop_token_ids=ids(served, "x"), min_tokens=2).json()
    assert stopped["choices"][0]["text"] != ""
    assert stopped["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("stream", [False, True])
def test_stop_texts_and_stop_tokens_are_shown_if_asked_for(served: Running, stream: bool) -> None:
    def text(**fields: Any) -> tuple[str, str]:
        asked: Any = {"model": "shop", "prompt": "a", "max_tokens": 5, "stream": stream}
        extra = {"guided_choice": ["abcab"], **fields}
        made = served.openai.completions.create(**asked, extra_body=extra)
        choices = [e.choices[0] for e in made] if stream else made.choices
        return "".join(c.text for c in choices), str(choices[-1].finish_reason)

    assert text(stop=["bc"]) == ("a", "stop")
    assert text(stop=["bc"], include_stop_str_in_output=True) == ("abc", "stop")
    c = {"stop_token_ids": ids(served, "c")}
    assert text(**c) == ("ab", "stop")
    assert text(**c, include_stop_str_in_output=True) == ("abc", "stop")


def test_names_of_special_tokens_are_shown_if_asked_for(served: Running) -> None:
    tokenizer = served.engine.tokenizer
    special = next(t for t in tokenizer.all_special_ids if t != tokenizer.eos_token_id)
    name = tokenizer.decode([special])
    fields: Any = {"logit_bias": {str(special): 100}, "max_tokens": 2}
    assert choice(served.complete(**fields))["text"] == ""
    assert choice(served.complete(**fields, skip_special_tokens=False))["text"] == name * 2
    chat = {"model": "shop", "messages": [ASKS], **fields}
    assert choice(served.post(CHATS, chat))["message"]["content"] == ""
    shown = served.post(CHATS, {**chat, "skip_special_tokens": False})
    assert choice(shown)["message"]["content"] == name * 2


def test_only_allowed_tokens_are_chosen(served: Running) -> None:
    allowed = ids(served, "abc")
    for seed in range(3):
        fields: Any = {"allowed_token_ids": allowed, "temperature": 2, "seed": seed}
        assert set(choice(served.complete(**fields, max_tokens=8))["text"]) <= set("abc")
    none = served.complete(allowed_token_ids=allowed, guided_choice=["xyz"])
    assert refused(none, 400)["code"] == "invalid_value"


def test_the_log_probabilities_of_a_prompt_stand_in_the_reply(served: Running) -> None:
    tokens = ids(served, "hello you")
    expected = served.engine.score_prompt(tokens, "shop").result().logprobs
    for rivals in (0, 3, 20):
        reply = served.complete(prompt=tokens, prompt_logprobs=rivals)
        [first, *rest] = choice(reply)["prompt_logprobs"]
        assert first is None
        for token, value, found in zip(tokens[1:], expected[1:], rest, strict=True):
            own = found[str(token)]
            assert own["logprob"] == pytest.approx(value, abs=1e-5)
            assert own["decoded_token"] == served.engine.tokenizer.decode([token])
            assert len(found) == max(rivals, own["rank"] > rivals and rivals + 1)
            better = [one for one in found.values() if one["logprob"] > own["logprob"]]
            assert own["rank"] >= len(better) + 1
            assert own["rank"] == len(better) + 1 or own["rank"] > rivals
    chat = {"model": "shop", "messages": [ASKS], "max_tokens": 1}
    whole = served.post(CHATS, {**chat, "prompt_logprobs": 1}).json()
    assert len(whole["prompt_logprobs"]) == whole["usage"]["prompt_tokens"]
    echoed = served.complete(prompt="ab", echo=True, max_tokens=0, prompt_logprobs=1)
    assert len(choice(echoed)["prompt_logprobs"]) == 2


def test_a_prompt_is_cut_from_its_beginning(served: Running) -> None:
    long, last = "x" * 5000 + "hello", ids(served, "hello")
    whole = served.complete(prompt=last, logprobs=0)
    cut = served.complete(prompt=long, logprobs=0, truncate_prompt_tokens=5)
    assert cut.json()["choices"] == whole.json()["choices"]
    assert cut.json()["usage"]["prompt_tokens"] == 5
    fits = served.complete(prompt=long, truncate_prompt_tokens=-1).json()["usage"]
    assert fits["prompt_tokens"] == served.engine.context_length - 4
    body = {"model": "shop", "messages": [{**ASKS, "content": long}], "max_tokens": 2}
    chat = served.post(CHATS, {**body, "truncate_prompt_tokens": 30}).json()
    assert chat["usage"]["prompt_tokens"] == 30
    over = served.complete(prompt=long, truncate_prompt_tokens=4999)
    assert refused(over, 400)["code"] == "context_length_exceeded"
    short = {"model": "shop", "input": "hello"}
    vector = served.post("/v1/embeddings", short).json()["data"]
    cut = served.post("/v1/embeddings", {**short, "input": long, "truncate_prompt_tokens": 5})
    assert cut.json()["data"] == vector


@pytest.fixture
def tokens_of(served: Running) -> Iterator[Callable[..., str]]:
    """The text of a conversation's prompt, with a family's template."""
    tokenizer = served.engine.tokenizer
    own = tokenizer.chat_template

    def ask(template: str, messages: list[Any], **fields: Any) -> str:
        tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text()
        body = {"model": served.engine.model_name, "messages": messages, **fields}
        reply = served.post("/tokenize", body)
        assert reply.status_code == 200, reply.text
        return str(tokenizer.decode(reply.json()["tokens"]))

    yield ask
    tokenizer.chat_template = own


@pytest.mark.parametrize("template", ["chatml", "llama3", "qwen3", "glm45", "gemma"])
def test_the_last_message_is_gone_on_with_as_transformers_does(
    served: Running, tokens_of: Callable[..., str], template: str
) -> None:
    messages = [ASKS, {"role": "assistant", "content": "It is so"}]
    made = tokens_of(template, messages, continue_final_message=True)
    expected = served.engine.tokenizer.apply_chat_template(
        messages, continue_final_message=True, tokenize=False
    )
    assert made == expected
    assert made.endswith("It is so")
    asked = tokens_of(template, messages[:1])
    assert tokens_of(template, messages[:1], add_generation_prompt=False) != asked


def test_reasoning_is_gone_on_with_where_it_is(tokens_of: Callable[..., str]) -> None:
    messages = [ASKS, {"role": "assistant", "content": "<think>\nWell, "}]
    made = tokens_of("qwen3", messages, continue_final_message=True)
    assert made.endswith("<|im_start|>assistant\n<think>\nWell, ")
    assert made.count("<think>") == 1


def test_an_answer_that_is_gone_on_with_is_what_is_new(served: Running) -> None:
    messages = [ASKS, {"role": "assistant", "content": "ab"}]
    body = {"model": "shop", "messages": messages, "max_tokens": 3, "temperature": 0}
    made = served.post(
        CHATS, {**body, "continue_final_message": True, "add_generation_prompt": False}
    )
    tokenizer = served.engine.tokenizer
    text = tokenizer.apply_chat_template(messages, continue_final_message=True, tokenize=False)
    alone = served.complete(prompt=text, add_special_tokens=False, max_tokens=3)
    assert choice(made)["message"]["content"] == choice(alone)["text"]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"min_tokens": 9, "max_tokens": 3}, ""),
    ({"min_tokens": 2, "guided_regex": "a"}, ""),
    ({"stop_token_ids": [10**6]}, "stop_token_ids"),
    ({"allowed_token_ids": [10**6]}, "allowed_token_ids"),
    ({"allowed_token_ids": []}, "allowed_token_ids"),
    ({"prompt_logprobs": 1, "stream": True}, ""),
    ({"prompt_logprobs": -1}, "prompt_logprobs"),
    ({"truncate_prompt_tokens": 0}, ""),
    ({"continue_final_message": True}, ""),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"length_penalty": 2.0}, "length_penalty"),
    ({"bad_words": ["x"]}, "bad_words"),
    ({"return_token_ids": True}, "return_token_ids"),
    ({"echo": True}, "echo"),
    ({"chat_template": "x"}, "chat_template"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=[next(iter(f)) for f, _ in REFUSED])
def test_what_cannot_be_done_is_refused_by_name(
    served: Running, fields: dict[str, Any], param: str
) -> None:
    body = {"model": "shop", "messages": [ASKS], "max_tokens": 3, **fields}
    error = refused(served.post(CHATS, body), 400)
    assert error["param"] == (param or None)
    assert next(iter(fields)) in error["message"]
