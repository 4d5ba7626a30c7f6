"""The demo of reinforcement learning: a little supervised fine-tuning, then GRPO on rewards.

Everything is done by the same functions that the verbs call, and every number is measured.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from lorakit import atomic
from lorakit.adapters.open import open_adapter
from lorakit.commands import runnable
from lorakit.data.dataset import load_samples
from lorakit.demo.rl_tasks import ORDERS, RlTask
from lorakit.demo.run import one_line, write_rows
from lorakit.evaluation.answers import answer_samples
from lorakit.folder_lock import locked_folder
from lorakit.models.bundled import ALIAS
from lorakit.report.preferences import wilson_interval
from lorakit.rewards.builtin.exact_match import ExactMatch
from lorakit.training.output import check_output
from lorakit.training.run import train

HELD_OUT_ROWS, SEED = 200, 7


@dataclass(frozen=True)
class RlDemoResult:
    """What `demo.json` holds: shares of exactly right answers over `rows` held-out rows, each with
    its 95% interval, before and after reinforcement learning.
    """

    before: float
    before_interval: tuple[float, float]
    after: float
    after_interval: tuple[float, float]
    seconds: float
    rows: int
    seed: int


def run_rl_demo(
    folder: Path,
    say: Callable[[str], None],
    *,
    task: RlTask = ORDERS,
    seed: int = SEED,
    held_out_rows: int = HELD_OUT_ROWS,
    model: str = ALIAS,
    overrides: Sequence[str] = (),
) -> RlDemoResult:
    """Runs the demo in the new folder `folder`; `say` shows a line.

    Args:
        model: the base, as in a recipe.
        overrides: `dotted.key=value` for the recipe of reinforcement learning.

    Raises:
        InputError: the folder is not empty.
    """
    with locked_folder(folder, partial(check_output, folder, resume=False), say):
        return _run(folder, say, task, seed, held_out_rows, model, overrides)


def _run(
    folder: Path,
    say: Callable[[str], None],
    task: RlTask,
    seed: int,
    held_out_rows: int,
    model: str,
    overrides: Sequence[str],
) -> RlDemoResult:
    """`run_rl_demo`, in a folder that no other process writes."""
    began = time.perf_counter()
    taught = task.sft["max_steps"] * task.sft["per_device_train_batch_size"]
    asked = task.rl["max_steps"] * task.rl["per_device_train_batch_size"]
    made = task.make(taught, asked, held_out_rows, seed)
    parts = dict(zip(("sft", "prompts", "held_out"), made, strict=True))
    for name, part in parts.items():
        write_rows(folder / f"{name}.jsonl", part)
    if task.code:
        atomic.write_file(folder / "rewards.py", task.code)
    for name, recipe in _recipes(folder, task, seed, model).items():
        atomic.write_file(folder / f"{name}.yaml", yaml.safe_dump(recipe, sort_keys=False))
    say(f"The task: {task.shown}. For instance:")
    *_, question, answer = parts["sft"][0]["messages"]
    say(f"  {question['content']}\n  -> {answer['content']}\n")

    say(f"First {task.sft['max_steps']} steps of supervised fine-tuning, on {taught} answers …")
    start = train(folder / "sft.yaml").output_dir
    say(
        f"\nNow {task.rl['max_steps']} steps of GRPO: {asked} other prompts whose answers are not "
        "shown, only rewards of what the model writes …"
    )
    adapter = train(folder / "grpo.yaml", *overrides).output_dir

    say("\nBoth adapters answer the held-out prompts …")
    before, after = (_answers(one, folder, task) for one in (start, adapter))
    wanted = [row["messages"][-1]["content"] for row in parts["held_out"]]
    for i in range(3):
        say(f"\n  prompt  {one_line(parts['held_out'][i]['messages'][-2]['content'])}")
        say(f"  before  {one_line(before[i])}")
        say(f"  after   {one_line(after[i])}")
        say(f"  wanted  {wanted[i]}")
    (low, was, high), (least, now, most) = (
        _share(found, wanted, task.mark) for found in (before, after)
    )
    demo = RlDemoResult(
        was,
        (low, high),
        now,
        (least, most),
        round(time.perf_counter() - began, 1),
        len(wanted),
        seed,
    )
    atomic.write_file(folder / "demo.json", json.dumps(asdict(demo), indent=2) + "\n")
    say(
        f"\nExactly right, of {demo.rows} held-out prompts: {was:.0%} before (95% interval "
        f"{low:.0%} to {high:.0%}), {now:.0%} after ({least:.0%} to {most:.0%}). It took "
        f"{demo.seconds:.0f} s.\n"
    )
    say("Try next:")
    for command in _next_commands(folder, adapter):
        say(f"  {command}")
    return demo


def _recipes(folder: Path, task: RlTask, seed: int, model: str) -> dict[str, dict[str, Any]]:
    lora = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
    objective = {
        key: [_in_folder(one, folder) for one in value] if key == "rewards" else value
        for key, value in task.objective.items()
    }
    return {
        "sft": {
            "model": model,
            "data": {"train": str(folder / "sft.jsonl"), "eval": 0},
            "lora": lora,
            "training": {**task.sft, "seed": seed},
            "samples": 0,
            "output_dir": str(folder / "sft"),
        },
        "grpo": {
            "model": model,
            "adapter": str(folder / "sft"),
            "data": {"train": str(folder / "prompts.jsonl"), "eval": 0},
            "objective": {"type": "grpo", **objective},
            "training": {**task.rl, "seed": seed},
            "output_dir": str(folder / "adapter"),
        },
    }


def _in_folder(reward: Any, folder: Path) -> Any:
    return f"{folder}/{reward}" if isinstance(reward, str) and ".py:" in reward else reward


def _answers(adapter: Path, folder: Path, task: RlTask) -> list[str]:
    opened = open_adapter(adapter)
    samples = load_samples(folder / "held_out.jsonl")
    written = answer_samples(
        opened.model,
        opened.tokenizer,
        samples,
        max_new_tokens=task.answer_tokens,
        batch_size=50,
    )
    return [one.answer.strip() for one in written]


def _share(found: list[str], wanted: list[str], mark: str | None) -> tuple[float, float, float]:
    """The share of right answers, between the ends of its interval."""
    is_right = ExactMatch(after=mark)(found, reference=wanted)
    share = sum(one or 0.0 for one in is_right) / len(wanted)
    low, high = wilson_interval(share, len(wanted))
    return low, share, high


def _next_commands(folder: Path, adapter: Path) -> list[str]:
    return [
        runnable("report", adapter),
        runnable("chat", adapter, "--system", "Turn the order into JSON."),
        runnable(
            *("eval", adapter, "--data", folder / "held_out.jsonl"),
            *("--metrics", "exact_match", "--limit", "20"),
        ),
        runnable("train", folder / "grpo.yaml", f"output_dir={folder / 'again'}"),
    ]
