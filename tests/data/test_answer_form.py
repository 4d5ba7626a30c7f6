"""What a template writes around answers, learned from the template alone."""

import pytest
from chat_families import FAMILIES, FOLDER, family_tokenizer

from lorakit.data.answer_form import AnswerForm, answer_form, taught_answer
from lorakit.data.samples import Sample
from lorakit.data.templates import ensure_template
from tiny import byte_tokenizer

QUESTION = {"role": "user", "content": "2 + 2?"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}


def sample(**answer: object) -> Sample:
    return Sample((QUESTION, {"role": "assistant", "content": "", **answer}), None, "rows:1")


def ordinary(name: str) -> AnswerForm:
    """The form of a family's template with a tokenizer that has none of the family's tokens."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    return answer_form(tokenizer)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_family_writes_around_an_answer_is_no_part_of_it(name: str):
    tokenizer = family_tokenizer(name)
    form = answer_form(tokenizer)
    learned = FAMILIES[name].learned("Four, b > a.", True)
    ids = tokenizer(learned, add_special_tokens=False)["input_ids"]
    assert ids[-1] in (form.end_token, tokenizer.eos_token_id)
    assert form.end_text == ""
    written = tokenizer.decode(ids[:-1])
    assert form.split(written)[1].strip() == "Four, b > a."
    assert form.shown(written).strip() == "Four, b > a."
    assert taught_answer(sample(content="Four, b > a."), tokenizer, form)[1].strip() == (
        "Four, b > a."
    )


@pytest.mark.parametrize(
    ("name", "end"),
    [("llama3", "<|eot_id|>"), ("gemma", "<end_of_turn>"), ("phi3", "<|end|>")],
)
def test_an_end_mark_that_is_ordinary_text_is_known_as_text(name: str, end: str):
    form = ordinary(name)
    assert form.end_text == end
    assert form.split(f"a > b{end}\nmore")[1] == "a > b"
    assert form.shown(f"a > b{end}") == "a > b"


def test_templates_without_an_end_mark_end_no_answer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    form = answer_form(tokenizer)
    assert (form.end, form.end_text, form.end_token, form.before) == ("", "", None, "assistant: ")
    tokenizer.chat_template = None
    ensure_template(tokenizer)
    assert answer_form(tokenizer).end_token == tokenizer.eos_token_id


def test_glm_ends_an_answer_with_what_begins_the_next_turn():
    tokenizer = family_tokenizer("glm4")
    assert answer_form(tokenizer).end_token == tokenizer.convert_tokens_to_ids("<|user|>")


@pytest.mark.parametrize(
    "written",
    [
        "<think>\n\n</think>\n\n4",
        "<think>two and two</think>4",
        "<think>a</think>\n<think>b</think>\n4",
        "[THINK]two[/THINK]4",
        "<thought>two</thought>\n4",
        "<thinking>two</thinking>\n4",
        "<seed:think>two</seed:think>4",
        "◁think▷two◁/think▷4",
        "<|START_THINKING|>two<|END_THINKING|>4",
        "<|begin_of_thought|>two<|end_of_thought|>\n\n4",
        "<|channel|>analysis<|message|>two<|end|><|start|>assistant<|channel|>final<|message|>4",
    ],
)
def test_reasoning_at_the_beginning_is_parted_from_the_answer(written: str):
    form = answer_form(byte_tokenizer())
    reasoning, answer = form.split(written)
    assert answer == "4"
    assert written.startswith(reasoning.strip())
    assert reasoning


def test_only_reasoning_at_the_beginning_is_left_out_and_unfinished_reasoning_is_no_answer():
    form = answer_form(byte_tokenizer())
    for text in ("4", "  4\n", "4 <think>why</think>", "use <think> tags", ""):
        assert form.split(text) == ("", text)
    assert form.split("<think>two and t")[1] == ""


def test_reasoning_that_the_prompt_has_opened_ends_at_its_mark():
    form = answer_form(family_tokenizer("deepseek_r1"))
    assert form.opened == "</think>"
    assert form.split("two and two\n</think>\n\n4")[1] == "4"
    assert form.split("4") == ("", "4")


def test_reasoning_marks_that_nobody_knows_are_learned_from_the_template():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.reasoning_content %}(({{ m.reasoning_content }}))=> {% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert answer_form(tokenizer).split("((two))=> 4") == ("((two))=>", "4")


def test_rows_with_reasoning_or_calls_have_the_answer_that_the_template_writes():
    tokenizer = family_tokenizer("qwen3")
    form = answer_form(tokenizer)
    for answer in (
        {"content": "4"},
        {"content": "4", "reasoning_content": "two and two"},
        {"content": "<think>two and two</think>\n\n4"},
    ):
        assert taught_answer(sample(**answer), tokenizer, form)[1] == "4"
    called = taught_answer(sample(tool_calls=[CALL]), tokenizer, form)[1]
    assert called == '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'
