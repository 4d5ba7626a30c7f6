"""An answer is learned behind the tokens of its generation prompt, whatever both are made of."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lorakit.data.conversations import Message
from lorakit.data.dataset import prepare
from lorakit.data.masking import IGNORE, TokenizedRow, tokenize
from lorakit.data.samples import Sample
from lorakit.data.templates import render

WriteRows = Callable[..., Path]

CORPUS = ["user: say  hello\n\nassistant:\n    return x0\n\tif: - item a: b: \n\n\n ok"] * 20
LEGACY = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def byte_level(prefix: bool) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=prefix), decoders.ByteLevel(), None


def metaspace(scheme: str) -> Any:
    """SentencePiece as transformers 5 has it; in one piece, so that line breaks merge as well."""
    return (
        pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False),
        decoders.Metaspace(prepend_scheme=scheme, split=False),
        None,
    )


KINDS: dict[str, Callable[[], Any]] = {
    "bytes (GPT-2, Llama 3, Qwen)": lambda: byte_level(False),
    "bytes behind a space": lambda: byte_level(True),
    "metaspace, always (Llama 2)": lambda: metaspace("always"),
    "metaspace, first (Mistral)": lambda: metaspace("first"),
    "metaspace, never (Gemma)": lambda: metaspace("never"),
    "prepended (Llama 2, legacy)": lambda: (None, decoders.Metaspace(), LEGACY),
}
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "a space ends the prompt": (
        "{% for m in messages %}{{ m.role + ': ' + m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    ),
    "headings": (
        "{% for m in messages %}{{ m.role + ':\n' + m.content }}"
        "{{ '<|im_end|>' if m.role == 'assistant' }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:\n{% endif %}"
    ),
}


@cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """A small BPE that has merged what often stands together, blanks and line breaks too."""
    pre, decoder, normalizer = KINDS[kind]()
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    if pre is not None:
        raw.pre_tokenizer = pre
    if normalizer is not None:
        raw.normalizer = normalizer
    raw.decoder = decoder
    special = ["<unk>", "<|im_start|>", "<|im_end|>"]
    alphabet = [*pre_tokenizers.ByteLevel.alphabet(), *"\n\t ▁"]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", extra_special_tokens=["<|im_start|>"]
    )


def talk(*contents: str) -> list[Message]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def tokenized(messages: list[Message], tokenizer: Any) -> TokenizedRow:
    return tokenize(Sample(tuple(messages), None, "rows.jsonl:1"), tokenizer, 100_000)


def runs(row: TokenizedRow) -> list[tuple[int, list[int]]]:
    """Where each unbroken run of learned tokens begins, and its tokens."""
    found: list[tuple[int, list[int]]] = []
    for at, label in enumerate(row.labels):
        if label != IGNORE:
            if at == 0 or row.labels[at - 1] == IGNORE:
                found.append((at, []))
            found[-1][1].append(label)
    return found


WORDS = st.sampled_from(["x0", "return x0", "- item", "a: b", "ok", "say  hello", "\n", "if:", "/"])
BLANKS = st.sampled_from(["", " ", "    ", "\n", "\n\n", "\t", "\n    ", "\t- "])
ANSWERS = st.builds("{}{}{}".format, BLANKS, WORDS, BLANKS)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
@given(question=WORDS.filter(str.strip), answer=ANSWERS, more=ANSWERS)
def test_all_of_an_answer_is_learned_behind_the_tokens_that_ask_for_it(
    kind: str, template: str, question: str, answer: str, more: str
) -> None:
    tokenizer = tokenizer_of(kind)
    tokenizer.chat_template = TEMPLATES[template]
    messages = talk(question, answer, question, more)
    asking = render(messages[:1], tokenizer, add_generation_prompt=True)
    asked = tokenizer(asking, add_special_tokens=False)["input_ids"]
    row = tokenized(messages, tokenizer)
    assert row.input_ids[: len(asked)] == asked
    answers = runs(row)
    assert answers[0][0] == len(asked)
    decode = tokenizer.backend_tokenizer.decode
    for (at, ids), content in zip(answers, (answer, more), strict=True):
        # Behind what it stands behind, as alone a decoder may take away the first space.
        before = row.input_ids[:at]
        whole = decode([*before, *ids], skip_special_tokens=False)
        assert whole[len(decode(before, skip_special_tokens=False)) :] == f"{content}<|im_end|>"


def test_texts_whose_tokens_fit_are_tokenised_as_one(bundled_tokenizer: Any) -> None:
    messages = talk("Hi", "Hello there", "And you?", "Fine: thanks")
    row = tokenized(messages, bundled_tokenizer)
    text = render(messages, bundled_tokenizer)
    assert not row.apart
    assert row.input_ids == bundled_tokenizer(text, add_special_tokens=False)["input_ids"]


def test_rows_that_are_tokenised_in_parts_are_counted(
    bundled_tokenizer: Any, write_rows: WriteRows
) -> None:
    answers = ["    return x0", "\n\nHello", "fine", "\t- item", "  two", "\nx4"]
    rows = [{"prompt": f"Q{i}?", "completion": answer} for i, answer in enumerate(answers)]
    data = prepare(bundled_tokenizer, str(write_rows(rows)), 0)
    (found,) = (f for f in data.findings if "tokenised in parts" in f.what)
    apart = [row.where for row in data.train if row.apart]
    assert (found.count, list(found.first)) == (len(apart), apart[:3])
    assert 1 <= len(apart) < len(rows)
    for row, values in zip(data.train, rows, strict=True):
        ((_, ids),) = runs(row)
        assert bundled_tokenizer.decode(ids) == values["completion"] + "<|im_end|>"
