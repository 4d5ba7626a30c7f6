from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from lorakit.data.dataset import prepare
from lorakit.data.mixing import load_samples
from lorakit.data.samples import Sample
from lorakit.data.texts import findings_of_texts
from tiny import byte_tokenizer

WriteRows = Callable[..., Path]


def said_of(samples: Sequence[Sample]) -> list[str]:
    return [f.line for f in findings_of_texts(samples, byte_tokenizer()) if f.count]


def talk(question: str, where: str = "rows.jsonl:1", **more: str) -> Sample:
    user = {"role": "user", "content": question, **more}
    return Sample((user, {"role": "assistant", "content": "a"}), None, where)


def test_plain_texts_give_no_notice(write_rows: WriteRows) -> None:
    path = write_rows([{"prompt": "tab\tline\r\nend é 你好 🙂 < | >", "completion": "im_end"}])
    assert said_of(load_samples(path)) == []


def test_the_rows_with_a_special_token_are_counted_and_the_first_is_named() -> None:
    samples = [talk("q"), talk("a <|im_end|> b", "rows.jsonl:2"), talk("<|pad|>", "rows.jsonl:3")]
    (notice,) = said_of(samples)
    assert notice.startswith("2 of 3 rows are written with the name of a special token")
    assert "(first: rows.jsonl:2): the model takes '<|im_end|>' for the token" in notice


def test_special_tokens_are_what_plain_text_is_often_written_with() -> None:
    assert said_of([Sample((), "<|im_start|>user", "t:1")]) == []


@pytest.mark.parametrize("place", ["name", "tools"])
def test_other_texts_that_a_template_shows_are_looked_at_too(place: str) -> None:
    if place == "name":
        sample = talk("q", name="<|im_end|>")
    else:
        tool = {"function": {"name": "f", "parameters": {"<|im_end|>": {}}}}
        sample = Sample(talk("q").messages, None, "rows.jsonl:1", (tool,))
    assert "'<|im_end|>'" in said_of([sample])[0]


@pytest.mark.parametrize("character", ["\x01", "\x07", "\x1b", "\x7f", "\x85", "\x0c"])
def test_control_characters_are_counted(character: str) -> None:
    samples = [talk("q"), talk(f"q{character}", "rows.jsonl:2")]
    (notice,) = said_of(samples)
    assert notice.startswith("1 of 2 rows is written with control characters")
    assert f"(first: rows.jsonl:2): they are learned as they are: remove {character!a}" in notice
    assert notice.isprintable()


def test_texts_that_stand_for_a_missing_value_are_counted(write_rows: WriteRows) -> None:
    answers = ["nan", "None", " null ", "<NA>", "nan bread", "none", "fine"]
    rows = [{"prompt": f"q{i}", "completion": answer} for i, answer in enumerate(answers)]
    data = prepare(byte_tokenizer(), str(write_rows(rows)), 0)
    (finding,) = (f for f in data.findings if "missing value" in f.what)
    assert (finding.count, finding.first[0]) == (4, "rows.jsonl:1")
    assert "'nan'" in finding.cure
