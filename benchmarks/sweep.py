"""A sweep beside the same configurations trained one after the other, by lorakit and by TRL.

    python -m benchmarks.sweep --train e2e_train.csv --valid e2e_valid.csv --results found.json \
        --parts sweep train trl memory [--rows 600 --epochs 3 --runs 12]

The grid is 4 ranks by 3 learning rates. Rows are drawn from all of the file; held out are the first
two of each table of the other one. Every run is a process of its own, and its time is that of the
whole process.

- sweep: `lorakit sweep` over all of them.
- train: `lorakit train` once for each. Its winner is that of the least held-out loss.
- trl: SFTTrainer and PEFT as they come, once for each, without evaluations.
- memory: 8 configurations together against the largest of them alone, a few steps each.

What was measured is kept in `--results` and not measured again, so that parts and runs may be
done one at a time. Of `train` and `trl`, `--runs` says how many runs are done; where these are
fewer than the grid, the whole is reckoned from their mean, and the table says how many there were.
"""

import argparse
import csv
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

RANKS, RATES = (4, 8, 16, 32), (1e-4, 3e-4, 1e-3)
PARTS = ("sweep", "train", "trl", "memory")
COLUMNS = {"prompt": "mr", "completion": "ref"}
MODEL = "smollm2-135m-instruct"

Results = dict[str, Any]


def write_rows(options: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """Rows to learn from, and two of each held-out prompt."""
    with options.train.open(newline="") as file:
        rows = list(csv.DictReader(file))
    with options.valid.open(newline="") as file:
        others = list(csv.DictReader(file))
    seen: dict[str, int] = {}
    held_out = []
    for row in others:
        seen[row["mr"]] = seen.get(row["mr"], 0) + 1
        if seen[row["mr"]] <= 2:
            held_out.append(row)
    paths = folder / "train.csv", folder / "valid.csv"
    drawn = random.Random(0).sample(rows, options.rows)
    for path, own in zip(paths, (drawn, held_out), strict=True):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(own[0]))
            writer.writeheader()
            writer.writerows(own)
    return paths


def recipe(options: argparse.Namespace, folder: Path, **training: Any) -> dict[str, Any]:
    """What all configurations have in common."""
    train, valid = write_rows(options, folder)
    return {
        "model": MODEL,
        "data": {"train": str(train), "eval": str(valid), "columns": COLUMNS},
        "lora": {"lora_alpha": 32},
        "training": {"num_train_epochs": options.epochs, **training},
        "samples": 0,
        "output_dir": str(folder / "out"),
    }


def timed(*command: str) -> float:
    """The seconds of a process."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return time.perf_counter() - began


def over(ranks: tuple[int, ...], rates: tuple[float, ...]) -> list[str]:
    """The options of `lorakit sweep`."""
    texts = [f"lora.r={','.join(map(str, ranks))}"]
    texts.append(f"training.learning_rate={','.join(map(str, rates))}")
    return [word for text in texts for word in ("--over", text)]


def sweep(options: argparse.Namespace, folder: Path) -> Results:
    """All of the grid in one process."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(options, folder)))
    seconds = timed("lorakit", "sweep", str(path), *over(RANKS, RATES))
    table = json.loads((folder / "out" / "leaderboard.json").read_text())
    kept = ("winner", "verdict", "steps", "ranks")
    rows = {row["name"]: row["report"] for row in table["configurations"]}
    return {"seconds": seconds, **{key: table[key] for key in kept}, "rows": rows}


def train(options: argparse.Namespace, folder: Path, r: int, rate: float) -> Results:
    """One of the grid."""
    path = folder / "recipe.yaml"
    values = recipe(options, folder, learning_rate=rate)
    path.write_text(yaml.safe_dump(values | {"lora": {"r": r, "lora_alpha": 32}}))
    seconds = timed("lorakit", "train", str(path))
    manifest = json.loads((folder / "out" / "lorakit.json").read_text())
    return {"seconds": seconds, "loss": manifest["eval_loss"], "steps": manifest["steps"]}


def trl(options: argparse.Namespace, folder: Path, r: int, rate: float) -> Results:
    """One of the grid, by the script below in a process of its own."""
    rows, _ = write_rows(options, folder)
    arguments = [str(rows), str(folder / "out"), str(options.epochs), str(r), str(rate)]
    return {"seconds": timed("benchmarks.sweep", "--trl", *arguments)}


def run_trl(rows: str, output: str, epochs: str, r: str, rate: str) -> None:
    """SFTTrainer and PEFT on prompts and completions, in bfloat16 as lorakit."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    import lorakit
    from benchmarks.peers import warmed

    with Path(rows).open(newline="") as file:
        examples = [
            {
                "prompt": [{"role": "user", "content": row["mr"]}],
                "completion": [{"role": "assistant", "content": row["ref"]}],
            }
            for row in csv.DictReader(file)
        ]
    model, tokenizer = lorakit.load_model(MODEL)
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(examples),
        peft_config=LoraConfig(
            r=int(r), lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        args=SFTConfig(
            output_dir=output,
            num_train_epochs=float(epochs),
            learning_rate=float(rate),
            per_device_train_batch_size=8,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            report_to="none",
            save_strategy="no",
            use_cpu=not torch.cuda.is_available(),
        ),
    )
    warmed(trainer).train()
    trainer.save_model(output)


def memory(options: argparse.Namespace, folder: Path) -> Results:
    """Peaks in MB of 8 together and of the one with the largest rank alone."""
    path = folder / "recipe.yaml"
    values = recipe(options, folder, max_steps=3)
    path.write_text(yaml.safe_dump(values))
    timed("lorakit", "sweep", str(path), "--no-prune", *over(RANKS, RATES[:2]))
    winner = json.loads((folder / "out" / "leaderboard.json").read_text())["winner"]
    found = {"together": folder / "out" / winner, "alone": folder / "alone"}
    values["lora"]["r"] = max(RANKS)
    path.write_text(yaml.safe_dump(values | {"output_dir": str(found["alone"])}))
    timed("lorakit", "train", str(path))
    return {
        name: json.loads((place / "lorakit.json").read_text())["peak_memory_mb"]
        for name, place in found.items()
    }


def in_a_folder(part: Callable[..., Results], *arguments: Any) -> Results:
    """Runs a part where nothing of it is left."""
    with tempfile.TemporaryDirectory() as place:
        return part(arguments[0], Path(place), *arguments[1:])


def measure(options: argparse.Namespace, found: Results) -> None:
    """Does what is asked and not there yet; everything is kept as soon as it is known."""

    def keep(place: Results, name: str, part: Callable[..., Results], *arguments: Any) -> None:
        if name not in place:
            place[name] = in_a_folder(part, options, *arguments)
            print(f"{part.__name__} {name}: {place[name]}", file=sys.stderr)
            options.results.write_text(json.dumps(found, indent=2))

    for part in options.parts:
        if part in ("sweep", "memory"):
            keep(found, part, {"sweep": sweep, "memory": memory}[part])
            continue
        # From both ends of the grid, so that a few runs are of large and of small ranks.
        grid = list(product(RANKS, RATES))
        ordered = [grid[i // 2 if i % 2 == 0 else -1 - i // 2] for i in range(len(grid))]
        runs = found.setdefault(part, {})
        for r, rate in ordered[: options.runs]:
            keep(runs, f"r={r}, learning_rate={rate}", {"train": train, "trl": trl}[part], r, rate)


def figures(found: Results) -> dict[str, Any]:
    """The ratios that can be said of what was measured."""
    count = len(RANKS) * len(RATES)
    said: dict[str, Any] = {}
    for part in ("train", "trl"):
        if runs := found.get(part):
            said[f"{part} runs"] = len(runs)
            whole = count * sum(run["seconds"] for run in runs.values()) / len(runs)
            said[f"{part} seconds"] = round(whole, 1)
            if "sweep" in found:
                said[f"{part} against sweep"] = round(whole / found["sweep"]["seconds"], 2)
    if "sweep" in found:
        said["sweep seconds"] = round(found["sweep"]["seconds"], 1)
        said["sweep winner"] = found["sweep"]["winner"]
    if len(runs := found.get("train", {})) == count:
        said["train winner"] = min(runs, key=lambda name: runs[name]["loss"])
    if "memory" in found:
        ratio = found["memory"]["together"] / found["memory"]["alone"]
        said["memory of 8 against one"] = round(ratio, 2)
    return said


def main() -> None:
    """Measures, shows the table, and prints one line of JSON."""
    if sys.argv[1:2] == ["--trl"]:
        run_trl(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--valid", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--parts", nargs="*", default=["sweep", "train"], choices=PARTS)
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--runs", type=int, default=len(RANKS) * len(RATES))
    options = parser.parse_args()
    asked = {"rows": options.rows, "epochs": options.epochs}
    found: Results = {"asked": asked}
    if options.results.is_file():
        found = json.loads(options.results.read_text())
        if found["asked"] != asked:
            raise SystemExit(f"{options.results} is of {found['asked']}: give another file")
    measure(options, found)
    said = figures(found)
    table = Table(title=f"{options.rows} rows, {options.epochs:g} epochs, 12 configurations")
    table.add_column("")
    table.add_column("", justify="right")
    for name, value in said.items():
        table.add_row(name, str(value))
    Console().print(table)
    print(json.dumps({"benchmark": "sweep", **asked, **said}))


if __name__ == "__main__":
    main()
