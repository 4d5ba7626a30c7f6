"""The demo from beginning to end: make rows, train, compare with the bare base, say what next.

Everything is done by the same functions that the verbs call, and every number is measured.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from lorakit import atomic
from lorakit.adapters.open import open_adapter
from lorakit.commands import runnable
from lorakit.data.dataset import load_samples
from lorakit.demo.orders import train_and_held_out
from lorakit.evaluation.evaluate import Evaluation, evaluate
from lorakit.folder_lock import locked_folder
from lorakit.models.bundled import ALIAS
from lorakit.training.output import check_output
from lorakit.training.run import train

TRAIN_ROWS, HELD_OUT_ROWS, SEED = 260, 100, 7


@dataclass(frozen=True)
class DemoResult:
    """What `demo.json` holds: shares of exactly right answers, over `rows` held-out rows."""

    base_exact_match: float
    tuned_exact_match: float
    seconds: float
    rows: int


def run_demo(
    folder: Path,
    say: Callable[[str], None],
    *,
    train_rows: int = TRAIN_ROWS,
    held_out_rows: int = HELD_OUT_ROWS,
) -> DemoResult:
    """Runs the demo in the new folder `folder`; `say` shows a line.

    Raises:
        InputError: the folder is not empty.
    """
    with locked_folder(folder, partial(check_output, folder, resume=False), say):
        return _run_demo(folder, say, train_rows, held_out_rows)


def _run_demo(
    folder: Path, say: Callable[[str], None], train_rows: int, held_out_rows: int
) -> DemoResult:
    """`run_demo`, in a folder that no other process writes."""
    began = time.perf_counter()
    learned, held_out = train_and_held_out(train_rows, held_out_rows, SEED)
    write_rows(folder / "train.jsonl", learned)
    write_rows(folder / "held_out.jsonl", held_out)
    recipe = _recipe(folder)
    atomic.write_file(folder / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False))
    say(f"The task: a customer's order into JSON. {train_rows} rows to learn from, for instance:")
    say(f"  {_request(learned[0])}\n  -> {learned[0]['messages'][-1]['content']}\n")

    adapter = train(folder / "recipe.yaml").output_dir
    say("\nNow the bare base model and the tuned one answer the held-out orders …")
    opened = open_adapter(adapter)
    samples = load_samples(folder / "held_out.jsonl")
    longest = max(len(opened.tokenizer(s.reference).input_ids) for s in samples)
    result = evaluate(
        opened.model,
        opened.tokenizer,
        samples,
        metrics=["exact_match"],
        max_new_tokens=longest + 8,  # every right answer fits, with its end token
        batch_size=50,
    )
    _show(result, say)
    exact = result.scores["exact_match"]
    demo = DemoResult(
        exact["base"], exact["tuned"], round(time.perf_counter() - began, 1), result.rows
    )
    atomic.write_file(folder / "demo.json", json.dumps(asdict(demo), indent=2) + "\n")
    say(
        f"Exactly right, of {demo.rows} held-out orders: base {demo.base_exact_match:.0%}, "
        f"tuned {demo.tuned_exact_match:.0%}. It took {demo.seconds:.0f} s.\n"
    )
    say("Try next:")
    for command in _next_commands(folder, adapter):
        say(f"  {command}")
    return demo


def _recipe(folder: Path) -> dict[str, Any]:
    return {
        "model": ALIAS,
        "data": {"train": str(folder / "train.jsonl"), "eval": 0.1},
        "lora": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
        "training": {
            "num_train_epochs": 2,
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 4,
        },
        "output_dir": str(folder / "adapter"),
    }


def _show(result: Evaluation, say: Callable[[str], None]) -> None:
    for example in result.examples[:3]:
        say(f"\n  order   {example.prompt[-1]['content']}")
        say(f"  before  {one_line(example.base)}")
        say(f"  after   {one_line(example.tuned)}")
        say(f"  wanted  {example.references[0]}")
    say("")


def _next_commands(folder: Path, adapter: Path) -> list[str]:
    return [
        runnable("chat", adapter, "--system", "Turn the order into JSON."),
        runnable(
            *("eval", adapter, "--data", folder / "held_out.jsonl"),
            *("--metrics", "exact_match,loss", "--limit", "20"),
        ),
        runnable("merge", adapter, "-o", folder / "merged"),
        runnable("train", folder / "recipe.yaml", "lora.r=4", f"output_dir={folder / 'r4'}"),
    ]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows as JSON Lines."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    atomic.write_file(path, text)


def _request(row: dict[str, Any]) -> str:
    return row["messages"][-2]["content"]


def one_line(text: str, width: int = 100) -> str:
    """`text` without line breaks, cut at `width` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[:width]}…"
