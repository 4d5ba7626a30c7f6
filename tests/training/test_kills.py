"""A run that is killed again and again, at moments that nobody chose, ends in the same bytes."""

import json
from pathlib import Path

import lorakit
from kills import kill_until_done
from small_runs import recipe


def test_whenever_a_run_is_killed_it_resumes_to_the_bytes_of_an_undisturbed_one(
    tiny_model: Path, rows: Path, tmp_path: Path
):
    values = recipe(tiny_model, rows, tmp_path / "killed", max_steps=40, save_steps=1)
    values["lora"]["lora_dropout"] = 0.1
    prepare = """
import lorakit.training.run as run
import lorakit.training.setup, transformers.trainer, transformers.models.llama.modeling_llama
"""
    work = "run.train(values, resume=True, quiet=True)"
    assert kill_until_done(prepare, work, values, seed=7, within=(0.1, 1.5)) >= 3

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
