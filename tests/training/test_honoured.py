"""Every honoured field of `TrainingArguments` has a test of what it does."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.utils import logging

import lorakit
from lorakit.errors import InputError
from lorakit.training.arguments import ARGUMENTS
from lorakit.training.recipe import load_recipe
from lorakit.training.setup import set_up
from lorakit.training.trainer import LoraTrainer
from matrix import few
from small_runs import lines, recipe, weights

PASSED_ON: dict[str, Any] = {
    # What trackers, torchrun's processes and transformers' messages read, under their own names.
    "run_name": "mine", "project": "p", "trackio_space_id": "a/b", "trackio_bucket_id": "b",
    "trackio_static_space_id": "c",
    "ddp_find_unused_parameters": True, "ddp_bucket_cap_mb": 3, "ddp_broadcast_buffers": False,
    "ddp_static_graph": True, "ddp_timeout": 77,
    "log_level_replica": "error", "log_on_each_node": False,
}  # fmt: skip

ELSEWHERE = {
    # field: the test that shows what it does
    "num_train_epochs": "test_run.py",
    "gradient_accumulation_steps": "test_run.py",
    "per_device_train_batch_size": "test_run.py",
    "ddp_backend": "test_distributed.py",
    "neftune_noise_alpha": "test_neftune.py",
    "gradient_checkpointing": "test_run.py",
    "load_best_model_at_end": "test_run.py",
    "metric_for_best_model": "test_effects.py",
    "greater_is_better": "test_effects.py",
    "report_to": "test_watch.py",
    "fsdp": "test_distributed.py",
    "fsdp_config": "test_distributed.py",
    "deepspeed": "test_distributed.py",
}

HERE = [
    "label_smoothing_factor",
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim",
    "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "max_steps", "seed", "full_determinism", "use_cpu", "tf32", "torch_empty_cache_steps",
    "activation_checkpointing", "activation_checkpointing_kwargs",
    "gradient_checkpointing_kwargs", "dataloader_num_workers", "dataloader_pin_memory",
    "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context", "eval_strategy", "eval_steps", "eval_delay",
    "eval_on_start", "per_device_eval_batch_size", "logging_strategy", "logging_steps",
    "logging_first_step", "log_level", "save_strategy", "save_steps", "save_total_limit",
    "save_only_model",
]  # fmt: skip


def test_each_honoured_field_has_a_test():
    honoured = {name for name, own in ARGUMENTS.items() if own.treatment == "honoured"}
    assert honoured == {*HERE, *PASSED_ON, *ELSEWHERE}
    for name, file in ELSEWHERE.items():
        assert name in Path(__file__).with_name(file).read_text(), name
    assert all(Path(__file__).read_text().count(name) > 1 for name in HERE)


@pytest.fixture
def make(tiny_model: Path, rows: Path, tmp_path: Path) -> Any:
    """The trainer of a small recipe with these training arguments."""

    def made(**training: Any) -> LoraTrainer:
        values = recipe(tiny_model, rows, tmp_path / "run", **training)
        return set_up(load_recipe(values)).trainer()

    return made


@pytest.fixture
def run(tiny_model: Path, rows: Path, tmp_path: Path) -> Any:
    """Trains a small recipe with these training arguments and gives its folder."""

    def trained(name: str, **training: Any) -> Path:
        values = recipe(tiny_model, rows, tmp_path / name, **training) | {"samples": 0}
        return lorakit.train(values, quiet=True).output_dir

    return trained


def test_trainer_is_given_what_it_passes_on(make: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lorakit.training.setup.check_trackers", lambda args: None)
    monkeypatch.setattr(
        "transformers.trainer.get_reporting_integration_callbacks", lambda report_to: []
    )  # trackio is not installed
    args = make(report_to=["trackio"], **PASSED_ON).args
    assert {name: getattr(args, name) for name in PASSED_ON} == PASSED_ON


def test_the_optimiser_has_its_numbers(make: Any):
    adam = make(
        optim="adamw_torch", learning_rate=3e-3, weight_decay=0.2, adam_beta1=0.8,
        adam_beta2=0.95, adam_epsilon=1e-5,
    ).create_optimizer()  # fmt: skip
    assert isinstance(adam, torch.optim.AdamW)
    group = adam.param_groups[0]
    wanted = {"lr": 3e-3, "weight_decay": 0.2, "betas": (0.8, 0.95), "eps": 1e-5}
    assert {name: group[name] for name in wanted} == wanted
    sgd = make(optim="sgd", optim_args="momentum=0.9,nesterov=true").create_optimizer()
    assert isinstance(sgd, torch.optim.SGD)
    assert (sgd.defaults["momentum"], sgd.defaults["nesterov"]) == (0.9, True)


def test_the_schedule_has_its_numbers(make: Any):
    trainer = make(
        max_steps=10, lr_scheduler_type="cosine_with_min_lr", warmup_steps=4, learning_rate=1.0,
        lr_scheduler_kwargs={"min_lr_rate": 0.5},
    )  # fmt: skip
    trainer.create_optimizer()
    scheduler = trainer.create_scheduler(10)
    rates = [scheduler.lr_lambdas[0](step) for step in range(10)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    assert rates[7] == pytest.approx(0.75)
    assert set(scheduler.get_last_lr()) == {0.25}


def test_gradients_are_clipped_to_their_norm_and_by_0_not_at_all(run: Any):
    moved = []
    for norm in (0, 1e-3):
        plain = {"optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 1.0}
        folder = run(f"norm-{norm}", max_steps=1, max_grad_norm=norm, eval_strategy="no", **plain)
        tensors = [t for name, t in weights(folder).items() if "lora_B" in name]
        moved.append(math.hypot(*(float(t.norm()) for t in tensors)))
        line = lines(folder / "metrics.jsonl")[0]
    assert moved[0] == pytest.approx(line["grad_norm"], rel=1e-3)
    assert moved[1] == pytest.approx(1e-3, rel=1e-2)


def test_the_seed_decides_the_adapters_start_and_the_order_of_rows(make: Any):
    first, again, other = (make(seed=seed) for seed in (1, 1, 2))
    starts = [dict(t.model.adapter_tensors("default")) for t in (first, again, other)]
    name = next(name for name in starts[0] if "lora_A" in name)
    assert torch.equal(starts[0][name], starts[1][name])
    assert not torch.equal(starts[0][name], starts[2][name])
    assert list(first.sampler) == list(again.sampler) != list(other.sampler)


def test_full_determinism_is_switched_on(make: Any, monkeypatch: pytest.MonkeyPatch):
    for name in ("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC",
                 "ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC"):  # fmt: skip
        monkeypatch.setenv(name, "0")  # so that they are as before afterwards
    try:
        make(full_determinism=True)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_devices_are_chosen(make: Any):
    assert make(use_cpu=True).args.device.type == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="tf32"):
            make(tf32=True)
        assert make(tf32=False).args.tf32 is False


def test_the_cache_is_emptied_every_so_many_steps(run: Any, monkeypatch: pytest.MonkeyPatch):
    emptied: list[int] = []
    monkeypatch.setattr(transformers.trainer, "clear_device_cache", lambda: emptied.append(1))
    run("run", max_steps=5, torch_empty_cache_steps=2, eval_strategy="no", save_strategy="no")
    assert len(emptied) == 3  # before steps 1, 3 and 5


@pytest.mark.parametrize(
    ("name", "kwargs"),
    few(
        [
            ("activation_checkpointing", "activation_checkpointing_kwargs"),
            ("gradient_checkpointing", "gradient_checkpointing_kwargs"),
        ],
        ("gradient_checkpointing", "gradient_checkpointing_kwargs"),
    ),
)
def test_every_nth_layer_computes_again_what_it_did_not_keep(
    run: Any, make: Any, name: str, kwargs: str
):
    options = {name: True, kwargs: {"every_n_layers": 2, "use_reentrant": False}}
    plain = weights(run("plain", max_steps=2, eval_strategy="no"))
    found = weights(run("again", max_steps=2, eval_strategy="no", **options))
    for key, tensor in plain.items():
        torch.testing.assert_close(found[key], tensor)
    trainer = make(max_steps=1, eval_strategy="no", save_strategy="no", **options)
    trainer.train()
    layers = trainer.model.get_base_model().model.layers
    assert [layer.gradient_checkpointing for layer in layers].count(True) == 1


def test_batches_come_from_workers_as_they_come_without(make: Any):
    loaders = [
        make().get_train_dataloader(),
        make(
            dataloader_num_workers=1, dataloader_persistent_workers=True,
            dataloader_prefetch_factor=3, dataloader_multiprocessing_context="fork",
            dataloader_pin_memory=False,
        ).get_train_dataloader(),
    ]  # fmt: skip
    plain, own = loaders
    assert (own.num_workers, own.persistent_workers, own.prefetch_factor) == (1, True, 3)
    assert own.multiprocessing_context.get_start_method() == "fork"
    assert own.pin_memory is False
    for first, second in zip(plain, own, strict=True):
        assert torch.equal(first["input_ids"], second["input_ids"])


def steps_of(folder: Path, value: str) -> list[int]:
    return [line["step"] for line in lines(folder / "metrics.jsonl") if value in line]


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def test_a_run_logs_evaluates_and_saves_at_its_steps(run: Any):
    folder = run(
        "run", max_steps=6, logging_steps=4, logging_first_step=True, eval_strategy="steps",
        eval_steps=2, eval_delay=3, eval_on_start=True, save_strategy="steps", save_steps=2,
        save_total_limit=2, save_only_model=True,
    )  # fmt: skip
    assert steps_of(folder, "loss") == [1, 4]
    assert steps_of(folder, "eval_loss") == [0, 4, 6]
    assert saved(folder) == ["checkpoint-4", "checkpoint-6"]
    assert not (folder / "checkpoint-6" / "optimizer.pt").exists()


def test_a_run_logs_evaluates_and_saves_at_its_epochs_or_never(run: Any):
    epochs = {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 12}
    each = {"logging_strategy": "epoch", "eval_strategy": "epoch", "save_strategy": "epoch"}
    folder = run("epochs", **epochs, **each)
    assert steps_of(folder, "loss") == steps_of(folder, "eval_loss") == [3, 6]
    assert saved(folder) == ["checkpoint-3", "checkpoint-6"]
    never = dict.fromkeys(each, False)  # YAML's no
    folder = run("never", **epochs, **never)
    assert steps_of(folder, "loss") == saved(folder) == []
    assert steps_of(folder, "eval_loss") == [6]  # the record's own


def test_the_best_is_kept_where_nothing_is_said_of_saving(run: Any):
    folder = run("run", max_steps=4, eval_strategy="steps", eval_steps=2,
                 load_best_model_at_end=True)  # fmt: skip
    assert saved(folder) == ["checkpoint-2", "checkpoint-4"]
    folder = run("best", max_steps=4, eval_strategy="steps", eval_steps=2, save_strategy="best")
    assert saved(folder)


def test_held_out_rows_come_in_batches_of_their_own_size(make: Any):
    sizes = {len(batch) for batch in make(per_device_eval_batch_size=5).held_out}
    assert sizes == {5, 2}


def test_transformers_speaks_as_loudly_as_it_is_told_to(make: Any):
    before = logging.get_verbosity()
    try:
        make(log_level="critical")
        assert logging.get_verbosity() == logging.CRITICAL
    finally:
        logging.set_verbosity(before)


def test_smoothing_changes_what_is_learned_and_not_what_is_measured(run: Any):
    found = []
    for smoothing in (0.0, 0.1):
        folder = run(f"by-{smoothing}", max_steps=2, label_smoothing_factor=smoothing)
        found.append((lines(folder / "metrics.jsonl")[0], weights(folder)))
    (plain, first), (smooth, second) = found
    assert smooth["loss"] != pytest.approx(plain["loss"], rel=1e-4)
    assert any(not torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.skipif(
    not transformers.utils.is_schedulefree_available(), reason="schedulefree is not installed"
)
def test_a_schedule_free_optimiser_leaves_its_average(make: Any):
    trainer = make(optim="schedule_free_adamw", lr_scheduler_type="constant", max_steps=3)
    trainer.train()
    assert not any(group["train_mode"] for group in trainer.optimizer.param_groups)
