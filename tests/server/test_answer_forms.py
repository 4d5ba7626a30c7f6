"""Answers of a given form: JSON of a schema, regular expressions, choices and grammars."""

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from served import Running, in_background, refused
from written_schemas import written_schema

CHATS, TEXTS = "/v1/chat/completions", "/v1/completions"
ASKS: list[Any] = [{"role": "user", "content": "a"}]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["a", "b"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


def schema_format(schema: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, **fields}}


def answer(server: Running, **fields: Any) -> Any:
    body = {"model": "shop", "messages": ASKS, "max_tokens": 400, "temperature": 1, "seed": 1}
    reply = server.post(CHATS, {**body, **fields})
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]


def text(server: Running, **fields: Any) -> str:
    choice = answer(server, **fields)
    assert choice["finish_reason"] == "stop"
    return str(choice["message"]["content"])


def valid(server: Running, seed: int) -> None:
    schema = written_schema(seed)
    made = text(server, response_format=schema_format(schema), seed=seed, max_tokens=1500)
    jsonschema.validate(json.loads(made), schema, jsonschema.Draft202012Validator)


@pytest.mark.parametrize("seed", range(24))
def test_every_answer_follows_its_schema(served: Running, seed: int) -> None:
    valid(served, seed)


@pytest.mark.exhaustive
def test_a_thousand_answers_follow_their_schemas(served: Running) -> None:
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda seed: valid(served, seed), range(1000)))


class Person(BaseModel):
    name: str = Field(max_length=6)
    kind: Literal["a", "b"]
    sizes: list[bool] = Field(max_length=2)


def test_the_client_parses_what_it_asks_for(served: Running) -> None:
    asked: Any = {"model": "shop", "messages": ASKS, "seed": 3, "max_tokens": 300}
    chats = served.openai.chat.completions
    reply = chats.parse(response_format=Person, **asked)
    assert isinstance(reply.choices[0].message.parsed, Person)
    with chats.stream(response_format=Person, **asked) as stream:
        for _ in stream:
            pass
        streamed = stream.get_final_completion()
    assert streamed.choices[0].message.parsed == reply.choices[0].message.parsed


def test_an_answer_that_is_cut_has_the_reason_length(served: Running) -> None:
    choice = answer(served, response_format=schema_format(PERSON), max_tokens=5)
    assert choice["finish_reason"] == "length"
    with pytest.raises(openai.LengthFinishReasonError):
        served.openai.chat.completions.parse(
            model="shop", messages=ASKS, response_format=Person, max_tokens=5
        )


FORMS: list[tuple[dict[str, Any], str]] = [
    ({"structured_outputs": {"regex": r"\d{3}-[a-z]+!"}}, r"\d{3}-[a-z]+!"),
    ({"guided_regex": r"(yes|no)\?"}, r"(yes|no)\?"),
    ({"structured_outputs": {"choice": ["left", "right"]}}, "left|right"),
    ({"guided_choice": ['a "b"', "ü\n"]}, 'a "b"|ü\n'),
    ({"structured_outputs": {"grammar": 'root ::= "a" [0-9] "b"'}}, "a[0-9]b"),
    ({"guided_grammar": 'start: "x" DIGIT\nDIGIT: /[0-9]/'}, "x[0-9]"),
    ({"structured_outputs": {"json": {"enum": [1, 2]}}}, "1|2"),
    ({"guided_json": '{"enum": ["c"]}', "guided_decoding_backend": "xgrammar"}, '"c"'),
]


@pytest.mark.parametrize(("fields", "pattern"), FORMS, ids=[next(iter(f)) for f, _ in FORMS])
def test_the_names_of_vllm_give_an_answer_its_form(
    served: Running, fields: dict[str, Any], pattern: str
) -> None:
    assert re.fullmatch(pattern, text(served, **fields))
    body = {"model": "shop", "prompt": "a", "max_tokens": 50, **fields}
    reply = served.post(TEXTS, body).json()["choices"][0]
    if reply["finish_reason"] == "stop":  # [a-z]+ may be long
        assert re.fullmatch(pattern, reply["text"])


def test_any_json_object_is_a_form(served: Running) -> None:
    choice = answer(served, response_format={"type": "json_object"}, max_tokens=300, seed=2)
    assert choice["message"]["content"].startswith("{")
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(choice["message"]["content"]), dict)


def test_other_settings_go_with_a_form(served: Running) -> None:
    form = {"response_format": schema_format(PERSON)}
    body = {"model": "shop", "messages": ASKS, "max_tokens": 400, **form}
    settings = {"n": 3, "seed": 5, "top_p": 0.9, "frequency_penalty": 0.5, "top_k": 40}
    more = {"repetition_penalty": 1.1, "logprobs": True, "top_logprobs": 2}
    reply = served.post(CHATS, {**body, **settings, **more}).json()
    for choice in reply["choices"]:
        jsonschema.validate(json.loads(choice["message"]["content"]), PERSON)
        tokens = choice["logprobs"]["content"]  # of bytes
        assert len(tokens) >= len(choice["message"]["content"].encode())
        assert len(tokens[0]["top_logprobs"]) == 2
    again = served.post(CHATS, {**body, **settings, **more, "seed": 6, "n": 1}).json()
    made = again["choices"][0]["message"]["content"]
    assert made == reply["choices"][1]["message"]["content"]
    cut = served.post(CHATS, {**body, "temperature": 0, "stop": ['"name']}).json()
    assert cut["choices"][0]["message"]["content"].strip() in ("{", "{\n")


def test_rows_beside_a_form_answer_as_they_do_alone(served: Running) -> None:
    def plain(seed: int) -> Any:
        settings = {"seed": seed, "temperature": 1, "max_tokens": 40, "logprobs": 2}
        return served.complete(model=("shop", "poet")[seed % 2], **settings).json()["choices"]

    alone = [plain(seed) for seed in range(4)]
    with ThreadPoolExecutor(8) as threads:
        beside = [threads.submit(valid, served, seed) for seed in range(4)]
        together = list(threads.map(plain, range(4)))
        for one in beside:
            one.result()
    assert [c[0]["text"] for c in together] == [c[0]["text"] for c in alone]


REPORTED: dict[str, tuple[dict[str, Any], Any]] = {
    "a list of schemas for items, as in draft 7": (
        {"type": "array", "items": [{"enum": [1]}, {"enum": ["a"]}], "minItems": 2, "maxItems": 2},
        jsonschema.Draft7Validator,
    ),
    "an escape that is none": ({"type": "string", "pattern": "^hello\\!$"}, None),
    "an optional part": (
        {"type": "string", "pattern": r"^\d{4}-\d{2}(T\d{2})?$"},
        None,
    ),
    "many items": ({"type": "array", "items": {"enum": [1]}, "maxItems": 5000}, None),
    "null or a value": (
        {"type": "object", "properties": {"a": {"type": ["boolean", "null"]}}, "required": ["a"]},
        None,
    ),
    "a union of a union": (
        {"anyOf": [{"oneOf": [{"const": 1}, {"const": "b"}]}, {"type": "null"}]},
        None,
    ),
}
"""Schemas that were reported to crash, hang or pass by other servers."""


@pytest.mark.parametrize("case", REPORTED)
def test_schemas_that_others_stumble_over_are_followed(served: Running, case: str) -> None:
    schema, validator = REPORTED[case]
    choice = answer(served, response_format=schema_format(schema), seed=3, max_tokens=900)
    if choice["finish_reason"] == "stop":
        made = json.loads(choice["message"]["content"])
        (validator or jsonschema.Draft202012Validator)(schema).validate(made)
    assert text(served, guided_regex=r"^(a|b)$") in "ab"


NODE = {"type": "object", "properties": {"n": {"$ref": "#"}}, "required": ["n"]}
PRODUCT = {
    "allOf": [
        {"anyOf": [{"properties": {f"p{i}{j}": {"type": "string"}}} for j in range(8)]}
        for i in range(12)
    ]
}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"response_format": schema_format({"type": "strin"})}, "response_format"),
    ({"response_format": schema_format({"type": 5})}, "response_format"),
    ({"response_format": schema_format({"not": {"type": "string"}})}, "response_format"),
    (
        {"response_format": schema_format({"$ref": "#/$defs/nowhere"})},
        "response_format",
    ),
    ({"response_format": schema_format(PRODUCT)}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "json_object", "json_schema": {}}}, "response_format"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
    ({"structured_outputs": {"regex": "(?=a)b"}}, "structured_outputs.regex"),
    ({"structured_outputs": {"grammar": "start: nowhere"}}, "structured_outputs.grammar"),
    ({"guided_grammar": f"start: {'(' * 60_000}'a'{')' * 60_000}"}, "guided_grammar"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
    ({"guided_json": "[1"}, ""),
    ({"guided_json": {"type": "string"}, "guided_regex": "a"}, ""),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=range(len(REFUSED)))
def test_a_form_that_cannot_be_compiled_is_refused_by_name(
    served: Running, fields: dict[str, Any], param: str
) -> None:
    body = {"model": "shop", "messages": ASKS, "max_tokens": 5, **fields}
    error = refused(served.post(CHATS, body), 400)
    assert (error["param"] or "").startswith(param)
    assert error["type"] == "invalid_request_error"
    assert text(served, guided_choice=["fine"]) == "fine"


def test_a_schema_that_takes_long_to_compile_holds_up_nobody(served: Running) -> None:
    deep: dict[str, Any] = {"allOf": [*PRODUCT["allOf"], {"title": "another"}]}
    body = {"model": "shop", "messages": ASKS, "response_format": schema_format(deep)}
    known = schema_format(PERSON)
    text(served, response_format=known)
    with ThreadPoolExecutor(1) as threads:
        hostile = threads.submit(served.post, CHATS, body)
        began = time.monotonic()
        assert in_background(served, prompt="b")() == 200
        text(served, response_format=known)  # compiled before
        assert time.monotonic() - began < 2
        refused(hostile.result(), 400)


def test_endless_recursion_ends_with_the_tokens(served: Running) -> None:
    choice = answer(served, response_format=schema_format(NODE), max_tokens=60)
    assert choice["finish_reason"] == "length"


def test_a_grammar_that_cannot_go_on_is_the_requests_fault(served: Running) -> None:
    [a] = served.engine.tokenizer("a", add_special_tokens=False)["input_ids"]
    body = {"model": "shop", "prompt": "x", "guided_choice": ["ab"], "allowed_token_ids": [a]}
    assert refused(served.post(TEXTS, body), 400)["code"] == "invalid_value"
    streamed = served.post(TEXTS, {**body, "stream": True})
    error = json.loads(streamed.text.split("\n\n")[-3].removeprefix("data: "))["error"]
    assert error["type"] == "invalid_request_error"


BOXED = {
    "type": "object",
    "properties": {"a": {}},
    "required": ["a"],
    "additionalProperties": False,
}
ENDLESS: list[dict[str, Any]] = [{}, BOXED, {"type": "array", "maxItems": 2}, {"type": "integer"}]


@pytest.mark.parametrize("schema", ENDLESS, ids=range(len(ENDLESS)))
def test_a_number_ends_though_the_model_likes_nothing_but_digits(
    served: Running, schema: dict[str, Any]
) -> None:
    tokenizer: Any = served.engine.tokenizer
    liked = {str(tokenizer.convert_tokens_to_ids(one)): 100 for one in "123456789"}
    made = text(served, guided_json=schema, logit_bias=liked, temperature=0, max_tokens=2000)
    json.loads(made)
    assert max(len(digits) for digits in re.findall(r"\d+", made)) == 128


def test_numbers_that_a_schema_asks_for_and_digits_in_texts_may_be_long(served: Running) -> None:
    number, digits = 7 * 10**199, "8" * 200
    schema = {"enum": [{"number": number, "text": f'\\"{digits}'}]}
    made = json.loads(text(served, guided_json=schema, max_tokens=900))
    assert made["number"] == pytest.approx(number)  # llguidance reads a float
    assert made["text"] == f'\\"{digits}'
