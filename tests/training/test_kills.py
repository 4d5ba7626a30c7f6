"""A run that is killed again and again, at moments that nobody chose, ends in the same bytes."""

import json
from pathlib import Path
from typing import Any

import pytest

import lorakit
from kills import assert_resumes_to_the_same_bytes
from small_runs import recipe

PAIRS = [
    {"prompt": f"{n} + {n}?", "chosen": f"It is {2 * n}.", "rejected": "No" + "." * n}
    for n in range(24)
]
LONG = [{"text": "".join(f"{n} and {k} make {n + k}. " for k in range(12))} for n in range(8)]

REWARDED = {
    "type": "grpo",
    "rewards": [{"type": "length", "target": 4}],
    "num_generations": 4,
    "max_completion_length": 8,
    "steps_per_generation": 2,
    "num_iterations": 2,
}
"""Completions that are learned in four steps: most of the time goes into sampling them."""


def test_whenever_a_run_is_killed_it_resumes_to_the_bytes_of_an_undisturbed_one(
    tiny_model: Path, rows: Path, tmp_path: Path
):
    values = recipe(tiny_model, rows, tmp_path / "killed", max_steps=20, save_steps=1)
    values["lora"]["lora_dropout"] = 0.1
    killed, undisturbed = assert_resumes_to_the_same_bytes(values)
    for file in ("metrics.jsonl", "monitor.jsonl"):
        steps = [
            [json.loads(line)["step"] for line in (folder / file).read_text().splitlines()]
            for folder in (killed, undisturbed)
        ]
        assert steps[0] == steps[1], file
    assert not (killed / ".saving").exists()


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("rows", "changes"),
    [
        (PAIRS, {"objective": "dpo"}),
        (PAIRS, {"objective": "kto"}),
        (PAIRS, {"objective": "reward"}),
        (LONG, {"objective": {"type": "pretrain", "overlap": 8}, "packing": True}),
        (LONG, {"tokens": ["<|make|>"], "objective": "pretrain"}),
        (PAIRS, {"objective": "dpo", "start": "freeze"}),
        ([{"prompt": pair["prompt"]} for pair in PAIRS], {"objective": REWARDED}),
    ],
    ids=["dpo", "kto", "reward", "pretrain", "tokens", "stage", "grpo"],
)
def test_whatever_is_learned_a_killed_run_resumes_to_the_same_bytes(
    rows: list[dict[str, Any]], changes: dict[str, Any], tiny_model: Path, tmp_path: Path
):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = recipe(tiny_model, path, tmp_path / "killed", max_steps=20, save_steps=1)
    values["lora"]["lora_dropout"] = 0.1
    if changes.pop("packing", False):
        values["data"] |= {"packing": True, "max_length": 100}
    if (mode := changes.pop("start", None)) is not None:
        first = values | {"output_dir": str(tmp_path / "first"), "objective": "simpo"}
        lorakit.train(first, quiet=True)
        values["adapter"] = {"path": str(tmp_path / "first"), "mode": mode}
    assert_resumes_to_the_same_bytes(values | changes)
