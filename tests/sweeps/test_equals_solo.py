"""Every adapter trained beside others is the one that `lorakit train` gives."""

import json
from pathlib import Path
from typing import Any

import pytest

from lorakit.adapters.manifest import read_manifest
from matrix import few
from small_runs import weights
from sweeps.shared_sweeps import configurations, distance, runner_for, small, solo

MIXED: list[dict[str, Any]] = [
    {"lora.r": 2, "training.learning_rate": 3e-3},
    {"lora.r": 7, "lora.lora_alpha": 3, "lora.use_rslora": True, "lora.lora_dropout": 0.3},
    {
        "lora.target_modules": ["q_proj", "down_proj"],
        "lora.init_lora_weights": "gaussian",
        "training.lr_scheduler_type": "linear",
        "training.warmup_steps": 3,
    },
    {"training.per_device_train_batch_size": 3, "training.gradient_accumulation_steps": 2},
    {"training.max_grad_norm": 0.05, "training.seed": 7, "lora.lora_dropout": 0.1},
    {"training.optim": "sgd", "training.weight_decay": 0.1, "training.max_steps": 6},
    {"training.loraplus_lr_ratio": 8, "lora.r": 3, "training.label_smoothing_factor": 0.2},
    {"lora.init_lora_weights": "pissa", "training.max_steps": -1, "training.num_train_epochs": 0.4},
]


@pytest.mark.parametrize(
    ("form", "dtype", "tolerance"),
    few(
        [
            ("lines", "float64", 1e-9),
            ("padded", "float64", 1e-9),
            ("packed and checkpointed", "float64", 1e-9),
            ("lines", "float32", 2e-3),
        ],
        ("lines", "float64", 1e-9),
    ),
)
def test_mixed_configurations_give_the_weights_of_their_solo_runs(
    tiny_model: Path, rows: Path, tmp_path: Path, form: str, dtype: str, tolerance: float
):
    values = small(tiny_model, rows, tmp_path / "base", max_steps=4) | {"dtype": dtype}
    if form == "padded":
        values["data"]["padding_free"] = False
    if form == "packed and checkpointed":
        values["data"] |= {"packing": True, "max_length": 64}
        values["training"]["activation_checkpointing"] = True
    sweep = configurations(values, tmp_path / "sweep", MIXED)
    found = runner_for(values, at_once=len(sweep)).advance(sweep, 1.0)
    for configuration in sweep:
        progress = found[configuration.name]
        assert (progress.step, progress.diverged) == (progress.planned, None)
        own = weights(Path(configuration.recipe.output_dir))
        wanted = solo(configuration, tmp_path / "solo")
        assert distance(own, wanted) < tolerance, configuration.changes


def test_dora_embeddings_and_noise_beside_plain_adapters_give_the_weights_of_their_solo_runs(
    tiny_model: Path, rows: Path, tmp_path: Path
):
    values = small(tiny_model, rows, tmp_path / "base", max_steps=3) | {"dtype": "float64"}
    changes = [
        {"lora.use_dora": True, "lora.lora_dropout": 0.2},
        {"lora.target_modules": ["embed_tokens", "k_proj"]},
        {"lora.r": 3},
        {"lora.r": 3, "training.neftune_noise_alpha": 5},  # trains by itself
    ]
    sweep = configurations(values, tmp_path / "sweep", changes)
    runner_for(values, at_once=len(sweep)).advance(sweep, 1.0)
    for configuration in sweep:
        own = weights(Path(configuration.recipe.output_dir))
        wanted = solo(configuration, tmp_path / "solo")
        assert distance(own, wanted) < 1e-9, configuration.changes


def test_rows_with_weights_share_passes(tiny_model: Path, tmp_path: Path):
    rows = tmp_path / "weighted.jsonl"
    with rows.open("w") as file:
        for n in range(20):
            answer = {"role": "assistant", "content": f"{n}!", "weight": 0.5 + n % 3}
            messages = [{"role": "user", "content": f"{n}?"}, answer]
            file.write(json.dumps({"messages": messages}) + "\n")
    values = small(tiny_model, rows, tmp_path / "base", max_steps=2) | {"dtype": "float64"}
    sweep = configurations(values, tmp_path / "sweep", [{"lora.r": 2}, {"lora.r": 3}])
    runner = runner_for(values, at_once=2)
    assert [len(group) for _, group in runner._groups(sweep)[0]] == [2]
    found = runner.advance(sweep, 1.0)
    for configuration in sweep:
        wanted = solo(configuration, tmp_path / "solo")
        own = weights(Path(configuration.recipe.output_dir))
        assert distance(own, wanted) < 1e-9
        record = read_manifest(tmp_path / "solo" / configuration.name)
        assert record is not None
        loss = found[configuration.name].scores["loss"]
        assert loss == pytest.approx(record.eval_loss, abs=1e-9)
