"""The demo with pictures: make a vision-language model and rows, train, compare with the bare base.

Everything is done by the same functions that the verbs call, and every number is measured.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from lorakit import atomic
from lorakit.adapters.open import open_adapter
from lorakit.commands import runnable
from lorakit.data.dataset import load_samples
from lorakit.demo.picture_base import write_base
from lorakit.demo.run import one_line, write_rows
from lorakit.demo.shapes import CHANCE, write_conversations, write_questions
from lorakit.errors import InputError
from lorakit.evaluation.evaluate import Evaluation, evaluate
from lorakit.folder_lock import locked_folder
from lorakit.training.output import check_output
from lorakit.training.run import train

TRAIN_PICTURES, HELD_OUT_PICTURES, SEED = 640, 300, 7


@dataclass(frozen=True)
class PictureDemoResult:
    """What `demo.json` holds: shares of exactly right answers, over `rows` held-out pictures.

    `interval` is the 95% interval of the tuned model's share; `chance` is what guessing gets.
    """

    base_exact_match: float
    tuned_exact_match: float
    interval: tuple[float, float]
    chance: float
    seconds: float
    rows: int


def run_picture_demo(
    folder: Path,
    say: Callable[[str], None],
    *,
    train_pictures: int = TRAIN_PICTURES,
    held_out_pictures: int = HELD_OUT_PICTURES,
    make_base: Callable[[Path, int], None] = write_base,
) -> PictureDemoResult:
    """Runs the demo in the new folder `folder`; `say` shows a line.

    Args:
        make_base: writes the base model into a folder, from a seed.

    Raises:
        InputError: the folder is not empty, or Pillow is not installed.
    """
    if not find_spec("PIL"):
        raise InputError("pictures need Pillow: pip install 'lorakit[pictures]'")
    with locked_folder(folder, partial(check_output, folder, resume=False), say):
        return _run(folder, say, train_pictures, held_out_pictures, make_base)


def _run(
    folder: Path,
    say: Callable[[str], None],
    train_pictures: int,
    held_out_pictures: int,
    make_base: Callable[[Path, int], None],
) -> PictureDemoResult:
    """`run_picture_demo`, in a folder that no other process writes."""
    began = time.perf_counter()
    say(
        "The base: the bundled language model behind a small vision tower. The tower is trained\n"
        "now, on other drawn pictures and without the language model; least squares give the\n"
        "projector between the two its first weights …"
    )
    make_base(folder / "base", SEED)
    made = write_conversations(folder / "train", train_pictures, SEED + 1)
    write_rows(folder / "train.jsonl", made)
    asked = write_questions(folder / "held_out", held_out_pictures, SEED + 2)
    write_rows(folder / "held_out.jsonl", asked)
    recipe = _recipe(folder)
    atomic.write_file(folder / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False))
    say(
        f"The task: color, shape and digit of a picture in words. {train_pictures:,} pictures to "
        "learn from.\n"
    )
    adapter = train(folder / "recipe.yaml").output_dir

    say("\nNow the bare base model and the tuned one answer questions about other pictures …")
    opened = open_adapter(adapter)
    samples = load_samples(folder / "held_out.jsonl")
    result = evaluate(
        opened.model,
        opened.tokenizer,
        samples,
        metrics=["exact_match"],
        max_new_tokens=6,  # every right answer fits, with its end token
        batch_size=100,
    )
    _show(result, asked, say)
    exact = result.scores["exact_match"]
    demo = PictureDemoResult(
        exact["base"],
        exact["tuned"],
        wilson_interval(exact["tuned"], result.rows),
        CHANCE,
        round(time.perf_counter() - began, 1),
        result.rows,
    )
    atomic.write_file(folder / "demo.json", json.dumps(asdict(demo), indent=2) + "\n")
    low, high = demo.interval
    say(
        f"Exactly right, of {demo.rows} held-out pictures: base {demo.base_exact_match:.0%}, "
        f"guessing {demo.chance:.0%}, tuned {demo.tuned_exact_match:.0%} "
        f"(95% interval {low:.0%} to {high:.0%}). It took {demo.seconds:.0f} s.\n"
    )
    say("Try next:")
    for command in _next_commands(folder, adapter, asked[0]):
        say(f"  {command}")
    return demo


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """The 95% interval of a share of `count` independent tries (Wilson 1927)."""
    z = 1.959964
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2) / (1 + z * z / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def _recipe(folder: Path) -> dict[str, Any]:
    return {
        "model": str((folder / "base").resolve()),  # the adapter is found from any folder then
        "data": {"train": str(folder / "train.jsonl"), "eval": 0.03},
        "lora": {
            "r": 16,
            "lora_alpha": 32,
            "target_modules": "all-linear",
            "parts": ["language", "projector"],
        },
        "training": {
            "num_train_epochs": 1,
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 8,
        },
        "output_dir": str(folder / "adapter"),
    }


def _show(result: Evaluation, asked: list[dict[str, Any]], say: Callable[[str], None]) -> None:
    for example, row in [*zip(result.examples, asked, strict=False)][:3]:
        say(f"\n  picture {row['image']}: {row['question']}")
        say(f"  before  {one_line(example.base)}")
        say(f"  after   {one_line(example.tuned)}")
        say(f"  wanted  {example.references[0]}")
    say("")


def _next_commands(folder: Path, adapter: Path, row: dict[str, Any]) -> list[str]:
    return [
        f"{runnable('chat', adapter)}    # then: /image {folder / row['image']}",
        runnable(
            *("eval", adapter, "--data", folder / "held_out.jsonl"),
            *("--metrics", "exact_match,loss", "--limit", "30"),
        ),
        runnable("train", folder / "recipe.yaml", "lora.r=4", f"output_dir={folder / 'r4'}"),
    ]
