"""Supervised fine-tuning: which answers are learned, and how strongly."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorakit
from lorakit.data.formats import to_sample
from lorakit.data.masking import IGNORE, tokenize
from lorakit.data.sources import Row
from lorakit.errors import InputError
from lorakit.objectives.registry import make_objective
from lorakit.training.recipe import load_recipe
from small_runs import recipe, weights
from tiny import byte_tokenizer


def turns(*answers: str, **marks: Any) -> list[dict[str, Any]]:
    return [
        message
        for answer in answers
        for message in (
            {"role": "user", "content": f"{answer}?"},
            {"role": "assistant", "content": answer, **marks},
        )
    ]


def learned(values: dict[str, Any], how: str) -> str:
    sample = to_sample(Row(values, Path("rows.jsonl"), 3))
    objective = make_objective({"type": "sft", "learn": how})
    tokenizer = byte_tokenizer()
    row = tokenize(objective.as_learned(sample), tokenizer, 1000)
    found = tokenizer.decode([label for label in row.labels if label != IGNORE])
    return str(found).replace("<|im_end|>", ".")


TALK = {"messages": turns("a", "b", "c")}
LISTS = {"prompt": [*turns("a"), turns("b")[0]], "completion": [turns("b")[1], *turns("c")]}
WITH_HISTORY = {"prompt": "b?", "completion": "b", "history": [["a?", "a"]]}
ALPACA = {"instruction": "b?", "output": "b", "history": [["a?", "a"]]}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (TALK, {"all": "a.b.c.", "last": "c."}),
        (LISTS, {"all": "a.b.c.", "last": "c.", "completion": "b.c."}),
        (WITH_HISTORY, {"all": "a.b.", "last": "b.", "completion": "b."}),
        (ALPACA, {"all": "a.b.", "last": "b.", "completion": "b."}),
        ({"text": "abc"}, {"all": "bc.", "last": "bc.", "completion": "bc."}),
        (
            {"messages": [*turns("a", "b"), *turns("c", train=False)]},
            {"all": "a.b.", "last": "b."},
        ),
    ],
)
def test_answers_are_learned_as_the_setting_says(values: Any, expected: dict[str, str]):
    assert {how: learned(values, how) for how in expected} == expected


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (TALK, "rows.jsonl:3: has no completion.*learn: last"),
        (
            LISTS | {"completion": [turns("b", train=False)[1]]},
            "rows.jsonl:3: nothing of its completion",
        ),
    ],
)
def test_a_row_without_a_completion_to_learn_is_refused(values: Any, words: str):
    with pytest.raises(InputError, match=words):
        learned(values, "completion")


# --- weights ------------------------------------------------------------------------------------

CHATS = [
    {"messages": [*turns(f"{n} and more", weight=[0.5, 2, 1][n % 3]), *turns("so " * (n % 4 + 1))]}
    for n in range(16)
]


@pytest.fixture
def make(tiny_model: Path, tmp_path: Path) -> Any:
    """Makes a recipe of one step over all rows, in float64."""
    rows = tmp_path / "chats.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in CHATS))

    def made(name: str, data: Any = (), objective: Any = None, **training: Any) -> Any:
        size = 16 // training.get("gradient_accumulation_steps", 1)
        settings = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.5} | training
        settings = {"per_device_train_batch_size": size} | settings
        values = recipe(tiny_model, rows, tmp_path / name, **settings)
        values["data"] |= {"eval": str(rows), **dict(data)}
        return values | {"objective": objective, "dtype": "float64"}

    return made


def test_the_loss_of_a_message_is_scaled_by_its_weight(make: Any, tiny_model: Path):
    found = lorakit.train(make("run"), quiet=True).manifest
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    total, count = 0.0, 0
    for n, row in enumerate(CHATS):
        before = ""
        for i, message in enumerate(row["messages"]):
            after = before + f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n"
            if message["role"] == "assistant":
                head = len(tokenizer(before + "<|im_start|>assistant\n").input_ids)
                ids = torch.tensor([tokenizer(after.removesuffix("\n")).input_ids])
                with torch.no_grad():
                    logits = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
                losses = -logits.gather(1, ids[0, 1:, None])[head - 1 :]
                total += float(losses.sum()) * ([0.5, 2, 1][n % 3] if i == 1 else 1)
                count += len(losses)
            before = after
    assert found.base_eval_loss == pytest.approx(total / count, abs=1e-9)


def test_however_weighted_rows_are_laid_out_and_divided_a_step_is_the_same(make: Any):
    variants: list[tuple[Any, Any]] = [
        ({}, {}),
        ({"padding_free": False}, {}),
        ({"share_prefixes": False}, {"gradient_accumulation_steps": 4}),
        ({"packing": True, "max_length": 500}, {"per_device_train_batch_size": 16}),
    ]
    found = [
        weights(lorakit.train(make(f"run{i}", data, **training), quiet=True).output_dir)
        for i, (data, training) in enumerate(variants)
    ]
    assert any("lora_B" in name and x.abs().max() > 1e-4 for name, x in found[0].items())
    for other in found[1:]:
        for name, tensor in found[0].items():
            assert (tensor - other[name]).abs().max() < 1e-9, name


def test_a_sweep_trains_weighted_rows_as_a_run_does(make: Any, tmp_path: Path):
    values = make("swept", max_steps=2, optim="adamw_torch")
    swept = lorakit.sweep(values, over={"training.learning_rate": [1e-2, 1e-3]}, quiet=True)
    folders = {one["changes"]["training.learning_rate"]: Path(one["folder"]) for one in swept}
    own = make("own", max_steps=2, optim="adamw_torch", learning_rate=1e-2)
    alone = weights(lorakit.train(own, quiet=True).output_dir)
    for name, tensor in weights(folders[1e-2]).items():
        assert (tensor - alone[name]).abs().max() < 1e-9, name


def test_what_changes_the_rows_is_not_swept_over(make: Any):
    with pytest.raises(InputError, match=r"objective.learn changes the rows"):
        lorakit.sweep(make("swept"), over={"objective": ["sft", {"type": "sft", "learn": "last"}]})


def test_the_default_is_recorded_as_before(make: Any):
    plain = load_recipe(make("run")).to_dict()
    for objective in ("sft", {"type": "sft"}, {"type": "sft", "learn": "all"}):
        assert load_recipe(make("run", objective=objective)).to_dict() == plain
    last = load_recipe(make("run", objective={"type": "sft", "learn": "last"}))
    assert last.to_dict()["objective"] == {"type": "sft", "learn": "last"}
