"""Tasks whose configurations cannot share batches are swept one by one."""

import json
import random
from pathlib import Path

import pytest

import lorakit
from lorakit.adapters.manifest import read_manifest
from tiny import save_tiny_encoder


def test_a_classifier_is_swept_with_a_head_for_each_seed(tmp_path: Path):
    model = save_tiny_encoder(tmp_path / "encoder")
    draw = random.Random(0)
    with (tmp_path / "rows.jsonl").open("w") as file:
        for i in range(80):
            label = draw.choice(["good", "bad"])
            file.write(json.dumps({"text": f"{label[0] * 3} {i}", "label": label}) + "\n")
    values = {
        "model": str(model),
        "dtype": "float32",
        "data": {"train": str(tmp_path / "rows.jsonl"), "eval": 0.4},
        "lora": {"r": 2, "task_type": "SEQ_CLS"},
        "training": {"max_steps": 24, "logging_steps": 1},
        "output_dir": str(tmp_path / "sweep"),
    }
    over = {"training.learning_rate": [1e-5, 2e-2], "training.seed": [1, 2]}
    rows = lorakit.sweep(values, over=over, prune=False, quiet=True)
    assert [row["changes"]["training.learning_rate"] for row in rows] == [2e-2, 2e-2, 1e-5, 1e-5]
    own = read_manifest(tmp_path / "sweep" / rows[1]["name"])
    assert own.labels is not None
    again = lorakit.train(
        tmp_path / "sweep" / "recipe.yaml",
        f"training.seed={rows[1]['changes']['training.seed']}",
        f"output_dir={tmp_path / 'again'}",
        quiet=True,
    )
    assert again.eval_loss == pytest.approx(own.eval_loss, rel=1e-5)
    assert own.eval_loss < 0.4
