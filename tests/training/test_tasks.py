"""Classifiers and encoder-decoders: trained, saved with their heads, resumed, and read by PEFT."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import set_seed

import lorakit
from lorakit.adapters.manifest import read_manifest
from lorakit.adapters.open import open_adapter
from lorakit.data.labelled import read_labelled
from lorakit.errors import InputError
from lorakit.evaluation.label_evaluation import evaluate_labels
from lorakit.lora import LoraModel
from lorakit.training.adapter_settings import adapter_config
from lorakit.training.check import check, shown_row
from lorakit.training.recipe import load_recipe
from lorakit.training.setup import load_inputs
from matrix import few
from tiny import save_tiny_encoder, save_tiny_encoder_decoder

TASKS = ("SEQ_CLS", "TOKEN_CLS", "SEQ_2_SEQ_LM")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def encoder_decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_encoder_decoder(tmp_path_factory.mktemp("t5"))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def rows_for(task: str, folder: Path, count: int = 24) -> Path:
    """Rows of different lengths; labels of three kinds, one of them the most frequent."""
    draw = random.Random(0)
    rows: list[dict[str, Any]] = []
    for i in range(count):
        words = [draw.choice(["mara", "oslo", "we", "in", "cup"]) for _ in range(2 + i % 5)]
        tags = [{"mara": "B-PER", "oslo": "B-LOC"}.get(word, "O") for word in words]
        if task == "SEQ_CLS":
            rows.append({"text": " ".join(words), "label": "abc"[min(i % 4, 2)]})
        elif task == "TOKEN_CLS":
            rows.append({"tokens": words, "tags": tags})
        else:
            rows.append({"prompt": " ".join(words), "completion": words[0]})
    return write_rows(folder / f"{task}.jsonl", rows)


def recipe(model: Path, task: str, folder: Path, name: str, **training: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        "dtype": "float32",
        "data": {"train": str(rows_for(task, folder)), "eval": 0.25},
        "lora": {"task_type": task, "r": 4, "lora_alpha": 8},
        "training": {"max_steps": 6, "logging_steps": 1, "learning_rate": 1e-2} | training,
        "output_dir": str(folder / name),
    }


@pytest.fixture
def make(encoder: Path, encoder_decoder: Path, tmp_path: Path) -> Any:
    """Makes a recipe of six steps for a task, with a name for its folder."""

    def made(task: str, name: str, **training: Any) -> dict[str, Any]:
        model = encoder_decoder if task == "SEQ_2_SEQ_LM" else encoder
        return recipe(model, task, tmp_path, name, **training)

    return made


@pytest.fixture(scope="module", params=TASKS)
def trained(
    request: pytest.FixtureRequest,
    encoder: Path,
    encoder_decoder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, Path]:
    """A task, and the folder of an adapter that was trained for it; nothing writes into it."""
    model = encoder_decoder if request.param == "SEQ_2_SEQ_LM" else encoder
    values = recipe(model, request.param, tmp_path_factory.mktemp("trained"), "run")
    return request.param, lorakit.train(values, quiet=True).output_dir


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("task", few(TASKS, "SEQ_CLS"))
def test_however_a_step_is_divided_into_batches_it_is_the_same_step(make: Any, task: str):
    found = []
    for size in (24, 4):
        values = make(task, f"of-{size}", eval_strategy="no", max_steps=2, num_train_epochs=2)
        values["training"] |= {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": 24 // size,
        }
        values["dtype"] = "float64"
        values["data"]["eval"] = 0
        found.append(weights(lorakit.train(values, quiet=True).output_dir))
    assert any("lora_B" in name and tensor.any() for name, tensor in found[0].items())
    for name, tensor in found[0].items():
        assert (tensor - found[1][name]).abs().max() < 1e-9, name


@pytest.mark.exhaustive
def test_two_processes_give_the_scores_and_the_adapter_of_one(make: Any, tmp_path: Path):
    one = make("TOKEN_CLS", "one", max_steps=3, per_device_train_batch_size=4)
    two = make("TOKEN_CLS", "two", max_steps=3, per_device_train_batch_size=2)
    for values in (one, two):
        values["dtype"] = "float64"
        values["training"]["gradient_accumulation_steps"] = 5  # a whole epoch
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(two))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "-m", "lorakit", "train", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    alone = lorakit.train(one, quiet=True).manifest
    together = read_manifest(tmp_path / "two")
    assert together is not None
    assert together.eval_scores == pytest.approx(alone.eval_scores)
    assert together.eval_loss == pytest.approx(alone.eval_loss, abs=1e-9)
    second = weights(tmp_path / "two")
    for name, tensor in weights(tmp_path / "one").items():
        assert (tensor - second[name]).abs().max() < 1e-9, name


@pytest.mark.parametrize("task", few(TASKS, "TOKEN_CLS"))
def test_a_run_that_goes_on_from_a_checkpoint_ends_in_the_same_bytes(make: Any, task: str):
    values = make(task, "run", save_steps=2)
    values["lora"]["lora_dropout"] = 0.1
    folder = lorakit.train(values, quiet=True).output_dir
    names = ("adapter_model.safetensors", "metrics.jsonl")
    before = [(folder / name).read_bytes() for name in names]
    for name in ("lorakit.json", "adapter_config.json", names[0]):
        (folder / name).unlink()
    shutil.rmtree(folder / "checkpoint-6")
    lorakit.train(values, resume=True, quiet=True)
    assert (folder / names[0]).read_bytes() == before[0]
    losses = [
        [(m["step"], m.get("loss"), m.get("eval_f1")) for m in map(json.loads, text.splitlines())]
        for text in (before[1].decode(), (folder / names[1]).read_text())
    ]
    assert losses[0] == losses[1]


def test_peft_loads_the_adapter_and_computes_the_same(trained: tuple[str, Path]):
    task, folder = trained
    opened = open_adapter(folder, dtype="float32")
    forms = {
        "SEQ_CLS": transformers.AutoModelForSequenceClassification,
        "TOKEN_CLS": transformers.AutoModelForTokenClassification,
        "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    }
    labels = {"num_labels": len(opened.labels)} if opened.labels else {}
    base = forms[task].from_pretrained(opened.base_model, **labels)
    theirs = peft.PeftModel.from_pretrained(base, folder).eval()
    batch = dict(opened.tokenizer(["mara in oslo", "we"], padding=True, return_tensors="pt"))
    if task == "SEQ_2_SEQ_LM":
        batch.pop("token_type_ids", None)
        batch["decoder_input_ids"] = batch["input_ids"][:, :3]
    with torch.no_grad():
        assert (opened.model(**batch).logits - theirs(**batch).logits).abs().max() < 1e-5


def test_a_run_is_that_of_peft_with_trainer(make: Any, tmp_path: Path):
    """Whole epochs as steps, from the same first values: the order of rows makes no difference."""
    values = make("SEQ_CLS", "run", max_steps=-1, num_train_epochs=4, eval_strategy="no")
    # Trainer's own warm-up begins at 0: both train at one rate.
    values["training"] |= {"lr_scheduler_type": "constant", "warmup_steps": 0}
    values["training"] |= {"per_device_train_batch_size": 24, "save_strategy": "no"}
    values["data"]["eval"] = 0
    inputs = load_inputs(load_recipe(values), torch.float32)
    set_seed(42)
    config = adapter_config(load_recipe(values), inputs)
    LoraModel(inputs.model, config).save_pretrained(tmp_path / "0")

    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        values["model"], num_labels=3
    )
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "0", is_trainable=True)
    rows = [
        {"input_ids": row.input_ids, "token_type_ids": [0] * len(row), "labels": row.labels[0]}
        for row in inputs.data.train
    ]
    settings = load_recipe(values).training.model_dump(exclude={"loraplus_lr_ratio"})
    trainer = transformers.Trainer(
        theirs,
        transformers.TrainingArguments(tmp_path / "trainer", use_cpu=True, **settings),
        train_dataset=rows,
        data_collator=transformers.DataCollatorWithPadding(inputs.tokenizer),
    )
    trainer.train()
    theirs.save_pretrained(tmp_path / "theirs")
    lorakit.train(values, quiet=True)
    first, ours, other = (weights(tmp_path / name) for name in ("0", "run", "theirs"))
    assert ours.keys() == other.keys()
    for name, tensor in ours.items():
        assert (tensor - other[name]).abs().max() < 1e-4, name
        assert (tensor - first[name]).abs().max() > 1e-3, name


@pytest.mark.parametrize(
    ("task", "scores"),
    [("SEQ_CLS", {"accuracy", "f1"}), ("TOKEN_CLS", {"accuracy", "f1", "entity_f1"})],
)
def test_the_record_has_the_scores_and_labels_that_evaluation_finds_again(
    make: Any, tmp_path: Path, task: str, scores: set[str]
):
    values = make(task, "run")
    held = rows_for(task, tmp_path, 10).rename(tmp_path / "held.jsonl")
    values["data"] = {"train": str(rows_for(task, tmp_path)), "eval": str(held)}
    manifest = lorakit.train(values, quiet=True).manifest
    assert manifest.labels is not None
    names = sorted(manifest.labels["counts"])
    assert manifest.labels["label2id"] == {name: i for i, name in enumerate(names)}
    assert set(manifest.eval_scores or ()) == set(manifest.base_eval_scores or ()) == scores
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["eval_f1"] == (manifest.eval_scores or {})["f1"]

    opened = open_adapter(tmp_path / "run", dtype="float32")
    assert list(opened.labels) == names
    samples = read_labelled(held, task)
    found = [evaluate_labels(opened, samples, batch_size=size) for size in (1, 16)]
    for evaluation in found:
        tuned = {name: score["tuned"] for name, score in evaluation.scores.items()}
        assert tuned == pytest.approx({**manifest.eval_scores, "loss": manifest.eval_loss})
    usual = found[0].most_frequent
    share = [label == usual for s in samples for label in s.labels]
    assert found[0].scores["accuracy"]["base"] == pytest.approx(sum(share) / len(share))


def test_a_head_is_trained_and_saved_and_adapters_do_not_reach_it(trained: tuple[str, Path]):
    task, folder = trained
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["task_type"] == task
    saved = weights(folder)
    if task == "SEQ_2_SEQ_LM":
        assert config["modules_to_save"] is None
        assert all("lora_" in name for name in saved)
    else:
        assert config["modules_to_save"] == ["classifier"]
        assert saved["base_model.model.classifier.weight"].shape == (3, 32)
        assert not [name for name in saved if "classifier" in name and "lora" in name]


def test_whatever_the_base_has_no_weights_for_is_saved_with_the_adapter(make: Any, tmp_path: Path):
    """A BERT without its pooler: random again at every start, if it stayed out of the adapter."""
    values = make("SEQ_CLS", "run")
    values["model"] = str(save_tiny_encoder(tmp_path / "headless", pooler=False))
    folder = lorakit.train(values, quiet=True).output_dir
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier", "bert.pooler.dense"]
    opened = open_adapter(folder, dtype="float32")
    torch.manual_seed(5)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        values["model"], num_labels=3
    )
    theirs = peft.PeftModel.from_pretrained(base, folder).eval()
    batch = opened.tokenizer("mara", return_tensors="pt")
    with torch.no_grad():
        assert (opened.model(**batch).logits - theirs(**batch).logits).abs().max() < 1e-5


def test_a_causal_language_model_classifies_by_its_last_token(
    make: Any, tiny_model: Path, tmp_path: Path
):
    values = make("SEQ_CLS", "run") | {"model": str(tiny_model)}
    folder = lorakit.train(values, quiet=True).output_dir
    assert weights(folder)["base_model.model.score.weight"].shape == (3, 32)
    opened = open_adapter(folder, dtype="float32")
    samples = read_labelled(values["data"]["train"], "SEQ_CLS")
    one, many = (evaluate_labels(opened, samples, batch_size=size) for size in (1, 16))
    assert one.scores["loss"]["tuned"] == pytest.approx(many.scores["loss"]["tuned"], rel=1e-5)
    assert one.predictions == [*many.predictions]


def test_a_new_head_is_float32_whatever_the_base_is(make: Any):
    values = make("SEQ_CLS", "run") | {"dtype": "bfloat16"}
    folder = lorakit.train(values, quiet=True).output_dir
    assert {tensor.dtype for tensor in weights(folder).values()} == {torch.float32}
    opened = open_adapter(folder, dtype="bfloat16")
    assert opened.model.get_base_model().bert.embeddings.word_embeddings.weight.dtype == (
        torch.bfloat16
    )
    samples = read_labelled(values["data"]["train"], "SEQ_CLS")
    assert evaluate_labels(opened, samples).rows == 24


def test_an_adapter_that_lorakit_did_not_train_has_numbered_labels(encoder: Path, tmp_path: Path):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=4)
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"])
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "theirs")
    opened = open_adapter(tmp_path / "theirs", base=str(encoder))
    assert opened.labels == ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3")


def test_rows_are_cut_at_the_models_positions_and_counted(
    make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rows = [{"text": "we are in oslo " * (1 + 30 * (i == 3)), "label": i % 2} for i in range(8)]
    values = make("SEQ_CLS", "run", max_steps=1)
    values["data"] = {"train": str(write_rows(tmp_path / "long.jsonl", rows)), "eval": 0}
    lorakit.train(values)
    said = capsys.readouterr().err
    assert "1 of 8 rows is longer than the 64 tokens that the model reads and cut" in said
    assert "(first: long.jsonl:4)" in said
    assert "the longest has 343 tokens: the model reads 64" in said
    assert "trained whole and saved with the adapter: classifier" in said


def test_an_encoder_decoder_learns_and_is_scored_by_its_answers(make: Any, tmp_path: Path):
    from lorakit.data.dataset import load_samples
    from lorakit.evaluation.evaluate import evaluate

    values = make("SEQ_2_SEQ_LM", "run", max_steps=50, learning_rate=3e-2)
    manifest = lorakit.train(values, quiet=True).manifest
    assert manifest.eval_loss is not None
    assert manifest.base_eval_loss is not None
    assert manifest.eval_loss < 0.5 * manifest.base_eval_loss
    opened = open_adapter(tmp_path / "run", dtype="float32")
    samples = load_samples(values["data"]["train"])[:6]
    results = [
        evaluate(opened.model, opened.tokenizer, samples, max_new_tokens=8, batch_size=size)
        for size in (1, 16)
    ]
    for result in results:
        assert set(result.scores) == {"exact_match", "bleu", "rouge", "loss"}
        assert result.scores["loss"]["tuned"] < 0.5 * result.scores["loss"]["base"]
    assert results[0].examples == results[1].examples, "padding changed an answer"
    assert results[0].scores["loss"]["tuned"] == pytest.approx(
        results[1].scores["loss"]["tuned"], rel=1e-5
    )


def test_a_merged_model_needs_no_adapter(trained: tuple[str, Path], tmp_path: Path):
    task, folder = trained
    assert lorakit.merge(folder, tmp_path / "merged").passed
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    if task == "SEQ_CLS":
        assert config["architectures"] == ["BertForSequenceClassification"]
        assert config["id2label"] == {"0": "a", "1": "b", "2": "c"}


@pytest.mark.parametrize(
    ("task", "read", "learned"),
    [
        ("SEQ_CLS", "[CLS] ", "abc"),
        ("TOKEN_CLS", "[CLS] ", "B-PER B-LOC O"),
        ("SEQ_2_SEQ_LM", "", "mara oslo we in cup"),
    ],
)
def test_check_shows_what_is_read_and_what_is_learned(
    make: Any, task: str, read: str, learned: str
):
    found = check(load_recipe(make(task, "run")), with_forecast=False)
    first, second = shown_row(found.setup, 0)
    assert first.text.startswith(read)
    assert (first.state, second.state) == ("read", "learned")
    assert set(second.text.split()) <= set(learned.split() if " " in learned else learned)
    assert found.statistics["train"].rows == 18


@pytest.mark.parametrize(
    ("task", "change", "words"),
    [
        ("SEQ_CLS", {"lora": {"task_type": "SEQ_CLASS"}}, "did you mean 'SEQ_CLS'"),
        ("SEQ_CLS", {"lora": {"task_type": "seq_cls"}}, "did you mean 'SEQ_CLS'"),
        ("SEQ_CLS", {"lora": {"task_type": "QUESTION_ANS"}}, "lorakit trains CAUSAL_LM"),
        ("SEQ_CLS", {"data": {"packing": True}}, "data.packing is for causal language models"),
        ("TOKEN_CLS", {"compile": True}, "compile is for causal language models"),
        ("SEQ_CLS", {"data": {"columns": {"txt": "text"}}}, "did you mean 'text'"),
        ("SEQ_CLS", {"data": {"columns": {"label": "stars"}}}, "no column 'stars'"),
        ("SEQ_CLS", {"data": {"train": [{"path": "SEQ_CLS.jsonl", "weight": 2}]}}, "a weight"),
        ("SEQ_2_SEQ_LM", {"lora": {"target_modules": ["nope"]}}, "matches no module"),
    ],
)
def test_what_a_task_cannot_use_is_refused_in_one_line(
    make: Any, tmp_path: Path, task: str, change: dict[str, Any], words: str
):
    values = make(task, "run")
    for section, keys in change.items():
        values[section] = values[section] | keys if isinstance(keys, dict) else keys
    with pytest.raises(InputError, match=words) as refused:
        lorakit.train(values)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_a_model_without_the_tasks_form_is_named(make: Any, tiny_model: Path):
    values = make("SEQ_2_SEQ_LM", "run") | {"model": str(tiny_model)}
    with pytest.raises(InputError, match=r"no form for lora\.task_type SEQ_2_SEQ_LM"):
        lorakit.train(values)


@pytest.mark.exhaustive
def test_the_encoder_learns_a_task_far_beyond_the_most_frequent_label(tmp_path: Path):
    draw = random.Random(0)
    words = {
        "food": ["soup", "bread", "cheese", "apples", "rice", "cake", "pasta", "salad"],
        "animal": ["horse", "sparrow", "trout", "beetle", "goat", "fox", "whale", "wasp"],
        "tool": ["hammer", "saw", "drill", "pliers", "chisel", "wrench", "rasp", "axe"],
    }
    frames = ["we saw a {} today", "my uncle talked about {}", "is the {} old", "no {} here"]

    def rows(name: str, part: slice, count: int) -> Path:
        kinds = [draw.choice(list(words)) for _ in range(count)]
        made = [
            {"text": draw.choice(frames).format(draw.choice(words[kind][part])), "label": kind}
            for kind in kinds
        ]
        return write_rows(tmp_path / name, made)

    # The held-out words are others than those learned, so that the model has to know them.
    train, held = rows("train.jsonl", slice(0, 5), 96), rows("held.jsonl", slice(5, 8), 60)
    result = lorakit.train(
        {
            "model": "all-minilm-l6-v2",
            "dtype": "float32",
            "data": {"train": str(train), "eval": str(held)},
            "lora": {"task_type": "SEQ_CLS", "r": 8, "lora_alpha": 16},
            "training": {"num_train_epochs": 4, "learning_rate": 1e-3},
            "output_dir": str(tmp_path / "run"),
        },
        quiet=True,
    )
    opened = open_adapter(result.output_dir, dtype="float32")
    evaluation = evaluate_labels(opened, read_labelled(held, "SEQ_CLS"))
    assert evaluation.scores["accuracy"]["base"] < 0.5
    assert evaluation.scores["accuracy"]["tuned"] > 0.85
    assert evaluation.scores["f1"]["tuned"] > 0.85
