"""A run that is killed again and again, at moments that nobody chose, ends in the same bytes."""

import json
from pathlib import Path

import pytest

import lorakit
from kills import kill_until_done
from small_runs import recipe

PREPARE = """
import lorakit.training.run as run
import lorakit.training.setup, transformers.trainer, transformers.models.llama.modeling_llama
"""
WORK = "run.train(values, resume=True, quiet=True)"


def test_whenever_a_run_is_killed_it_resumes_to_the_bytes_of_an_undisturbed_one(
    tiny_model: Path, rows: Path, tmp_path: Path
):
    values = recipe(tiny_model, rows, tmp_path / "killed", max_steps=40, save_steps=1)
    values["lora"]["lora_dropout"] = 0.1
    assert kill_until_done(PREPARE, WORK, values, seed=7, within=(0.1, 1.5)) >= 3

    undisturbed = lorakit.train(values | {"output_dir": str(tmp_path / "undisturbed")}, quiet=True)
    name = "adapter_model.safetensors"
    assert (tmp_path / "killed" / name).read_bytes() == (undisturbed.output_dir / name).read_bytes()
    for file in ("metrics.jsonl", "monitor.jsonl"):
        steps = [
            [json.loads(line)["step"] for line in (folder / file).read_text().splitlines()]
            for folder in (tmp_path / "killed", undisturbed.output_dir)
        ]
        assert steps[0] == steps[1], file
    assert not (tmp_path / "killed" / ".saving").exists()


@pytest.mark.exhaustive
@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_whenever_a_run_of_preferences_is_killed_it_resumes_to_the_same_bytes(
    objective: str, tiny_model: Path, tmp_path: Path
):
    pairs = [
        {"prompt": f"{n} + {n}?", "chosen": f"It is {2 * n}.", "rejected": "No" + "." * n}
        for n in range(24)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    values = recipe(tiny_model, path, tmp_path / "killed", max_steps=20, save_steps=1)
    values["lora"]["lora_dropout"] = 0.1
    values["objective"] = objective
    assert kill_until_done(PREPARE, WORK, values, seed=7, within=(0.1, 1.5)) >= 3
    undisturbed = lorakit.train(values | {"output_dir": str(tmp_path / "undisturbed")}, quiet=True)
    name = "adapter_model.safetensors"
    assert (tmp_path / "killed" / name).read_bytes() == (undisturbed.output_dir / name).read_bytes()
