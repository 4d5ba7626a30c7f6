"""Continued pretraining: every token of long documents is learned once, however they are cut."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorakit
from command import run_lorakit
from lorakit.data.masking import IGNORE
from lorakit.errors import InputError
from lorakit.training.check import shown_row
from lorakit.training.recipe import load_recipe
from lorakit.training.setup import set_up
from small_runs import recipe, weights
from training.several_runs import in_two_processes

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "rain",
    "falls",
    "on",
    "old",
    "stones",
]
DOCUMENTS = [
    " ".join(WORDS[(i * j + j) % len(WORDS)] for j in range(length))
    for i, length in enumerate([90, 200, 40, 31, 160, 75, 33, 60])
]
"""Of some hundred to a thousand tokens."""


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A document a line, as many corpora have it."""
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(DOCUMENTS) + "\n")
    return path


@pytest.fixture
def make(tiny_model: Path, corpus: Path, tmp_path: Path) -> Any:
    """Makes a recipe in float64, with windows of 64 tokens and nothing held out."""

    def made(name: str = "run", data: Any = (), objective: Any = (), **training: Any) -> Any:
        values = recipe(tiny_model, corpus, tmp_path / name, **training)
        values["data"] |= {"eval": 0, "max_length": 64, **dict(data)}
        values["objective"] = {"type": "pretrain", **dict(objective)}
        return values | {"dtype": "float64"}

    return made


@pytest.mark.parametrize("overlap", [1, 20, 63])
def test_every_token_of_every_document_is_learned_once(overlap: int, make: Any, tiny_model: Path):
    setup = set_up(load_recipe(make(objective={"overlap": overlap})))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    learned: dict[str, list[int]] = {}
    for row in setup.data.train:
        assert len(row) <= 64
        learned.setdefault(row.where, []).extend(x for x in row.labels if x != IGNORE)
        assert tokenizer.eos_token_id not in row.input_ids[:-1], "no end within a document"
    assert list(learned) == [f"corpus.txt:{i + 1}" for i in range(len(DOCUMENTS))]
    for tokens, text in zip(learned.values(), DOCUMENTS, strict=True):
        whole = tokenizer(text, add_special_tokens=False).input_ids
        assert tokens == [*whole[1:], tokenizer.eos_token_id]
    total = sum(map(len, learned.values()))
    (notice,) = (line for line in setup.notices if "tokens are learned" in line)
    assert f"8 documents to learn from in {len(setup.data.train):,} windows" in notice
    assert f"{total:,} tokens" in notice


def plain_loss(model: Any, tokenizer: Any, texts: list[str]) -> float:
    """Nats a token of whole documents, one after the other."""
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([[*tokenizer(text).input_ids, tokenizer.eos_token_id]])
        with torch.no_grad():
            found = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        total -= float(found.gather(1, ids[0, 1:, None]).sum())
        count += ids.shape[1] - 1
    return total / count


def test_the_loss_is_that_of_whole_documents_where_a_window_holds_them(
    make: Any, tiny_model: Path, tmp_path: Path
):
    held_out = tmp_path / "held_out.txt"
    texts = [text[:300] for text in DOCUMENTS]
    held_out.write_text("\n".join(texts))
    values = make(data={"max_length": 400, "eval": str(held_out)}, max_steps=1)
    found = lorakit.train(values, quiet=True).manifest
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert found.base_eval_loss == pytest.approx(plain_loss(model, tokenizer, texts), abs=1e-9)
    assert found.eval_loss is not None
    assert found.eval_loss < found.base_eval_loss


def test_however_windows_are_laid_out_and_divided_a_step_is_the_same(make: Any):
    variants: list[tuple[Any, Any]] = [
        ({}, {"per_device_train_batch_size": 200}),
        ({"padding_free": False}, {"per_device_train_batch_size": 200}),
        (
            {},
            {"per_device_train_batch_size": 10, "gradient_accumulation_steps": 20},
        ),
        (
            {"packing": True},
            {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 20},
        ),
    ]
    found = []
    for i, (data, training) in enumerate(variants):
        settings = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.5} | training
        values = make(f"run{i}", data, {"overlap": 8}, **settings)
        found.append(weights(lorakit.train(values, quiet=True).output_dir))
    assert any("lora_B" in name and x.abs().max() > 1e-4 for name, x in found[0].items())
    for other in found[1:]:
        for name, tensor in found[0].items():
            assert (tensor - other[name]).abs().max() < 1e-9, name


def test_eval_takes_the_loss_of_all_windows(make: Any, corpus: Path, tmp_path: Path):
    values = make(objective={"overlap": 16}, data={"eval": str(corpus)}, max_steps=2)
    record = lorakit.train(values, quiet=True).manifest
    found = tmp_path / "scores.json"
    done = run_lorakit(
        tmp_path, "eval", tmp_path / "run", f"--data={corpus}",  f"--json={found}",
        "--dtype=float64",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    scores = json.loads(found.read_text())["scores"]["loss"]
    assert scores["base"] == pytest.approx(record.base_eval_loss, abs=1e-9)
    assert scores["tuned"] == pytest.approx(record.eval_loss, abs=1e-9)


def test_a_recipe_may_still_cut_or_drop_long_documents(make: Any):
    cut = set_up(load_recipe(make(data={"too_long": "cut"})))
    assert len(cut.data.train) == len(DOCUMENTS)
    assert any("cut at the end" in f.what and f.count for f in cut.data.findings)
    assert load_recipe(make()).data.too_long == "split"
    assert load_recipe(make() | {"objective": "sft"}).data.too_long == "cut"


def test_a_window_that_is_shown_is_whole(make: Any):
    setup = set_up(load_recipe(make()))
    states = [{piece.state for piece in shown_row(setup, i)} for i in (0, 1)]
    assert all("cut" not in found for found in states)


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ({"overlap": 64}, "objective.overlap is 64 and a window 64 tokens"),
        ({"overlap": 0}, "objective.overlap"),
        ({"sample_by": "sentence"}, "objective.sample_by"),
        ({"stride": 3}, "objective.stride is not a setting of pretrain"),
    ],
)
def test_settings_that_cannot_be_used_are_named(objective: Any, words: str, make: Any):
    with pytest.raises(InputError, match=words):
        set_up(load_recipe(make(objective=objective)))


@pytest.mark.exhaustive
def test_two_processes_give_what_one_gives(make: Any, tmp_path: Path):
    runs = []
    for packing in (False, True):
        one, two = (
            make(
                f"{packing}{n}",
                {"packing": packing},
                {"overlap": 8},
                max_steps=1,
                per_device_train_batch_size=400 // n,
                optim="sgd",
                learning_rate=0.5,
            )
            for n in (1, 2)
        )
        lorakit.train(one, quiet=True)
        runs.append((two, None))
    listed = tmp_path / "runs.json"
    listed.write_text(json.dumps(runs))
    in_two_processes(listed)
    for packing in (False, True):
        one, two = (weights(tmp_path / f"{packing}{n}") for n in (1, 2))
        for name, tensor in one.items():
            assert (tensor - two[name]).abs().max() < 1e-9, name
