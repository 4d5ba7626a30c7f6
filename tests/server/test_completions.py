"""Plain texts: biases, the likeliest of several, prompts with their log-probabilities, tokens."""

from typing import Any

import pytest

from served import Running, refused


def test_a_bias_makes_a_token_certain_or_impossible(served: Running) -> None:
    tokenizer = served.engine.tokenizer
    [x] = tokenizer("x", add_special_tokens=False)["input_ids"]
    always = served.complete(logit_bias={str(x): 100}).json()
    assert always["choices"][0]["text"] == "xxxx"
    plain = served.complete(model="poet", logprobs=0).json()["choices"][0]
    [first] = tokenizer(plain["text"], add_special_tokens=False)["input_ids"][:1]
    never = served.complete(model="poet", logit_bias={str(first): -100}, logprobs=0).json()
    [other] = never["choices"]
    assert other["logprobs"]["tokens"][0] != plain["logprobs"]["tokens"][0]
    chat = {"model": "shop", "messages": [{"role": "user", "content": "a"}], "max_tokens": 3}
    reply = served.openai.chat.completions.create(**chat, logit_bias={str(x): 100})  # type: ignore[call-overload]
    assert reply.choices[0].message.content == "xxx"


def test_the_best_of_several_are_the_likeliest(served: Running) -> None:
    settings: Any = {"temperature": 1, "seed": 7, "logprobs": 0, "max_tokens": 6}
    prompts = ["a", "bc"]
    every = served.complete(prompt=prompts, n=4, **settings).json()["choices"]
    best = served.complete(prompt=prompts, n=2, best_of=4, **settings).json()

    def likelihood(choice: Any) -> float:
        values = choice["logprobs"]["token_logprobs"]
        return sum(values) / len(values)

    for number in range(2):
        own = sorted(every[number * 4 : number * 4 + 4], key=likelihood, reverse=True)[:2]
        found = best["choices"][number * 2 : number * 2 + 2]
        assert [one["text"] for one in found] == [one["text"] for one in own]
    assert [one["index"] for one in best["choices"]] == [0, 1, 2, 3]
    assert best["usage"]["completion_tokens"] == 2 * 4 * 6
    bare = served.complete(prompt="a", best_of=3, temperature=1, seed=7).json()["choices"]
    assert [one["logprobs"] for one in bare] == [None]


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_is_echoed_with_its_log_probabilities(served: Running, stream: bool) -> None:
    prompt = "hello you"
    asked: Any = {"model": "shop", "max_tokens": 2, "temperature": 0, "logprobs": 1}
    made = served.openai.completions.create(prompt=prompt, echo=True, stream=stream, **asked)
    choices = [event.choices[0] for event in made] if stream else made.choices
    text = "".join(choice.text for choice in choices)
    assert text.startswith(prompt)
    values = [one for choice in choices for one in choice.logprobs.token_logprobs]
    offsets = [one for choice in choices for one in choice.logprobs.text_offset]
    assert len(values) == len(prompt) + 2
    assert values[0] is None
    assert offsets == list(range(len(prompt) + 2))
    ids = served.engine.tokenizer(prompt)["input_ids"]
    expected = served.engine.score_prompt(ids, "shop").result().logprobs
    assert values[1 : len(prompt)] == pytest.approx(expected[1:], abs=1e-5)
    alone = served.openai.completions.create(prompt=prompt, echo=True, **{**asked, "max_tokens": 0})
    assert alone.choices[0].text == prompt
    assert alone.choices[0].logprobs.token_logprobs[1:] == pytest.approx(expected[1:], abs=1e-5)
    assert alone.usage.completion_tokens == 0


def test_texts_and_conversations_are_tokenized_and_back(served: Running) -> None:
    text = "größe <|im_end|>"
    made = served.post("/tokenize", {"model": "shop", "prompt": text, "return_token_strs": True})
    tokens = made.json()["tokens"]
    assert tokens == served.engine.tokenizer(text)["input_ids"]
    assert made.json()["count"] == len(tokens) == len(made.json()["token_strs"])
    back = served.post("/detokenize", {"model": "shop", "tokens": tokens}).json()
    assert back == {"prompt": text}
    messages = [{"role": "user", "content": "a"}]
    chat = served.post("/tokenize", {"model": "shop", "messages": messages}).json()
    body = {"model": "shop", "messages": messages, "max_tokens": 1}
    usage = served.post("/v1/chat/completions", body)
    assert chat["count"] == usage.json()["usage"]["prompt_tokens"]
    refused(served.post("/tokenize", {"model": "shop"}), 400)
    refused(served.post("/tokenize", {"model": "nobody", "prompt": "a"}), 404)
    refused(served.post("/detokenize", {"model": "shop", "tokens": [999999]}), 400)
