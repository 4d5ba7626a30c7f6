"""A run from recipe to adapter: what it leaves, what it divides by, and how it goes on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import lorakit
from lorakit.adapters.manifest import read_manifest
from lorakit.adapters.open import open_adapter
from lorakit.data.dataset import load_samples
from lorakit.data.masking import tokenize
from lorakit.errors import InputError, LorakitError
from lorakit.evaluation.held_out import mean_loss
from matrix import few
from small_runs import recipe, save_sums, weights
from tiny import byte_tokenizer


def test_a_run_leaves_an_adapter_its_record_its_metrics_and_its_checkpoints(
    tiny_model: Path, rows: Path, tmp_path: Path
):
    values = recipe(tiny_model, rows, tmp_path / "run", save_steps=2) | {"samples": 3}
    folder = lorakit.train(values).output_dir
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "lorakit.json",
        "lorakit-run.json",
        "metrics.jsonl",
        "monitor.jsonl",
        "samples.json",
        "report.html",
        "README.md",
        "checkpoint-4",
        "checkpoint-6",
    }
    manifest = json.loads((folder / "lorakit.json").read_text())
    assert manifest["base_model"] == str(tiny_model)
    assert manifest["recipe"]["lora"]["r"] == 4
    assert manifest["data"][0]["rows"] == 48
    assert len(manifest["data"][0]["sha256"]) == 64
    assert manifest["eval_loss"] < manifest["base_eval_loss"]
    assert manifest["train_tokens"] > manifest["supervised_tokens"] > 0
    for key in ("train_seconds", "tokens_per_second", "peak_memory_mb"):
        assert manifest[key] > 0
    assert manifest["seed"] == 42
    assert manifest["versions"]["torch"] == torch.__version__
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["eval_loss"] == manifest["eval_loss"]


def test_tokens_are_counted_without_padding(tiny_model: Path, rows: Path, tmp_path: Path):
    values = recipe(tiny_model, rows, tmp_path / "run", max_steps=-1, num_train_epochs=1)
    values["data"]["eval"] = 0
    result = lorakit.train(values)
    _, tokenizer = lorakit.load_model(tiny_model)
    tokenized = [tokenize(s, tokenizer, 1024) for s in load_samples(rows)]
    assert result.manifest.train_tokens == sum(len(row) for row in tokenized)
    assert result.manifest.supervised_tokens == sum(row.supervised for row in tokenized)


def test_the_losses_in_the_record_are_those_of_the_files(
    tiny_model: Path, rows: Path, tmp_path: Path
):
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"prompt": "7 + 8?", "completion": "15"}\n{"text": "free text"}\n')
    values = recipe(tiny_model, rows, tmp_path / "run")
    values["data"]["eval"] = str(held_out)
    result = lorakit.train(values)
    opened = open_adapter(result.output_dir, dtype="float32")
    samples = load_samples(held_out)
    tuned = mean_loss(opened.model, opened.tokenizer, samples, batch_size=1)
    with opened.model.disable_adapter():
        base = mean_loss(opened.model, opened.tokenizer, samples, batch_size=2)
    assert result.manifest.eval_loss == pytest.approx(tuned, rel=1e-5)
    assert result.manifest.base_eval_loss == pytest.approx(base, rel=1e-5)


PACKS = {"packing": True, "max_length": 100}
WHOLE = {"share_prefixes": False}
DIVIDED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # keys of `data` and of `training`, where they are not those of all rows in one line
    "lines": (WHOLE, {"per_device_train_batch_size": 4}),
    "single": ({}, {"per_device_train_batch_size": 1}),
    "behind prefixes": ({}, {}),
    "fours behind prefixes": ({}, {"per_device_train_batch_size": 4}),
    "padded": ({"padding_free": False}, {}),
    "pads": ({"padding_free": False}, {"per_device_train_batch_size": 4}),
    "packed": (
        PACKS | WHOLE,
        {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 48},
    ),
    "checkpointed": (WHOLE, {"gradient_checkpointing": True}),
}


def undivided(model: Path, rows: Path, folder: Path, data: Any, **training: Any) -> Any:
    """Two steps of all rows in float64."""
    everything = len(rows.read_text().splitlines())
    size = training.setdefault("per_device_train_batch_size", everything)
    training.setdefault("gradient_accumulation_steps", everything // size)
    training |= {"eval_strategy": "no", "max_steps": 2, "num_train_epochs": 2}
    training["label_smoothing_factor"] = 0.1
    values = recipe(model, rows, folder, **training) | {"dtype": "float64"}
    values["data"] |= {"eval": 0} | data
    return lorakit.train(values, quiet=True)


@pytest.fixture(scope="module")
def in_one_line(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Rows, and the run whose steps take all of them in one line."""
    folder = tmp_path_factory.mktemp("line")
    rows = save_sums(folder / "rows.jsonl")
    return rows, undivided(tiny_model, rows, folder / "run", WHOLE)


@pytest.mark.parametrize("name", few(list(DIVIDED), "fours behind prefixes", "packed"))
def test_however_a_step_is_divided_into_batches_it_is_the_same_step(
    name: str, in_one_line: Any, tiny_model: Path, tmp_path: Path
):
    """All rows in each step: in one line or padded, one by one, packed, behind shared prefixes."""
    rows, whole = in_one_line
    data, training = DIVIDED[name]
    result = undivided(tiny_model, rows, tmp_path / "run", data, **training)
    assert result.manifest.train_tokens == whole.manifest.train_tokens
    # Norms round to float32, which Adam makes larger where a gradient is next to nothing.
    close = 1e-7 if "prefixes" in name else 1e-9
    found = weights(result.output_dir)
    for key, tensor in weights(whole.output_dir).items():
        assert (tensor - found[key]).abs().max() < close, key


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(
    tiny_model: Path, rows: Path, tmp_path: Path
):
    one, again, other = (
        (lorakit.train(recipe(tiny_model, rows, tmp_path / name, seed=seed)).output_dir)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    read = [(f / "adapter_model.safetensors").read_bytes() for f in (one, again, other)]
    assert read[0] == read[1] != read[2]


@pytest.mark.exhaustive
def test_a_run_killed_in_the_middle_resumes_to_the_bytes_of_an_undisturbed_one(
    tiny_model: Path, rows: Path, tmp_path: Path
):
    # Dropout and several epochs: the random state and the order of rows must go on too.
    def values(name: str) -> dict[str, Any]:
        made = recipe(tiny_model, rows, tmp_path / name, max_steps=40, save_steps=3)
        made["lora"]["lora_dropout"] = 0.1
        return made

    undisturbed = lorakit.train(values("undisturbed"))

    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(values("killed")))
    command = [sys.executable, "-m", "lorakit", "train", str(path)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not (tmp_path / "killed" / "checkpoint-6").is_dir():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "lorakit.json").exists()

    resumed = subprocess.run([*command, "--resume"], capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from checkpoint-" in resumed.stderr
    first, second = tmp_path / "undisturbed", tmp_path / "killed"
    name = "adapter_model.safetensors"
    assert (first / name).read_bytes() == (second / name).read_bytes()
    manifest = read_manifest(second)
    assert manifest is not None
    assert manifest.eval_loss == undisturbed.eval_loss
    assert manifest.train_tokens == undisturbed.manifest.train_tokens
    losses = [
        [(m["step"], m.get("loss"), m.get("eval_loss")) for m in map(json.loads, lines)]
        for lines in ((f / "metrics.jsonl").read_text().splitlines() for f in (first, second))
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    "saving", few([{"save_steps": 5}, {"save_strategy": "best"}], {"save_strategy": "best"})
)
def test_the_best_checkpoint_is_kept_and_is_what_a_run_leaves_when_asked(
    tiny_model: Path, rows: Path, tmp_path: Path, saving: dict[str, Any]
):
    # A learning rate at which the held-out loss rises again.
    values = recipe(tiny_model, rows, tmp_path / "run", max_steps=60, learning_rate=0.1)
    values["training"] |= {
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "eval_steps": 5,
        "save_total_limit": 1,
    } | saving
    result = lorakit.train(values)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    best = min(losses, key=losses.__getitem__)
    assert best < 60, "the test needs a run that gets worse"
    assert result.eval_loss == pytest.approx(losses[best])
    kept = weights(tmp_path / "run" / f"checkpoint-{best}")
    for name, tensor in weights(tmp_path / "run").items():
        assert torch.equal(tensor, kept[name]), name


def test_a_checkpoint_that_was_being_written_does_not_count(
    tiny_model: Path, rows: Path, tmp_path: Path
):
    values = recipe(tiny_model, rows, tmp_path / "run", save_steps=2)
    lorakit.train(values)
    folder = tmp_path / "run"
    bytes_before = (folder / "adapter_model.safetensors").read_bytes()
    for name in ("lorakit.json", "adapter_model.safetensors", "adapter_config.json"):
        (folder / name).unlink()
    half = folder / ".saving" / "checkpoint-8"
    half.mkdir(parents=True)
    (half / "adapter_model.safetensors").write_bytes(b"half")
    lorakit.train(values, resume=True)
    assert (folder / "adapter_model.safetensors").read_bytes() == bytes_before


def test_resuming_a_finished_run_leaves_it_as_it_is(tiny_model: Path, rows: Path, tmp_path: Path):
    values = recipe(tiny_model, rows, tmp_path / "run")
    first = lorakit.train(values)
    before = (tmp_path / "run" / "lorakit.json").read_bytes()
    assert lorakit.train(values, resume=True).manifest == first.manifest
    assert (tmp_path / "run" / "lorakit.json").read_bytes() == before


def test_resuming_with_another_recipe_or_other_data_names_the_difference(
    tiny_model: Path, rows: Path, tmp_path: Path
):
    values = recipe(tiny_model, rows, tmp_path / "run")
    lorakit.train(values)
    (tmp_path / "run" / "lorakit.json").unlink()
    with pytest.raises(InputError, match=r"lora\.r was 4 and is 8"):
        lorakit.train(values, "lora.r=8", resume=True)
    rows.write_text(rows.read_text() + '{"prompt": "1", "completion": "1"}\n')
    with pytest.raises(InputError, match="sha256"):
        lorakit.train(values, resume=True)


def test_a_folder_that_holds_something_is_never_written_into(
    tiny_model: Path, rows: Path, tmp_path: Path
):
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="holds something else"):
        lorakit.train(recipe(tiny_model, rows, occupied))
    with pytest.raises(InputError, match="holds something else"):
        lorakit.train(recipe(tiny_model, rows, occupied), resume=True)
    assert [path.name for path in occupied.iterdir()] == ["thesis.txt"]
    values = recipe(tiny_model, rows, tmp_path / "run", max_steps=1)
    lorakit.train(values)
    with pytest.raises(InputError, match="a finished run: add --resume"):
        lorakit.train(values)


def test_a_loss_that_is_no_number_stops_the_run_and_says_so(
    tiny_model: Path, rows: Path, tmp_path: Path
):
    values = recipe(tiny_model, rows, tmp_path / "run", learning_rate=1e30, max_grad_norm=0)
    values["training"]["warmup_steps"] = 0
    with pytest.raises(LorakitError, match=r"is (nan|inf) at step"):
        lorakit.train(values)
    assert not (tmp_path / "run" / "lorakit.json").exists()


def test_a_model_without_a_template_gets_a_stated_one_that_travels_with_the_adapter(
    tiny_model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model, tokenizer = lorakit.load_model(tiny_model)
    tokenizer.chat_template = None
    bare = tmp_path / "bare"
    model.save_pretrained(bare)
    tokenizer.save_pretrained(bare)
    result = lorakit.train(recipe(bare, rows, tmp_path / "run", max_steps=1))
    assert "no chat template" in capsys.readouterr().err
    assert "### Assistant:" in str(open_adapter(result.output_dir).tokenizer.chat_template)


def test_plain_text_for_a_model_without_a_template_leaves_no_template(
    tiny_model: Path, tmp_path: Path
):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "chat_template.jinja").unlink()
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(f'{{"text": "line {n}"}}\n' for n in range(12)))
    result = lorakit.train(recipe(folder, path, tmp_path / "run"), quiet=True)
    assert not (result.output_dir / "chat_template.jinja").exists()
    assert open_adapter(result.output_dir).tokenizer.chat_template is None


def test_what_a_model_cannot_is_said_and_done_otherwise(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from transformers import BloomConfig, BloomForCausalLM

    tokenizer = byte_tokenizer()
    config = BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=1, n_head=2)
    BloomForCausalLM(config).save_pretrained(tmp_path / "bloom")
    tokenizer.save_pretrained(tmp_path / "bloom")
    values = recipe(tmp_path / "bloom", rows, tmp_path / "padded", max_steps=2)
    values["data"] |= {"packing": True, "max_length": 100}
    assert not lorakit.train(values).manifest.padding_free
    shown = capsys.readouterr().err
    assert "rows are padded" in shown
    assert "BloomForCausalLM has an attention of its own" in shown
    assert "own logits" not in shown
    values["lora"]["modules_to_save"] = ["lm_head"]
    values["output_dir"] = str(tmp_path / "head")
    lorakit.train(values)
    assert "the loss is taken of the model's own logits" in capsys.readouterr().err


def test_peft_loads_what_train_leaves(tiny_model: Path, rows: Path, tmp_path: Path):
    import peft
    from transformers import AutoModelForCausalLM

    folder = lorakit.train(recipe(tiny_model, rows, tmp_path / "run")).output_dir
    ours = open_adapter(folder, dtype="float32").model
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, folder).eval()
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        difference = (ours(ids).logits - theirs(ids).logits).abs().max()
    assert difference < 1e-6
