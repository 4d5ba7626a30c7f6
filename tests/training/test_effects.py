"""A setting that the others leave without effect is refused by name before anything is written."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import lorakit
from lorakit.cli.main import main
from lorakit.errors import InputError
from lorakit.training.recipe import load_recipe
from lorakit.training.setup import set_up
from lorakit.training.watch import unchanged_modules
from small_runs import lines, recipe

BASE = {"model": "m", "data": {"train": "rows.jsonl"}, "output_dir": "out"}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["training.eval_steps=5"], "eval_strategy=steps"),
        (["training.eval_strategy=no", "training.eval_delay=2"], "eval_delay"),
        (["data.eval=0", "training.eval_on_start=true"], "eval_on_start needs held-out rows"),
        (["data.eval=0", "training.load_best_model_at_end=true"], "load_best_model_at_end needs"),
        (["data.eval=0", "training.save_strategy=best"], "save_strategy=best needs"),
        (["data.eval=0", "training.lr_scheduler_type=greedy"], "lr_scheduler_type=greedy needs"),
        (
            ["training.eval_strategy=no", "training.lr_scheduler_type=reduce_lr_on_plateau"],
            "needs evaluations",
        ),
        (["training.metric_for_best_model=loss"], "metric_for_best_model has no effect"),
        (["training.greater_is_better=false"], "greater_is_better has no effect"),
        (
            ["training.load_best_model_at_end=true", "training.greater_is_better=true"],
            "loss is better when it is smaller",
        ),
        (["training.save_strategy=epoch", "training.save_steps=7"], "save_steps has no effect"),
        (["training.save_strategy=no", "training.save_only_model=true"], "save_only_model has"),
        (["training.gradient_checkpointing_kwargs={use_reentrant: true}"], "without training.act"),
        (
            ["training.gradient_checkpointing=true", "training.activation_checkpointing=false"],
            "are one setting",
        ),
        (["training.dataloader_prefetch_factor=2"], "dataloader_num_workers"),
        (["training.dataloader_persistent_workers=true"], "dataloader_num_workers"),
        (["training.dataloader_multiprocessing_context=fork"], "dataloader_num_workers"),
        (["training.run_name=x"], "run_name has no effect without a tracker"),
        (["training.report_to=wandb", "training.project=x"], "report_to=trackio"),
        (["training.trackio_space_id=x"], "report_to=trackio"),
        (["training.label_smoothing_factor=1"], "should be in"),
        (["training.label_smoothing_factor=-0.1"], "should be in"),
        (["training.neftune_noise_alpha=-5"], "0 or more"),
        (["training.adam_beta2=1"], "adam_beta2: should be in"),
        (["training.dataloader_num_workers=-1"], "0 or more"),
        (["training.log_level=loud"], "one of passive"),
        (["lora.loftq_config={loftq_bits: 4}"], "lora.init_lora_weights=loftq"),
        (["lora.eva_config={rho: 2}", "lora.init_lora_weights=pissa"], "init_lora_weights=eva"),
        (["training.warmup_steps=1.5"], "whole number"),
        (
            [
                "training.gradient_checkpointing=true",
                "training.gradient_checkpointing_kwargs={use_reentrent: true}",
            ],
            "did you mean 'use_reentrant'",
        ),
    ],
)
def test_a_recipe_whose_settings_undo_each_other_is_refused(overrides: list[str], words: str):
    with pytest.raises(InputError, match=words):
        load_recipe(BASE, overrides)


def test_a_recipe_written_out_with_all_its_values_is_taken_again():
    for overrides in (
        ["training.save_strategy=epoch"],
        ["data.eval=0"],
        ["training.eval_strategy=steps", "training.eval_steps=5"],
        ["training.load_best_model_at_end=true", "training.metric_for_best_model=eval_loss"],
        ["early_stopping_patience=2", "training.greater_is_better=false"],
    ):
        whole = load_recipe(BASE, overrides)
        assert load_recipe(whole.to_dict()) == whole


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ({"report_to": "wandb"}, "report_to"),
        ({"report_to": "nowhere"}, "report_to"),
        ({"optim": "galore_adamw"}, "optim=galore_adamw projects"),
        ({"optim": "apollo_adamw"}, "optim=apollo_adamw projects"),
        ({"optim": "lomo"}, "optim=lomo"),
        ({"optim": "grokadamw"}, "optim=grokadamw"),
        ({"optim_args": "momentum=0.9"}, "momentum has no effect"),
        ({"optim": "sgd", "optim_args": "momentumm=0.9"}, "momentumm has no effect"),
        ({"optim": "sgd", "optim_args": "momentum=much"}, "optim_args"),
        ({"optim": "sgd", "optim_args": "momentum=-1"}, "Invalid momentum"),
        ({"optim": "sgd", "adam_beta1": 0.8}, "adam_beta1 has no effect"),
        ({"optim": "adafactor", "adam_epsilon": 1e-6}, "adam_epsilon has no effect"),
        ({"optim": "rmsprop", "adam_beta2": 0.9}, "adam_beta2 has no effect"),
        ({"load_best_model_at_end": True, "metric_for_best_model": "f1"}, "gives no 'f1'"),
        ({"tf32": True}, "tf32"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr"),
        (
            {"load_best_model_at_end": True, "save_steps": 3},
            "load_best_model_at_end",
        ),
    ],
)
def test_what_only_the_libraries_can_tell_is_refused_before_anything_is_written(
    tiny_model: Path, rows: Path, tmp_path: Path, training: dict[str, Any], words: str
):
    values = recipe(tiny_model, rows, tmp_path / "run")
    values["training"] |= training
    with pytest.raises(InputError, match=words):
        lorakit.train(values, quiet=True)
    assert not (tmp_path / "run").exists()


def test_what_one_process_does_not_read_is_noticed(tiny_model: Path, rows: Path, tmp_path: Path):
    values = recipe(tiny_model, rows, tmp_path / "run", ddp_bucket_cap_mb=5, ddp_timeout=60)
    [notice] = [line for line in set_up(load_recipe(values)).notices if "ddp" in line]
    assert "ddp_bucket_cap_mb, ddp_timeout" in notice


def test_a_run_of_one_step_learns(tiny_model: Path, tmp_path: Path):
    five = tmp_path / "five.jsonl"
    five.write_text('{"prompt": "a", "completion": "b"}\n' * 5)
    values = recipe(tiny_model, five, tmp_path / "run", num_train_epochs=1)
    del values["training"]["max_steps"]
    values["data"]["eval"] = 0
    result = lorakit.train(values, quiet=True)
    assert result.manifest.steps == 1
    assert not result.manifest.warnings
    [line] = lines(tmp_path / "run" / "metrics.jsonl")
    assert line["learning_rate"] == 1e-2


def test_a_run_that_changes_nothing_is_warned_of_in_the_record_and_the_report(
    tiny_model: Path, rows: Path, tmp_path: Path
):
    values = recipe(tiny_model, rows, tmp_path / "run", max_steps=2)
    values["training"] |= {"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 0}
    options = {"num_stable_steps": 0, "num_decay_steps": 0}
    values["training"]["lr_scheduler_kwargs"] = options
    with pytest.raises(InputError, match="learning rate is 0 at each"):
        lorakit.train(values, quiet=True)

    del values["training"]["lr_scheduler_type"], values["training"]["lr_scheduler_kwargs"]
    values["training"] |= {"optim": "sgd", "learning_rate": 1e-60}
    result = lorakit.train(values, quiet=True)
    [warning] = result.manifest.warnings
    assert warning["warning"] == "unchanged"
    assert "the adapter is unchanged" in (tmp_path / "run" / "report.html").read_text()
    record = json.loads((tmp_path / "run" / "lorakit.json").read_text())
    assert record["warnings"] == [warning]


def test_modules_that_no_gradient_reaches_are_counted(tiny_model: Path, rows: Path, tmp_path: Path):
    values = recipe(tiny_model, rows, tmp_path / "run", max_steps=2)
    setup = set_up(load_recipe(values))
    trainer = setup.trainer()
    frozen = [p for n, p in setup.model.named_parameters() if "layers.0" in n and "lora_" in n]
    for parameter in frozen:
        parameter.register_hook(lambda gradient: gradient * 0)
    trainer.train()
    assert trainer.start is not None
    modules, total = unchanged_modules(trainer.start, setup.model)
    assert (len(modules), total) == (7, 14)
    assert all("layers.0" in module for module in modules)


def test_the_command_ends_with_1_where_nothing_was_learned_and_leaves_the_record(
    tiny_model: Path,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    keys = {
        "output_dir": tmp_path / "run",
        "data.eval": 0,
        "samples": 0,
        "training.max_steps": 1,
        "training.optim": "sgd",
        "training.learning_rate": 1e-60,
    }
    given = [f"{key}={value}" for key, value in keys.items()]
    options = ["--model", str(tiny_model), "--data", str(rows)]
    monkeypatch.setattr(sys, "argv", ["lorakit", "train", *options, *given])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 1
    assert "error: nothing was learned" in capsys.readouterr().err
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "run" / "lorakit.json").is_file()
