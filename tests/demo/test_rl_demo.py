"""The demo of reinforcement learning, from rows to what it measured, on a tiny model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from lorakit.demo.addition import MARK, make_sums
from lorakit.demo.rl_tasks import ADDITION, ORDERS, TASKS
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


def judged(
    code: str,
    names: list[str],
    given: list[str],
    answer: str,
    folder: Path,
    asked_for: str = "two mugs",
) -> list[list[float]]:
    """What reward functions of a task give completions of a prompt."""
    (folder / "rewards.py").write_text(code)
    asked = [
        RewardInput(
            [{"role": "user", "content": asked_for}],
            [{"role": "assistant", "content": text}],
            completion_ids=[1],
            columns={},
            where="rows.jsonl:1",
            finish_reason="stop",
            reference=answer,
        )
        for text in given
    ]
    with Rewards.opened([f"rewards.py:{name}" for name in names], folder=folder) as rewards:
        rewards.check([])
        values: list[list[float]] = rewards(asked).values.tolist()
    return values


def test_the_rewards_of_orders_count_fields(tmp_path: Path):
    assert (EXAMPLES / "grpo_rewards.py").read_text() == ORDERS.code
    answer = '{"item":"mug","quantity":2}'
    given = [answer, '{"item":"mug","quantity":3}', '{"item":"mug"}', "[1]", "mug"]
    values = judged(ORDERS.code, ["valid_json", "right_fields"], given, answer, tmp_path)
    assert values == [[1, 1], [1, 0.5], [1, 0.5], [0, 0], [0, 0]]


def test_the_reward_of_sums_counts_columns_of_the_digits_asked_for(tmp_path: Path):
    assert (EXAMPLES / "grpo_addition_rewards.py").read_text() == ADDITION.code
    answer = "7+8=15, 4+3+1=8 #### 85"
    given = [answer, "7+8=14, 4+3+1=8 #### 84", "7+8=15 #### 85", "1+8=9, 4+3+0=7 #### 79", "85"]
    values = judged(ADDITION.code, ["right_columns"], given, answer, tmp_path, asked_for="47+38")
    assert values == [[1], [0.5], [0.5], [0], [0]]


@pytest.mark.parametrize("name", TASKS)
def test_the_examples_have_the_settings_of_the_demos(name: str):
    task = TASKS[name]
    recipe = yaml.safe_load((EXAMPLES / f"grpo_{name}.yaml").read_text())
    assert len(recipe["objective"].pop("rewards")) == len(task.objective["rewards"])
    shared = {key: value for key, value in task.objective.items() if key != "rewards"}
    assert recipe["objective"] == {**recipe["objective"], **shared}
    assert recipe["training"] == {**recipe["training"], **task.rl}


def test_sums_are_right_and_different():
    rows = make_sums(50, 3)
    assert rows == make_sums(50, 3) != make_sums(50, 4)
    asked = [row["messages"][1]["content"] for row in rows]
    assert len({*asked}) == 50
    for row in rows:
        _, asked_for, answer = (message["content"] for message in row["messages"])
        columns, result = answer.split(f" {MARK} ")
        assert int(result) == sum(map(int, asked_for.split("+")))
        ones, tens = columns.split(", ")
        for equation in (ones, tens):
            terms, total = equation.split("=")
            assert sum(map(int, terms.split("+"))) == int(total)
        assert result == tens.split("=")[1] + ones[-1]
    with pytest.raises(InputError):
        make_sums(0, 3)
    assert set(TASKS) == {"orders", "addition"}
