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
