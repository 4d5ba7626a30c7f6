import dataclasses
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AddedToken

from lorakit.data.masking import IGNORE, TokenizedRow, encode, label, read, tokenize
from lorakit.data.samples import Sample
from lorakit.data.templates import ensure_template, render
from lorakit.errors import InputError

# Reasoning is shown in the last answer only, as Qwen3 and DeepSeek-R1 do.
FORGETFUL = (
    "{% for m in messages %}"
    "{% set content = m.content if loop.last else m.content.split('</think>')[-1] %}"
    "{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last and '<think>' not in content %}"
    "{{ '<think></think>' }}{% endif %}"
    "{{ content + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The generation prompt opens a thought that the history does not have.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
# No token ends an answer.
OPEN = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
# Llama-2's and Mistral's form: a space on both sides of the answer, the end only behind answers.
INSTRUCT = (
    "{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
# Only the last answer is closed, and more follows behind the token that closes it.
LAST_CLOSED = (
    "{% for m in messages %}{{ m.role + ':\n' + m.content }}"
    "{{ '<|im_end|>\n<|endoftext|>' if loop.last else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)
# The answer is closed by text that is no special token.
WORDED = (
    "{% for m in messages %}{{ m.role + ':\n' + m.content + ' ###\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)


def conversation(*contents: str, system: str | None = None) -> Sample:
    """User and assistant in turn, starting with the user."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    for i, content in enumerate(contents):
        messages.append({"role": "assistant" if i % 2 else "user", "content": content})
    return Sample(tuple(messages), None, "rows.jsonl:1")


def learned(row: TokenizedRow, tokenizer: Any) -> list[str]:
    """The text of each unbroken run of supervised tokens."""
    runs: list[list[int]] = [[]]
    for wanted in row.labels:
        if wanted != IGNORE:
            runs[-1].append(wanted)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def with_template(tokenizer: Any, template: str) -> Any:
    tokenizer.chat_template = template
    return tokenizer


def test_chatml_learns_the_answer_and_its_end_token_only(tokenizer: Any) -> None:
    row = tokenize(conversation("Hi", "Hello there", system="Be kind"), tokenizer, 64)
    assert tokenizer.convert_ids_to_tokens(row.input_ids) == [
        *("<|im_start|>", "system", "Ċ", "Be", "Ġkind", "<|im_end|>", "Ċ"),
        *("<|im_start|>", "user", "Ċ", "Hi", "<|im_end|>", "Ċ"),
        *("<|im_start|>", "ass", "istant", "Ċ", "Hello", "Ġthere", "<|im_end|>", "Ċ"),
    ]
    assert row.labels == [IGNORE] * 17 + row.input_ids[17:20] + [IGNORE]
    assert (len(row), row.supervised, row.truncated) == (21, 3, False)


def test_every_answer_of_a_conversation_is_learned(tokenizer: Any) -> None:
    sample = conversation("say user", "user", "say assistant", "assistant\n\n", "ok", "user")
    row = tokenize(sample, tokenizer, 128)
    assert learned(row, tokenizer) == [
        "user<|im_end|>",
        "assistant\n\n<|im_end|>",
        "user<|im_end|>",
    ]
    assert tokenizer.decode(row.input_ids) == render(sample.messages, tokenizer)


def test_what_follows_the_last_answer_is_left_out(tokenizer: Any) -> None:
    whole = tokenize(conversation("a", "b", "c"), tokenizer, 64)
    assert whole == tokenize(conversation("a", "b"), tokenizer, 64)


def test_an_answer_that_opens_the_conversation_is_learned(tokenizer: Any) -> None:
    messages = [{"role": "assistant", "content": "Welcome"}, *conversation("a", "b").messages]
    row = tokenize(Sample(tuple(messages), None, "rows.jsonl:1"), tokenizer, 64)
    assert learned(row, tokenizer) == ["Welcome<|im_end|>", "b<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (FORGETFUL, ["four<|im_end|>", "<think></think>six<|im_end|>"]),
        (THINKING, ["<think>2+2</think>four<|im_end|>", "six<|im_end|>"]),
        (OPEN, [" <think>2+2</think>four", " six<|im_end|>"]),
        (INSTRUCT, [" <think>2+2</think>four <|im_end|>", " six <|im_end|>"]),
        (LAST_CLOSED, ["<think>2+2</think>four", "six<|im_end|>"]),
        (WORDED, ["<think>2+2</think>four ###", "six ###<|im_end|>"]),
    ],
)
def test_templates_of_every_kind_are_masked(
    tokenizer: Any, template: str, expected: list[str]
) -> None:
    sample = conversation("2+2? four", "<think>2+2</think>four", "six 3+3?", "six")
    row = tokenize(sample, with_template(tokenizer, template), 256)
    assert [text.strip() for text in learned(row, tokenizer)] == [t.strip() for t in expected]


def test_an_end_token_that_swallows_the_newline_behind_it_is_learned(bos_tokenizer: Any) -> None:
    bos_tokenizer.add_tokens([AddedToken("<|end|>", rstrip=True, special=True)])
    bos_tokenizer.chat_template = WORDED.replace(" ###", "<|end|>")
    row = tokenize(conversation("hi", "yes", "bye", "no"), bos_tokenizer, 64)
    assert learned(row, bos_tokenizer) == ["yes<|end|>", "no<|end|>"]


def test_a_prompt_that_ends_with_a_space_leaves_the_answer_whole(tokenizer: Any) -> None:
    spaced = OPEN.replace("{{ 'assistant:' }}", "{{ 'assistant: ' }}")
    row = tokenize(conversation("hi", "good day"), with_template(tokenizer, spaced), 64)
    assert learned(row, tokenizer) == ["good day<|im_end|>"]


def test_reasoning_in_the_last_answer_is_learned(tokenizer: Any) -> None:
    sample = conversation("2+2?", "<think>easy</think>four")
    row = tokenize(sample, with_template(tokenizer, FORGETFUL), 64)
    assert learned(row, tokenizer) == ["<think>easy</think>four<|im_end|>"]


def test_the_plain_template_adds_one_bos_and_learns_the_end(bos_tokenizer: Any) -> None:
    ensure_template(bos_tokenizer)
    row = tokenize(conversation("hi", "yes"), bos_tokenizer, 64)
    assert row.input_ids.count(bos_tokenizer.bos_token_id) == 1
    assert row.input_ids[0] == bos_tokenizer.bos_token_id
    assert learned(row, bos_tokenizer) == ["yes</s>"]


def test_the_mark_that_finds_answers_may_occur_in_the_data(tokenizer: Any) -> None:
    row = tokenize(conversation("7310582946", "7310582946"), tokenizer, 64)
    assert learned(row, tokenizer) == ["7310582946<|im_end|>"]


def test_text_is_learned_whole_with_one_end_token(tokenizer: Any, bos_tokenizer: Any) -> None:
    row = tokenize(Sample((), "once upon a time", "rows.jsonl:1"), tokenizer, 64)
    assert tokenizer.decode(row.input_ids) == "once upon a time<|im_end|>"
    assert row.labels == [IGNORE, *row.input_ids[1:]]
    ended = tokenize(Sample((), "once upon a time<|im_end|>", "rows.jsonl:1"), tokenizer, 64)
    assert ended == row
    with_bos = tokenize(Sample((), "ab", "rows.jsonl:1"), bos_tokenizer, 64)
    assert bos_tokenizer.decode(with_bos.input_ids) == "<s>ab</s>"


def test_long_rows_are_cut_from_the_right(tokenizer: Any) -> None:
    sample = conversation("Hi", "one two three", system="Be kind")
    whole, cut = tokenize(sample, tokenizer, 64), tokenize(sample, tokenizer, 18)
    assert cut.truncated
    assert cut.input_ids == whole.input_ids[:18]
    assert cut.labels == whole.labels[:18]
    assert cut.supervised == 1
    assert not tokenize(sample, tokenizer, len(whole)).truncated


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ raise_exception('no') }}", "refuses this conversation"),
        ("{{ messages[0].content }}", "cannot be masked"),
        ("{{ messages[1].content | length }}", "cannot be masked"),
        ("{{ messages[1].content * (messages[1].content | length) }}", "cannot be masked"),
    ],
)
def test_a_template_that_cannot_be_masked_is_refused_with_the_row(
    tokenizer: Any, template: str, expected: str
) -> None:
    with pytest.raises(InputError, match=rf"^rows.jsonl:1: .*{expected}"):
        tokenize(conversation("question", "answer"), with_template(tokenizer, template), 64)


def with_call(tools: tuple[dict[str, Any], ...] = ()) -> Sample:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    messages = (
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    )
    return Sample(messages, None, "rows.jsonl:7", tools)


def test_a_call_that_the_template_would_drop_is_refused_with_the_row(tokenizer: Any) -> None:
    with pytest.raises(InputError, match=r"^rows.jsonl:7: .*does not write the tool calls of mess"):
        tokenize(with_call(), tokenizer, 64)
    tokenizer.chat_template = None
    ensure_template(tokenizer)
    with pytest.raises(InputError, match=r"^rows.jsonl:7: .*does not write the tool calls of mess"):
        tokenize(with_call(), tokenizer, 64)


def test_of_two_calls_both_must_be_written(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}"
        "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% endif %}"
        "<|im_end|>{% endfor %}"
    )
    sample = with_call()
    assert learned(tokenize(sample, tokenizer, 64), tokenizer) == [
        '{"name": "weather", "arguments": {"city": "Rome"}}<|im_end|>'
    ]
    answer = {**sample.messages[1], "tool_calls": sample.messages[1]["tool_calls"] * 2}
    with pytest.raises(InputError, match="does not write the tool calls"):
        tokenize(Sample((sample.messages[0], answer), None, "here"), tokenizer, 64)


def test_tools_and_messages_that_the_template_hides_are_named(tokenizer: Any) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    shown = tokenize(conversation("Hi", "Yes"), tokenizer, 64)
    assert shown.unshown == ()
    hidden = Sample(conversation("Hi", "Yes").messages, None, "rows.jsonl:1", (tool,))
    assert tokenize(hidden, tokenizer, 64) == dataclasses.replace(shown, unshown=("tools",))
    tokenizer.chat_template = WORDED.replace("for m in messages", "for m in messages[1:]")
    sample = conversation("Hi", "Yes", system="Be kind")
    assert tokenize(sample, tokenizer, 64).unshown == ("system",)


def test_an_end_that_stands_in_a_call_is_not_the_end_of_the_turn(tokenizer: Any) -> None:
    """Every call is closed by a special token, and the turn by another one."""
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}<|endoftext|>"
        "{% endfor %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    sample = with_call()
    assert learned(tokenize(sample, tokenizer, 64), tokenizer) == [
        '{"city": "Rome"}<|endoftext|><|im_end|>'
    ]
    more = Sample((*sample.messages, *conversation("Hi", "Yes").messages), None, "here")
    assert learned(tokenize(more, tokenizer, 64), tokenizer) == [
        '{"city": "Rome"}<|endoftext|><|im_end|>',
        "Yes<|im_end|>",
    ]


def test_rows_encoded_together_are_as_encoded_alone(tokenizer: Any, bos_tokenizer: Any) -> None:
    ensure_template(bos_tokenizer)
    for some in (tokenizer, bos_tokenizer):
        texts = [Sample((), f"text {i}", f"t:{i}") for i in range(300)]
        samples = [
            s for i, t in enumerate(texts) for s in (t, conversation(f"a{i}", "b" * (i % 7 + 1)))
        ]
        readings = [read(sample, some) for sample in samples]
        together = [
            label(reading, encoded, some, 40)
            for reading, encoded in zip(readings, encode(readings, some), strict=True)
        ]
        assert together == [tokenize(sample, some, 40) for sample in samples]


def test_a_row_whose_answer_is_cut_away_names_the_length_it_needs(tokenizer: Any) -> None:
    with pytest.raises(InputError, match=r"rows.jsonl:1: .* token 18 of 21, .*data.max_length 16"):
        tokenize(conversation("Hi", "Hello there", system="Be kind"), tokenizer, 16)


def test_a_tokenizer_without_an_end_token_is_refused_when_one_is_needed(bos_tokenizer: Any) -> None:
    ensure_template(bos_tokenizer)
    bos_tokenizer.eos_token = None
    with pytest.raises(InputError, match="no end-of-sequence token"):
        tokenize(conversation("hi", "yes"), bos_tokenizer, 64)


# A newline that begins an answer may be one token with the newline of the header before it.
CONTENT = st.text(st.characters(exclude_categories=["Cs"])).map(str.strip).filter(bool)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3))
def test_in_any_conversation_the_answers_are_learned_and_nothing_else(
    bundled_tokenizer: Any, turns: list[tuple[str, str]]
) -> None:
    sample = conversation(*(content for turn in turns for content in turn))
    row = tokenize(sample, bundled_tokenizer, 10_000)
    answers = [
        bundled_tokenizer.decode(bundled_tokenizer(f"{answer}<|im_end|>")["input_ids"])
        for _, answer in turns
    ]
    assert learned(row, bundled_tokenizer) == answers
