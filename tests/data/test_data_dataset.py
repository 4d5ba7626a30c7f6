import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakit.data.dataset import DataFacts, load_samples, prepare
from lorakit.data.sources import file_sha256
from lorakit.errors import InputError

WriteRows = Callable[..., Path]


def numbered(count: int, prompts: int | None = None) -> list[dict[str, Any]]:
    """`count` rows that share `prompts` prompts; every answer is different."""
    return [{"prompt": f"q{i % (prompts or count)}", "completion": f"a{i}"} for i in range(count)]


def test_a_share_is_held_out_and_said(tokenizer: Any, write_rows: WriteRows) -> None:
    path = write_rows(numbered(100))
    data = prepare(tokenizer, str(path), 0.1)
    assert (len(data.train), len(data.eval), len(data.eval_samples)) == (90, 10, 10)
    assert [row.where for row in data.eval] == [sample.where for sample in data.eval_samples]
    assert data.facts == [DataFacts(str(path), 100, file_sha256(path))]
    assert data.notices == [
        "eval: 10 of 100 rows held out (10 prompts that training does not see, seed 42)"
    ]


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.99])
@pytest.mark.parametrize(("rows", "prompts"), [(2, 2), (100, 7), (100, 2), (50, 50)])
def test_no_prompt_is_on_both_sides_and_no_row_is_lost(
    tokenizer: Any, write_rows: WriteRows, rows: int, prompts: int, share: float
) -> None:
    path = write_rows(numbered(rows, prompts))
    data = prepare(tokenizer, path, share)
    prompt_of = {sample.where: sample.prompt_key for sample in load_samples(path)}
    train, held = ([row.where for row in side] for side in (data.train, data.eval))
    assert sorted(train + held) == sorted(prompt_of)
    assert train
    assert held
    assert not {prompt_of[w] for w in train} & {prompt_of[w] for w in held}


def test_a_prompt_with_most_rows_does_not_empty_the_training_side(
    tokenizer: Any, write_rows: WriteRows
) -> None:
    path = write_rows([{"prompt": "same", "completion": str(i)} for i in range(90)] + numbered(10))
    for seed in range(5):
        assert len(prepare(tokenizer, path, 0.1, seed=seed).eval) == 10


def test_the_split_depends_on_the_seed_alone(tokenizer: Any, write_rows: WriteRows) -> None:
    path = write_rows(numbered(40))
    first, again, other = (prepare(tokenizer, path, 0.25, seed=s) for s in (1, 1, 2))
    assert first == again
    assert first.eval != other.eval


def test_no_share_leaves_every_row_for_training(tokenizer: Any, write_rows: WriteRows) -> None:
    data = prepare(tokenizer, write_rows(numbered(3)), 0)
    assert (len(data.train), data.eval, data.eval_samples, data.notices) == (3, [], [], [])


def test_an_eval_file_is_used_whole(tokenizer: Any, write_rows: WriteRows) -> None:
    train = write_rows(numbered(10), "train.jsonl")
    held = write_rows([*numbered(2), {"prompt": "q3", "completion": "new"}], "eval.jsonl")
    data = prepare(tokenizer, str(train), str(held))
    assert (len(data.train), len(data.eval)) == (10, 3)
    assert [(fact.path, fact.rows) for fact in data.facts] == [(str(train), 10), (str(held), 3)]
    assert data.notices == []


def test_limit_takes_the_first_rows_of_each_file(tokenizer: Any, write_rows: WriteRows) -> None:
    path = write_rows(numbered(10))
    data = prepare(tokenizer, path, path, limit=4)
    assert [row.where for row in data.train] == [f"rows.jsonl:{i}" for i in (1, 2, 3, 4)]
    assert len(data.eval) == 4
    assert data.facts[0].rows == 4


def test_the_plain_template_is_announced_for_conversations_only(
    bos_tokenizer: Any, write_rows: WriteRows
) -> None:
    text = write_rows([{"text": "once"}, {"text": "twice"}], "text.jsonl")
    assert prepare(bos_tokenizer, text, 0).notices == []
    (notice,) = prepare(bos_tokenizer, write_rows(numbered(2)), 0).notices
    assert "no chat template" in notice


def test_columns_are_mapped(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("mr,ref\nname[A],A is here\nname[B],B is here\n")
    columns = {"prompt": "mr", "completion": "ref"}
    data = prepare(tokenizer, path, 0.5, columns=columns)
    assert data.eval_samples[0].reference in ("A is here", "B is here")


def test_of_many_bad_rows_the_first_is_named_and_the_others_counted(
    write_rows: WriteRows,
) -> None:
    path = write_rows([*numbered(2), *[{"prompt": "q", "completion": None}] * 5])
    with pytest.raises(InputError, match=r"^rows.jsonl:3: .* \(and 4 more rows\)$"):
        load_samples(path)
    with pytest.raises(InputError, match=r"^rows.jsonl:3: 'completion' is null, expected a string"):
        load_samples(path, limit=3)


def test_rows_whose_answers_are_cut_away_are_counted_too(
    tokenizer: Any, write_rows: WriteRows
) -> None:
    path = write_rows([*numbered(1), *[{"prompt": "q " * 99, "completion": "a"}] * 3])
    data = prepare(tokenizer, path, 0, max_length=64)
    (finding,) = (f for f in data.findings if f.what.startswith("left out"))
    assert (finding.count, finding.of, finding.first[0]) == (3, 4, "rows.jsonl:2")
    assert [row.where for row in data.train] == ["rows.jsonl:1"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"eval": 1.0}, "data.eval is 1.0"),
        ({"eval": -0.1}, "data.eval is -0.1"),
        ({"eval": float("nan")}, "data.eval is nan"),
        ({"eval": True}, "data.eval is True"),
        ({"eval": "missing.jsonl"}, "missing.jsonl: no such file"),
        ({"limit": 0}, "data.limit is 0"),
        ({"limit": 1}, "1 row with one prompt"),
        ({"max_length": 1}, "data.max_length is 1"),
        ({"columns": {"promt": "prompt"}}, "did you mean 'prompt'"),
    ],
)
def test_values_that_cannot_be_used_are_refused(
    tokenizer: Any, write_rows: WriteRows, values: dict[str, Any], expected: str
) -> None:
    with pytest.raises(InputError) as caught:
        prepare(tokenizer, write_rows(numbered(4)), **values)
    assert expected in str(caught.value)


def test_rows_of_one_prompt_cannot_be_split(tokenizer: Any, write_rows: WriteRows) -> None:
    with pytest.raises(InputError, match="8 rows with one prompt"):
        prepare(tokenizer, write_rows(numbered(8, prompts=1)), 0.5)


def test_facts_and_rows_are_plain_values(tokenizer: Any, write_rows: WriteRows) -> None:
    data = prepare(tokenizer, write_rows(numbered(2)), 0)
    assert set(data.facts[0].to_dict()) == {"path", "rows", "sha256", "weight"}
    assert set(dataclasses.asdict(data.train[0])) == {
        *("input_ids", "labels", "where", "cut", "unshown", "apart", "pictures")
    }


def said(*messages: tuple[str, str], **of_the_last: Any) -> dict[str, Any]:
    row = [{"role": role, "content": content} for role, content in messages]
    row[-1] |= of_the_last
    return {"messages": row}


CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}


@pytest.mark.parametrize(
    ("role", "message", "words"),
    [
        ("system", ("system", "Be kind"), "the system message"),
        ("tool", ("tool", "42 degrees"), "what tools answered"),
        ("user", ("user", "another question"), "a user message whole"),
    ],
)
def test_what_the_template_hides_is_counted(
    tokenizer: Any, write_rows: WriteRows, role: str, message: tuple[str, str], words: str
) -> None:
    tokenizer.chat_template = (
        f"{{% for m in messages if m.role != '{role}' %}}<|im_start|>{{{{ m.role }}}}"
        "{{ '\n' + m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    shown = said(("assistant", "hello"), ("assistant", "yes"))
    hidden = said(("assistant", "hello"), message, ("assistant", "no"))
    data = prepare(tokenizer, write_rows([shown, hidden, shown]), 0)
    [finding] = [finding for finding in data.findings if "does not show" in finding.what]
    assert finding.line.startswith(
        f"1 of 3 rows is learned without {words}, which the chat template does not show "
        "(first: rows.jsonl:2)"
    )


def test_reasoning_that_the_template_hides_is_counted(
    tokenizer: Any, write_rows: WriteRows
) -> None:
    thinking = said(("user", "2+2?"), ("assistant", "4"), reasoning_content="two and two")
    data = prepare(tokenizer, write_rows([thinking]), 0)
    [finding] = [finding for finding in data.findings if finding.count]
    assert "without all of an answer (its reasoning" in finding.line


def test_a_call_is_an_answer_and_one_that_is_dropped_is_an_error(
    tokenizer: Any, write_rows: WriteRows
) -> None:
    path = write_rows([said(("user", "Rain?"), ("assistant", ""), tool_calls=[CALL])])
    with pytest.raises(InputError, match=r"rows.jsonl:1: .*does not write the tool calls"):
        prepare(tokenizer, path, 0)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ' ' + m.content }}"
        "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<|im_end|>{% endfor %}"
    )
    found = [finding for finding in prepare(tokenizer, path, 0).findings if finding.count]
    assert found == []
