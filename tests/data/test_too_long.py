"""What becomes of rows that are too long is decided by the recipe, and nothing is lost unsaid."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lorakit.data.dataset import PreparedData, prepare
from lorakit.data.findings import Finding
from lorakit.data.masking import IGNORE
from lorakit.data.seq2seq import tokenize_pair
from lorakit.errors import InputError
from lorakit.models.load import positions_of
from lorakit.training.recipe import load_recipe
from tiny import byte_tokenizer

WriteRows = Callable[..., Path]


@pytest.fixture
def path(write_rows: WriteRows) -> str:
    """Three rows of 23 tokens, one whose answer is cut at 64, and one whose prompt is longer."""
    rows = [{"prompt": f"q{i}", "completion": "a"} for i in range(3)]
    rows += [{"prompt": "q", "completion": "x" * 100}, {"prompt": "x" * 100, "completion": "a"}]
    return str(write_rows(rows))


def prepared(path: str, **options: Any) -> PreparedData:
    return prepare(byte_tokenizer(), path, 0, **{"max_length": 64, **options})


def lost(data: PreparedData) -> dict[str, Finding]:
    """The findings about rows that are cut or left out, each under the word for it."""
    words = ("cut at the end", "left out")
    return {word: f for f in data.findings for word in words if f.count and word in f.what}


def places(data: PreparedData) -> list[int]:
    return [int(row.where.rpartition(":")[2]) for row in data.train]


def test_long_rows_are_cut_and_what_has_no_answer_left_is_left_out_and_counted(path: str) -> None:
    data = prepared(path)
    assert places(data) == [1, 2, 3, 4]
    assert [len(row) for row in data.train] == [len(data.train[0])] * 3 + [64]
    found = lost(data)
    assert (found["cut at the end"].count, found["cut at the end"].first) == (1, ("rows.jsonl:4",))
    assert (found["left out"].count, found["left out"].first) == (1, ("rows.jsonl:5",))
    whole = sum(len(row) + row.cut for row in prepared(path, max_length=1000).train)
    share = 1 - sum(map(len, data.train)) / whole
    assert f"{share:.0%} of all tokens are lost" in found["cut at the end"].cure
    assert found["cut at the end"].cure.endswith("data.max_length=122 keeps all")


def test_they_can_be_dropped(path: str) -> None:
    data = prepared(path, too_long="drop")
    assert places(data) == [1, 2, 3]
    found = lost(data)
    assert list(found) == ["left out"]
    assert (found["left out"].count, found["left out"].of) == (2, 5)


def test_they_can_be_an_error_that_names_the_first_and_counts_the_others(path: str) -> None:
    with pytest.raises(
        InputError, match=r"rows.jsonl:4: 122 tokens \(and 1 more\), more than max_"
    ):
        prepared(path, too_long="error")
    assert places(prepared(path, too_long="error", max_length=122)) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("too_long", ["cut", "drop", "split"])
def test_a_run_with_no_row_left_does_not_start(write_rows: WriteRows, too_long: str) -> None:
    path = str(write_rows([{"prompt": "x" * 100, "completion": "a"}] * 2))
    with pytest.raises(InputError, match=r"data.train: all rows .*rows.jsonl:1, 122 tokens.*=122"):
        prepared(path, too_long=too_long)
    fine = str(write_rows([{"prompt": "q", "completion": "a"}], "fine.jsonl"))
    with pytest.raises(InputError, match=r"data.eval: all rows"):
        prepare(byte_tokenizer(), fine, path, max_length=64, too_long=too_long)


def test_a_text_is_divided_so_that_each_of_its_tokens_is_predicted_once(
    write_rows: WriteRows,
) -> None:
    text = "".join(chr(97 + i % 26) for i in range(1000))
    path = str(write_rows([{"text": text}, {"text": "short"}]))
    cut = lost(prepared(path, positions=512))["cut at the end"]
    assert cut.cure.startswith("93% of all tokens are lost")
    assert "data.too_long=split" in cut.cure
    assert "the model reads 512" in cut.cure
    data = prepared(path, too_long="split")
    assert not lost(data)
    assert any("1, divided into 16 rows" in line for line in data.notices)
    assert len(data.train) == 17
    assert max(map(len, data.train)) == 64
    assert set(places(data)) == {1, 2}
    assert not [f for f in data.findings if f.count]  # no part is a repeated row
    labels = [label for row in data.train[:-1] for label in row.labels if label != IGNORE]
    tokenizer = byte_tokenizer()
    assert labels == [*tokenizer(text)["input_ids"][1:], tokenizer.eos_token_id]
    assert all(row.labels[0] == IGNORE for row in data.train)


def test_dividing_cuts_conversations(path: str) -> None:
    assert [r.input_ids for r in prepared(path, too_long="split").train] == [
        r.input_ids for r in prepared(path).train
    ]


def test_what_the_model_reads_is_a_limit_too(path: str) -> None:
    data = prepared(path, max_length=1000, positions=64)
    assert [row.input_ids for row in data.train] == [r.input_ids for r in prepared(path).train]
    finding = lost(data)["cut at the end"]
    assert "longer than the 64 tokens that the model reads" in finding.what
    assert finding.cure.endswith("the model reads 64 and no more: shorten or split them")


def test_targets_of_a_decoder_follow_the_same_rule(path: str) -> None:
    options: dict[str, Any] = {"to_row": tokenize_pair, "max_length": 64}
    assert places(prepared(path, **options)) == [1, 2, 3, 4, 5]
    assert places(prepared(path, too_long="drop", **options)) == [1, 2, 3]
    with pytest.raises(InputError, match=r"rows.jsonl:4: 101 tokens \(and 1 more\)"):
        prepared(path, too_long="error", **options)
    with pytest.raises(InputError, match="split is for plain text"):
        prepared(path, too_long="split", **options)


def test_the_recipe_takes_the_four_values() -> None:
    base = {"model": "m", "output_dir": "o", "data": {"train": "rows.jsonl"}}
    assert load_recipe(base).data.too_long == "cut"
    for value in ("cut", "drop", "error", "split"):
        assert load_recipe(base, [f"data.too_long={value}"]).data.too_long == value
    with pytest.raises(InputError, match=r"data.too_long"):
        load_recipe(base, ["data.too_long=truncate"])


def test_positions_are_those_of_the_embeddings_or_of_the_rotary_scaling() -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 16,
        "max_position_embeddings": 32,
    }
    assert positions_of(LlamaForCausalLM(LlamaConfig(**sizes))) == 32
    scaled = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    assert positions_of(LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters=scaled))) == 128
    gpt2 = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16, n_positions=24)
    assert positions_of(GPT2LMHeadModel(gpt2)) == 24
