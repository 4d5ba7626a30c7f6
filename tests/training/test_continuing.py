"""What `--continue` changes takes effect, or is refused by name, or is nothing to the adapter."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

import lorakit
from lorakit.errors import InputError
from lorakit.lora.config import LoraConfig
from lorakit.training.arguments import ARGUMENTS
from lorakit.training.continuing import CHANGES, change_of, refuse
from lorakit.training.differences import Difference
from lorakit.training.recipe import DataRecipe, Recipe, TrainingRecipe
from matrix import few
from small_runs import lines, recipe

Start = tuple[dict[str, Any], Path]


def rows_at(path: Path, count: int, first: int = 0) -> Path:
    texts = [f'{{"prompt": "{n} + {n}?", "completion": "it is {2 * n}"}}\n' for n in range(count)]
    path.write_text("".join(texts[first:]))
    return path


@pytest.fixture(scope="module")
def start(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """A run of one epoch, six steps, to continue from."""
    folder = tmp_path_factory.mktemp("start")
    rows_at(folder / "other.jsonl", 30, first=6)
    shutil.copytree(tiny_model, folder / "model")
    values = recipe(folder / "model", rows_at(folder / "rows.jsonl", 24), folder / "run")
    values["data"]["eval"] = 0
    values["samples"] = 0
    values["training"] |= {
        "max_steps": -1,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 4,
        "lr_scheduler_type": "linear",
    }
    lorakit.train(values, quiet=True)
    return values, folder


def changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(json.dumps(values))
    for key, value in changes.items():
        *sections, last = key.split(".")
        place = made
        for section in sections:
            place = place[section]
        place[last] = value
    return made


def continued(start: Start, output: Path, **changes: Any) -> Path:
    """The run, resumed up to two epochs with these changes; keys have `__` for their dots."""
    values, folder = start
    shutil.copytree(folder / "run", output)
    new = {"training.num_train_epochs": 2, "output_dir": str(output)}
    new |= {key.replace("__", "."): value for key, value in changes.items()}
    return lorakit.train(
        changed(values, new), resume=True, accept_changes=True, quiet=True
    ).output_dir


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def unchanged(start: Start, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What comes out where nothing but the number of epochs is changed."""
    return weights(continued(start, tmp_path_factory.mktemp("unchanged") / "run"))


def test_every_recipe_key_is_placed_and_nothing_else_is():
    fixed = {"other_fields", "inference_mode", "base_model_name_or_path", "revision"}
    honoured = {name for name, own in ARGUMENTS.items() if own.treatment == "honoured"}
    installed = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    keys = {
        *(set(Recipe.model_fields) - {"data", "lora", "training"}),
        *(f"data.{name}" for name in DataRecipe.model_fields),
        *(f"lora.{f.name}" for f in dataclasses.fields(LoraConfig) if f.name not in fixed),
        *(f"training.{name}" for name in {*TrainingRecipe.model_fields, *(honoured & installed)}),
    }
    assert not keys - set(CHANGES)
    beside = {"data", "base", "template", "processes", "parent", "teacher", "rewards", "lora.parts"}
    beside |= {"environment"}
    older = {f"training.{name}" for name in honoured - installed}
    assert not set(CHANGES) - keys - beside - older
    assert change_of("training.newer_than_this").effect == "refused"


EFFECTS: dict[str, dict[str, Any]] = {
    "dtype": {"dtype": "float64"},
    "data.train": {"data__train": "other.jsonl"},
    "data.max_length": {"data__max_length": 30},
    "data.columns": {"data__columns": {"prompt": "completion", "completion": "prompt"}},
    "data.limit": {"data__limit": 12, "training__num_train_epochs": 3},
    "data.padding_free": {"data__padding_free": False},
    "data.packing": {"data__packing": True, "data__max_length": 90},
    "lora.lora_alpha": {"lora__lora_alpha": 24},
    "lora.lora_dropout": {"lora__lora_dropout": 0.3},
    "lora.use_rslora": {"lora__use_rslora": True},
    "lora.alpha_pattern": {"lora__alpha_pattern": {"q_proj": 64}},
    "training.num_train_epochs": {"training__num_train_epochs": 3},
    "training.max_steps": {"training__max_steps": 8},
    "training.per_device_train_batch_size": {"training__per_device_train_batch_size": 2},
    "training.gradient_accumulation_steps": {"training__gradient_accumulation_steps": 2},
    "training.learning_rate": {"training__learning_rate": 1e-4},
    "training.lr_scheduler_type": {"training__lr_scheduler_type": "constant"},
    "training.lr_scheduler_kwargs": {
        "training__lr_scheduler_type": "cosine_with_restarts",
        "training__lr_scheduler_kwargs": {"num_cycles": 3},
    },
    "training.warmup_steps": {"training__warmup_steps": 9},
    "training.optim": {"training__optim": "sgd"},
    "training.optim_args": {"training__optim": "sgd", "training__optim_args": "momentum=0.9"},
    "training.weight_decay": {"training__weight_decay": 0.5},
    "training.adam_beta1": {"training__adam_beta1": 0.5},
    "training.adam_beta2": {"training__adam_beta2": 0.9},
    "training.adam_epsilon": {"training__adam_epsilon": 1e-2},
    "training.max_grad_norm": {"training__max_grad_norm": 1e-3},
    "training.loraplus_lr_ratio": {"training__loraplus_lr_ratio": 4.0},
    "training.neftune_noise_alpha": {"training__neftune_noise_alpha": 9.0},
}


USUAL = (
    *("data.train", "data.packing", "lora.lora_alpha", "lora.lora_dropout", "training.optim"),
    *("training.num_train_epochs", "training.per_device_train_batch_size"),
    *("training.learning_rate", "training.lr_scheduler_type", "training.neftune_noise_alpha"),
)
"""One key of each kind: rows, batches, layers, schedule, optimiser, a hook of the model."""

SHOWN_ELSEWHERE = {
    # by other tests of this file, or of test_moved_runs.py
    *(
        "data",
        "data.eval",
        "data.too_long",
        "template",
        "chat_template",
        "rewards",  # see rl/test_kept_completions.py
        "training.load_best_model_at_end",
    ),
    # which weights are left: see test_run.py and test_interrupt.py
    *("early_stopping_patience", "training.metric_for_best_model", "training.greater_is_better"),
    *("training.eval_strategy", "training.eval_steps", "training.eval_delay"),
    # of the loss, and of the environment's files: their tests are their own
    *("training.label_smoothing_factor", "environment"),
    # the same numbers, computed elsewhere or otherwise, but for their rounding
    *("quantization", "data.share_prefixes", "processes", "training.fsdp", "training.fsdp_config"),
    *("training.tf32", "training.use_cpu", "training.full_determinism"),
}


def test_the_effect_of_every_key_that_has_one_is_shown():
    assert {key for key, own in CHANGES.items() if own.effect == "effect"} == {
        *EFFECTS,
        *SHOWN_ELSEWHERE,
    }


@pytest.mark.parametrize("key", few(list(EFFECTS), *USUAL))
def test_a_changed_key_takes_effect_and_is_recorded(
    key: str, start: Start, unchanged: bytes, tmp_path: Path
):
    changes = dict(EFFECTS[key])
    if "data__train" in changes:
        changes["data__train"] = str(start[1] / changes["data__train"])
    run = continued(start, tmp_path / "run", **changes)
    assert weights(run) != unchanged
    [entry] = json.loads((run / "lorakit.json").read_text())["continued"]
    assert entry["step"] == 6
    assert any(line.startswith(key) for line in entry["changes"])
    assert change_of(key).effect == "effect"
    EFFECTS_SEEN[key] = weights(run)


EFFECTS_SEEN: dict[str, bytes] = {}


def test_no_two_changes_come_to_the_same():
    seen: dict[bytes, list[str]] = {}
    for key, came_out in EFFECTS_SEEN.items():
        seen.setdefault(came_out, []).append(key)
    assert [keys for keys in seen.values() if len(keys) > 1] == []


@pytest.mark.parametrize("key", [k for k, c in CHANGES.items() if c.effect == "refused"])
def test_a_key_that_cannot_take_effect_is_refused_by_its_name(key: str, tmp_path: Path):
    values = {"data": {"eval": 0}, "training": {}}
    with pytest.raises(InputError, match=rf"with these values: {key} was 1 and is 2, and .{{9}}"):
        refuse([Difference(key, 1, 2)], values, tmp_path)


def test_a_refused_change_leaves_the_run_as_it_was(start: Start, tmp_path: Path):
    values, folder = start
    before = {p: p.read_bytes() for p in (folder / "run").rglob("*") if p.is_file()}
    for change, said in (
        ({"lora.r": 8}, r"lora\.r was 4 and is 8, and .*shapes"),
        ({"training.seed": 7}, r"training\.seed was"),
        ({"data.eval": 0.5}, r"data\.eval was .* would be held out"),
        ({"training.max_steps": 4}, r"at step 6, past its end at step 4"),
        ({"training.learning_rate": 1e-5}, r"no step is left.*training\.learning_rate"),
        ({"training.num_train_epochs": 0.5}, r"past its end at step 3"),
    ):
        new = changed(values, {"training.num_train_epochs": 1} | change)
        with pytest.raises(InputError, match=said):
            lorakit.train(new, resume=True, accept_changes=True, quiet=True)
    assert before == {p: p.read_bytes() for p in (folder / "run").rglob("*") if p.is_file()}


def test_what_is_nothing_to_the_adapter_does_what_it_says_and_leaves_the_same_bytes(
    start: Start, unchanged: bytes, tmp_path: Path
):
    run = continued(
        start,
        tmp_path / "run",
        training__logging_steps=3,
        training__save_steps=2,
        training__save_total_limit=9,
        training__per_device_eval_batch_size=2,
        samples=1,
    )
    assert weights(run) == unchanged
    logged = [line["step"] for line in lines(run / "metrics.jsonl") if "loss" in line]
    assert logged == [1, 2, 3, 4, 5, 6, 9, 12]
    saved = {int(path.name.rpartition("-")[2]) for path in run.glob("checkpoint-*")}
    assert {8, 10, 12} <= saved
    assert json.loads((run / "samples.json").read_text())


@pytest.mark.parametrize(
    "schedule",
    few(
        [
            {"training__lr_scheduler_type": "cosine", "training__learning_rate": 3e-3},
            {"training__lr_scheduler_type": "constant"},
            {"training__warmup_steps": 10},
        ],
        {"training__lr_scheduler_type": "cosine", "training__learning_rate": 3e-3},
    ),
)
def test_the_schedule_goes_on_where_a_run_of_the_new_recipe_would_be(
    schedule: dict[str, Any], start: Start, tmp_path: Path
):
    values, _ = start
    run = continued(start, tmp_path / "run", **schedule)
    new = {key.replace("__", "."): value for key, value in schedule.items()}
    new |= {"training.num_train_epochs": 2, "output_dir": str(tmp_path / "whole")}
    whole = lorakit.train(changed(values, new), quiet=True).output_dir
    rates = [
        {
            x["step"]: x["learning_rate"]
            for x in lines(folder / "metrics.jsonl")
            if x["step"] > 6 and "learning_rate" in x
        }
        for folder in (run, whole)
    ]
    assert len(rates[0]) == 6
    assert rates[0] == pytest.approx(rates[1], rel=1e-12)


def test_rates_by_groups_and_by_evaluations_go_on_too(start: Start, tmp_path: Path):
    values, folder = start
    made = changed(
        values,
        {
            "training.lr_scheduler_type": "reduce_lr_on_plateau",
            "training.lr_scheduler_kwargs": {"patience": 0, "threshold": 10.0, "factor": 0.5},
            "training.eval_strategy": "steps",
            "training.eval_steps": 1,
            "data.eval": str(folder / "other.jsonl"),
            "training.metric_for_best_model": "loss",
            "training.load_best_model_at_end": True,
            "training.save_steps": 1,
            "output_dir": str(tmp_path / "plateau"),
        },
    )
    lorakit.train(made, quiet=True)
    logged = [x for x in lines(tmp_path / "plateau" / "metrics.jsonl") if "learning_rate" in x]
    last = logged[-1]["learning_rate"]
    assert last < values["training"]["learning_rate"]
    halved = {"training.learning_rate": values["training"]["learning_rate"] / 2}
    longer = changed(made, halved | {"training.max_steps": 7})
    lorakit.train(longer, resume=True, accept_changes=True, quiet=True)
    [new] = [
        x for x in lines(tmp_path / "plateau" / "metrics.jsonl") if x["step"] == 7 and "loss" in x
    ]
    assert new["learning_rate"] == pytest.approx(last / 4)  # halved behind that step too


@pytest.mark.parametrize(
    "size",
    few(
        [{"batch_size": 2, "steps": 9}, {"batch_size": 12, "steps": 4}],
        {"batch_size": 12, "steps": 4},
    ),
)
def test_with_another_batch_size_each_row_of_the_epoch_is_still_learned_once(
    size: dict[str, int], start: Start, tmp_path: Path
):
    values, _ = start
    half = changed(values, {"training.max_steps": 3, "output_dir": str(tmp_path / "run")})
    lorakit.train(half, quiet=True)
    new = {
        "training.max_steps": -1,
        "training.per_device_train_batch_size": size["batch_size"],
        "training.save_steps": 1,
        "training.save_total_limit": 9,
    }
    result = lorakit.train(changed(half, new), resume=True, accept_changes=True, quiet=True)
    whole = json.loads((start[1] / "run" / "lorakit.json").read_text())
    assert result.manifest.train_tokens == whole["train_tokens"]
    assert result.manifest.steps == size["steps"]
    # Killed behind the change and resumed without one, it goes on as it went.
    for name in ("lorakit.json", "adapter_config.json"):
        (tmp_path / "run" / name).unlink()
    shutil.rmtree(tmp_path / "run" / f"checkpoint-{size['steps']}")
    again = lorakit.train(changed(half, new), resume=True, quiet=True)
    assert again.manifest.train_tokens == whole["train_tokens"]
    assert again.manifest.steps == size["steps"]


def test_a_best_by_other_held_out_rows_is_not_the_best_any_more(start: Start, tmp_path: Path):
    values, folder = start
    made = changed(
        values,
        {
            "training.load_best_model_at_end": True,
            "training.eval_strategy": "steps",
            "training.eval_steps": 3,
            "training.save_steps": 3,
            "training.save_total_limit": 9,
            "data.eval": str(folder / "rows.jsonl"),  # what is learned: the loss is low
            "output_dir": str(tmp_path / "run"),
        },
    )
    lorakit.train(made, quiet=True)
    new = {"data.eval": str(folder / "other.jsonl"), "training.num_train_epochs": 2}
    run = lorakit.train(changed(made, new), resume=True, accept_changes=True, quiet=True).output_dir
    later = [weights(run / f"checkpoint-{step}") for step in (9, 12)]
    assert weights(run) in later


def test_another_chat_template_is_a_change(start: Start, tmp_path: Path):
    values, folder = start
    shutil.copytree(folder / "model", tmp_path / "model")
    template = tmp_path / "model" / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant", "helper"))
    new = changed(values, {"model": str(tmp_path / "model"), "training.num_train_epochs": 2})
    with pytest.raises(InputError, match=r"template was"):
        lorakit.train(new, resume=True, quiet=True)


def test_a_finished_run_without_checkpoints_is_not_started_over(start: Start, tmp_path: Path):
    values, _ = start
    made = changed(values, {"training.save_strategy": "no", "output_dir": str(tmp_path / "run")})
    lorakit.train(made, quiet=True)
    before = weights(tmp_path / "run")
    longer = changed(made, {"training.num_train_epochs": 2})
    with pytest.raises(InputError, match="without a checkpoint"):
        lorakit.train(longer, resume=True, accept_changes=True, quiet=True)
    assert weights(tmp_path / "run") == before
