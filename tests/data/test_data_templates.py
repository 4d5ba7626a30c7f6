import json
from typing import Any

import pytest

from lorakit.data.templates import PLAIN_TEMPLATE, ensure_template, render, template_sha256
from lorakit.errors import InputError

USER = {"role": "user", "content": "hello"}
ANSWER = {"role": "assistant", "content": "good day"}


def test_the_bundled_template_renders_chatml(tokenizer: Any) -> None:
    system = {"role": "system", "content": "be kind"}
    opening = "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
    assert render([system, USER], tokenizer) == opening
    assert render([system, USER], tokenizer, True) == opening + "<|im_start|>assistant\n"


def test_a_tokenizer_with_a_template_keeps_it(tokenizer: Any) -> None:
    before = tokenizer.chat_template
    assert ensure_template(tokenizer) is None
    assert tokenizer.chat_template == before


def test_a_tokenizer_without_a_template_gets_the_plain_one_and_a_notice(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        render([USER], tokenizer)
    notice = ensure_template(tokenizer)
    assert notice is not None
    assert "no chat template" in notice
    assert tokenizer.chat_template == PLAIN_TEMPLATE
    assert render([USER, ANSWER], tokenizer) == (
        "### User:\nhello\n\n### Assistant:\ngood day<|im_end|>\n\n"
    )
    assert render([USER], tokenizer, True) == "### User:\nhello\n\n### Assistant:\n"
    assert ensure_template(tokenizer) is None


def test_the_plain_template_brings_the_bos_that_a_tokenizer_would_add(bos_tokenizer: Any) -> None:
    ensure_template(bos_tokenizer)
    assert render([USER], bos_tokenizer).startswith("<s>### User:\n")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('Conversation roles must\\nalternate') }}", "roles must alternate"),
        ("{% for %}", "Expected"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ messages[7].content.x }}", "has no"),
    ],
)
def test_what_a_template_raises_becomes_one_line(
    tokenizer: Any, template: str, reason: str
) -> None:
    tokenizer.chat_template = template
    with pytest.raises(InputError) as caught:
        render([USER, USER], tokenizer)
    assert "chat template refuses this conversation (roles: user, user)" in str(caught.value)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_hash_changes_with_the_template(tokenizer: Any) -> None:
    bundled = template_sha256(tokenizer)
    tokenizer.chat_template = PLAIN_TEMPLATE
    plain = template_sha256(tokenizer)
    tokenizer.chat_template = {"default": PLAIN_TEMPLATE}
    named = template_sha256(tokenizer)
    tokenizer.chat_template = None
    assert len({bundled, plain, named, template_sha256(tokenizer)}) == 4
    assert len(bundled) == 64


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}


def calling(**function: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rom"}}}
    call["function"] |= function
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def test_tools_are_given_to_the_template(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ tools | tojson }}"
    assert render([USER], tokenizer, tools=(TOOL,)) == json.dumps([TOOL])
    assert render([USER], tokenizer) == "null"


def test_the_template_for_tools_is_taken_where_a_tokenizer_has_several(tokenizer: Any) -> None:
    tokenizer.chat_template = {"default": "plain", "tool_use": "with tools"}
    assert render([USER], tokenizer) == "plain"
    assert render([USER], tokenizer, tools=[TOOL]) == "with tools"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ c.function.arguments | tojson }}", '{"city": "Rom"}'),
        ("{{ 'call ' + c.function.arguments }}", 'call {"city": "Rom"}'),
        ("{{ c.function.arguments }}", '{"city": "Rom"}'),
        (
            "{% if c.id | length != 9 %}{{ raise_exception('id') }}{% endif %}{{ c.id }}",
            "call00001",
        ),
    ],
)
def test_calls_are_written_as_the_template_wants_them(
    tokenizer: Any, template: str, expected: str
) -> None:
    tokenizer.chat_template = "{% set c = messages[1].tool_calls[0] %}" + template
    assert render([USER, calling()], tokenizer) == expected


def test_a_result_gets_the_id_of_its_call(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.tool_calls %}{% for c in m.tool_calls %}"
        "{{ raise_exception('no id') if not c.id }}{{ c.id + ' ' }}{% endfor %}"
        "{% elif m.role == 'tool' %}{{ 'of ' + m.tool_call_id + ' ' }}{% endif %}{% endfor %}"
    )
    two = {**calling(), "tool_calls": calling()["tool_calls"] * 2}
    results = [{"role": "tool", "content": str(i)} for i in range(2)]
    assert render([USER, two, *results, calling(), results[0]], tokenizer) == (
        "call00001 call00002 of call00001 of call00002 call00003 of call00003 "
    )


def test_ids_that_a_template_refuses_are_replaced_in_calls_and_results(tokenizer: Any) -> None:
    """Mistral's takes nine letters and digits, OpenAI's are `call_1` and the like."""
    tokenizer.chat_template = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}"
        "{{ raise_exception('nine') if c.id | length != 9 }}{{ c.id + ' ' }}{% endfor %}"
        "{% if m.role == 'tool' %}{{ raise_exception('nine') if m.tool_call_id | length != 9 }}"
        "{{ 'of ' + m.tool_call_id + ' ' }}{% endif %}{% endfor %}"
    )
    (call,) = calling()["tool_calls"]
    ids = ("call_1", "abcDEF123", "call_2")
    three = {**calling(), "tool_calls": [{**call, "id": id} for id in ids]}
    results = [{"role": "tool", "content": "x", "tool_call_id": id} for id in reversed(ids)]
    assert render([USER, three, *results], tokenizer) == (
        "call00001 abcDEF123 call00003 of call00003 of abcDEF123 of call00001 "
    )
    unnamed = [{"role": "tool", "content": "x"}, *results[:1]]
    assert render([USER, three, *unnamed], tokenizer).endswith("of call00001 of call00003 ")


def test_arguments_that_a_template_can_only_print_as_python_are_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% set a = messages[1].tool_calls[0].function.arguments %}"
        "{{ raise_exception('an object, please') if a is string }}{{ a }}"
    )
    with pytest.raises(InputError, match="an object, please"):
        render([USER, calling()], tokenizer)


def test_a_quoted_python_object_in_a_message_is_left_alone(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{{ messages[0].content }}{{ messages[1].tool_calls[0].function.arguments | tojson }}"
    )
    asked = {"role": "user", "content": "what is {'city': 'Rom'}?"}
    assert render([asked, calling()], tokenizer) == """what is {'city': 'Rom'}?{"city": "Rom"}"""
