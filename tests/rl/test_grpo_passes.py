"""How often the model is computed in a step of grpo, and for which positions logits are."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import lorakit
from lorakit.engine.decode_step import DecodeStep
from lorakit.models.loss import SupervisedLoss
from small_runs import lines

ROWS = [{"prompt": f"Say {n} " * (1 + n % 3), "n": n} for n in range(12)]


def vowels(completions: Sequence[str], **columns: Any) -> list[float]:
    return [sum(map(text.count, "aeiou")) / 8 for text in completions]


def train(model: Path, output: Path, training: dict[str, Any], **objective: Any) -> Path:
    """Two steps of two prompts with four completions each."""
    recipe = {
        "model": str(model),
        "dtype": "float32",
        "data": {"eval": 0},
        "lora": {"r": 4, "lora_alpha": 8},
        "training": {"max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 2}
        | training,
        "samples": 0,
        "output_dir": str(output),
    }
    grpo = {"type": "grpo", "num_generations": 4, "max_completion_length": 16, "rewards": [vowels]}
    lorakit.train(recipe, data=ROWS, objective=grpo | objective, quiet=True)
    return output


@pytest.mark.parametrize(
    ("training", "objective", "passes", "of_reference"),
    [
        pytest.param({}, {}, 2, 0, id="plain"),
        pytest.param({}, {"beta": 0.1}, 2, 2, id="beta"),
        pytest.param({"max_steps": 4}, {"num_iterations": 2}, 4, 0, id="iterations"),
        pytest.param(
            {"gradient_accumulation_steps": 3, "max_steps": 1},
            {"steps_per_generation": 6},
            3,
            0,
            id="window",
        ),
    ],
)
def test_no_pass_computes_log_probabilities_that_sampling_or_the_loss_has(
    attentive_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    training: dict[str, Any],
    objective: dict[str, Any],
    passes: int,
    of_reference: int,
):
    learned: list[bool] = []
    steps, states, call = [0], SupervisedLoss._states, DecodeStep.__call__
    # As many leave it who checkpoint activations; sampling has a cache of its own.
    model = shutil.copytree(attentive_folder, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"use_cache": False}))

    def noted(self: SupervisedLoss, model: Any, batch: Any, output: Any) -> Any:
        h, targets = states(self, model, batch, output)
        # Logits are computed where a completion's token is predicted, and nowhere else.
        assert len(h) == len(targets) == int(batch["rollout.lengths"].sum())
        learned.append(torch.is_grad_enabled())
        return h, targets

    def counted(*given: Any) -> torch.Tensor:
        steps[0] += 1
        return call(*given)

    monkeypatch.setattr(SupervisedLoss, "_states", noted)
    monkeypatch.setattr(DecodeStep, "__call__", counted)
    run = train(model, tmp_path / "run", training, **objective)
    assert learned.count(True) == passes
    assert learned.count(False) == of_reference
    assert steps[0] > 10  # completions are written by the function of a step
    for line in lines(run / "metrics.jsonl"):
        if "loss" in line and line["step"] == 1:
            assert line["clip_ratio/region_mean"] == 0.0  # the ratio is 1 to the bit
