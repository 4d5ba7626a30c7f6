"""An epoch of training beside TRL: what every side is given, what is timed, and how it is shown."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.turns import Figures, synchronize, take_turns
from lorakit.training.schedule import warm_from_first

FIELDS = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}

SIDES = ("trl", "trl_plain", "lorakit")


def parser_of(description: str | None, batch: int, learning_rate: float) -> argparse.ArgumentParser:
    """The options of every such benchmark, with some defaults of its own."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=learning_rate)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    return parser


def run(
    module: str,
    options: argparse.Namespace,
    measure: Callable[[str, argparse.Namespace], Figures],
    title: str,
    columns: Mapping[str, str],
) -> None:
    """Takes turns, prints a table, and last one line of JSON; one side's figures with `--side`.

    Args:
        module: the benchmark's, which is run again for each side.
        columns: as in `compare`, beside those that all have.
    """
    if options.side:
        print(json.dumps(measure(options.side, options)))
        return
    given = {k: v for k, v in vars(options).items() if k not in ("rounds", "sides", "side")}
    case = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    found = take_turns(module, options.sides, case, options.rounds)
    common = {"tokens/s": "tokens_per_second", "MB": "memory_mb"}
    last = {"held-out loss": "held_out_loss", "steps": "steps"}
    compare(f"{title} of {options.data.name}, {options.dtype}", found, common | columns | last)


def one_epoch(options: argparse.Namespace) -> dict[str, Any]:
    """TrainingArguments of an epoch that every side is trained with."""
    return {
        "num_train_epochs": 1,
        "learning_rate": options.learning_rate,
        "per_device_train_batch_size": options.batch,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "logging_steps": 1000,
        "save_strategy": "no",
        "seed": 42,
    }


def with_lorakit(
    options: argparse.Namespace,
    model: str,
    rows: Path,
    training: dict[str, Any],
    folder: Path,
    **recipe: Any,
) -> None:
    """Trains on a file of rows with `lorakit.train`; the adapter is in `folder/run`.

    Args:
        recipe: more of its keys; those of `data` join the usual ones.
    """
    import lorakit

    usual = {
        "model": model,
        "dtype": options.dtype,
        "lora": FIELDS,
        "training": training,
        "samples": 0,
        "output_dir": f"{folder}/run",
    }
    data = {"train": str(rows), "eval": 0} | recipe.pop("data", {})
    lorakit.train(usual | {"data": data} | recipe, quiet=True)


def trl_arguments(
    options: argparse.Namespace, training: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """What the configuration of each of TRL's trainers is given."""
    import torch

    return {
        **training,
        "output_dir": f"{folder}/trl",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": options.dtype == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),
    }


def warmed(trainer: Any) -> Any:
    """A `transformers.Trainer` whose warm-up begins above 0, as lorakit's does: a step more that
    learns.
    """
    create = trainer.create_scheduler

    def create_scheduler(num_training_steps: int, optimizer: Any = None) -> Any:
        warmup = trainer.args.get_warmup_steps(num_training_steps)
        made = create(num_training_steps, optimizer)
        trainer.lr_scheduler = warm_from_first(made, warmup, num_training_steps)
        return trainer.lr_scheduler

    trainer.create_scheduler = create_scheduler
    return trainer


def clock_of(trainer: Any) -> dict[str, float]:
    """Takes the time of Trainer's loop, of the first step since the process began, and of a later
    step in the mean."""
    clock = {"steps": 0.0}
    train, step = trainer._inner_training_loop, trainer.training_step
    log, ends = trainer._maybe_log_save_evaluate, dict[int, float]()

    def timed_train(self: Any, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        output = train(self, *args, **kwargs)
        synchronize()
        clock["seconds"] = time.perf_counter() - began
        clock["steps"] = self.state.global_step
        if len(ends) > 1:
            clock["later_step"] = (max(ends.values()) - min(ends.values())) / (len(ends) - 1)
        return output

    def timed_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = step(self, *args, **kwargs)
        synchronize()
        clock.setdefault("first_step", time.time() - psutil.Process().create_time())
        return output

    def timed_log(self: Any, *args: Any, **kwargs: Any) -> Any:
        synchronize()
        ends.setdefault(self.state.global_step, time.perf_counter())
        return log(self, *args, **kwargs)

    trainer._inner_training_loop, trainer.training_step = timed_train, timed_step
    trainer._maybe_log_save_evaluate = timed_log
    return clock


def compare(
    title: str,
    found: Mapping[str, Figures],
    columns: Mapping[str, str],
    speed: str = "tokens_per_second",
) -> None:
    """Prints a table, and last one line of JSON with each figure beside TRL's fastest side.

    Args:
        found: the figures of each side; `trl_plain`, or the first, is compared with.
        columns: a figure's name by the heading of its column.
        speed: the name of the figure that is compared beside the memory.
    """
    peer = found.get("trl_plain") or next(iter(found.values()))
    table = Table(title=title)
    for heading in ("", *columns, f"× {speed.partition('_')[0]}/s", "× MB"):
        table.add_column(heading, justify="right")
    results = []
    for side, figures in found.items():
        ratios = {f"{key}_by_trl": figures[key] / peer[key] for key in (speed, "memory_mb")}
        results.append({"side": side} | figures | ratios)
        shown = [f"{figures[name]:.5g}" for name in columns.values()]
        table.add_row(side, *shown, *(f"{ratio:.2f}" for ratio in ratios.values()))
    Console().print(table)
    print(json.dumps(results))
