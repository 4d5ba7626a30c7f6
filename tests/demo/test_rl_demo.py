"""The demo of reinforcement learning, from rows to what it measured, on a tiny model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lorakit.demo.addition import MARK, make_sums
from lorakit.demo.rl_tasks import ORDERS, TASKS
from lorakit.demo.run_rl import run_rl_demo
from lorakit.errors import InputError
from lorakit.rewards.reward_table import RewardInput
from lorakit.rewards.rewards import Rewards
from small_runs import lines

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_demo_trains_twice_measures_both_adapters_and_leaves_its_recipes(
    tiny_model: Path, tmp_path: Path
):
    task = replace(
        ORDERS,
        objective={**ORDERS.objective, "num_generations": 2, "max_completion_length": 4},
        sft={"max_steps": 1, "per_device_train_batch_size": 2},
        rl={"max_steps": 1, "per_device_train_batch_size": 2},
        answer_tokens=4,
    )
    said: list[str] = []
    folder = tmp_path / "demo"
    found = run_rl_demo(folder, said.append, task=task, held_out_rows=4, model=str(tiny_model))
    assert (found.before, found.after, found.rows) == (0.0, 0.0, 4)
    assert found.after_interval[0] == 0.0 < found.after_interval[1] < 1.0
    assert json.loads((folder / "demo.json").read_text())["seed"] == found.seed
    parts = [lines(folder / f"{name}.jsonl") for name in ("sft", "prompts", "held_out")]
    assert [len(part) for part in parts] == [2, 2, 4]
    asked = {row["messages"][1]["content"] for part in parts for row in part}
    assert len(asked) == 8
    record = json.loads((folder / "adapter" / "lorakit.json").read_text())
    assert record["recipe"]["objective"]["type"] == "grpo"
    assert (folder / "grpo.yaml").is_file()
    with pytest.raises(InputError):
        run_rl_demo(folder, said.append, task=task, model=str(tiny_model))


def test_the_rewards_of_orders_count_fields(tmp_path: Path):
    assert (EXAMPLES / "grpo_rewards.py").read_text() == ORDERS.code
    (tmp_path / "rewards.py").write_text(ORDERS.code)
    answer = '{"item":"mug","quantity":2}'
    given = [answer, '{"item":"mug","quantity":3}', '{"item":"mug"}', "[1]", "mug"]
    asked = [
        RewardInput(
            [{"role": "user", "content": "two mugs"}],
            [{"role": "assistant", "content": text}],
            completion_ids=[1],
            columns={},
            where="rows.jsonl:1",
            finish_reason="stop",
            reference=answer,
        )
        for text in given
    ]
    names = ["rewards.py:valid_json", "rewards.py:right_fields"]
    with Rewards.opened(names, folder=tmp_path) as rewards:
        rewards.check([])
        table = rewards(asked)
    assert table.values.tolist() == [[1, 1], [1, 0.5], [1, 0.5], [0, 0], [0, 0]]


def test_sums_are_right_and_different():
    rows = make_sums(50, 3)
    assert rows == make_sums(50, 3) != make_sums(50, 4)
    asked = [row["messages"][0]["content"] for row in rows]
    assert len({*asked}) == 50
    for row in rows:
        a, _, b, *_ = row["messages"][0]["content"].split()
        assert row["messages"][1]["content"].endswith(f"{MARK} {int(a) + int(b)}")
    with pytest.raises(InputError):
        make_sums(0, 3)
    assert set(TASKS) == {"orders", "addition"}
