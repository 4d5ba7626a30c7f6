"""How fast `lorakit eval` answers the prompts of the E2E challenge, with an adapter and its base.

The adapter is trained on some rows first, if it is not there, so that it ends its answers. With
`--before` another checkout's command takes turns with this one's; with `--batch-sizes` so many rows
at once are tried, 0 for what the command takes by itself.

    python -m benchmarks.eval_answers --train e2e_train.csv --valid e2e_valid.csv
        [--before CHECKOUT] [--batch-sizes 0,16,32] [--adapter DIR]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from transformers import AutoTokenizer

import lorakit
from benchmarks.serve_common import MODEL
from lorakit.models.names import resolve

COLUMNS = {"prompt": "mr", "completion": "ref"}


def trained(folder: Path, train: Path, rows: int) -> Path:
    """An adapter that has learned from so many rows."""
    if not folder.is_dir():
        recipe = {
            "model": MODEL,
            "dtype": "bfloat16",
            "data": {"train": str(train), "eval": 0, "limit": rows, "columns": COLUMNS},
            "lora": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
            "training": {
                "num_train_epochs": 1,
                "learning_rate": 1e-3,
                "per_device_train_batch_size": 16,
            },
            "samples": 0,
            "output_dir": str(folder),
        }
        lorakit.train(recipe)
    return folder


def answered(
    adapter: Path, args: argparse.Namespace, rows: int, source: Path | None
) -> dict[str, float]:
    """Seconds and tokens of one evaluation, by the command of a checkout; None is this one."""
    environment = dict(os.environ)
    if source is not None:
        environment["PYTHONPATH"] = str((source / "src").resolve())
    with tempfile.TemporaryDirectory() as place:
        result = Path(place) / "result.json"
        command = [sys.executable, "-m", "lorakit", "eval", str(adapter), "--data", str(args.valid)]
        command += ["--metrics", "exact_match", "--json", str(result)]
        if args.limit:
            command += ["--limit", str(args.limit)]
        command += ["--columns", ",".join(f"{name}={own}" for name, own in COLUMNS.items())]
        command += ["--max-new-tokens", str(args.max_new_tokens), "--dtype", "bfloat16"]
        if rows:
            command += ["--batch-size", str(rows)]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        found = json.loads(result.read_text())
    tokenizer = AutoTokenizer.from_pretrained(resolve(MODEL).path)
    texts = [one[side] for one in found["examples"] for side in ("base", "tuned")]
    ends = len(texts)  # each answer's end token, of which the text says nothing
    tokens = sum(map(len, tokenizer(texts).input_ids)) + ends
    tuned = sum(map(len, tokenizer([one["tuned"] for one in found["examples"]]).input_ids))
    return {"seconds": found["seconds"], "tokens": tokens, "tuned_tokens": tuned}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--valid", type=Path, required=True)
    parser.add_argument(
        "--limit",
        type=int,
        default=100,
        help="rows of --valid, of which one prompt may have several",
    )
    parser.add_argument("--train-rows", type=int, default=320)
    parser.add_argument("--adapter", type=Path, help="where the adapter lies, or is trained")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--before", type=Path, help="another checkout, to compare with")
    parser.add_argument("--batch-sizes", default="0")
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    sides: dict[str, tuple[int, Path | None]] = {}
    if args.before is not None:
        sides["before"] = 0, args.before
    for rows in map(int, args.batch_sizes.split(",")):
        sides[f"now, {rows} rows" if rows else "now"] = rows, None
    with tempfile.TemporaryDirectory() as temporary:
        adapter = trained(args.adapter or Path(temporary) / "e2e", args.train, args.train_rows)
        found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for _ in range(args.rounds):
            for side, (rows, source) in sides.items():
                found[side].append(answered(adapter, args, rows, source))
                print(f"{side}: {found[side][-1]}", file=sys.stderr)
    print(f"\n| {args.valid.name} | seconds | tokens/s | ratio |\n| --- | --- | --- | --- |")
    rates = {
        side: statistics.median(one["tokens"] / one["seconds"] for one in runs)
        for side, runs in found.items()
    }
    first = next(iter(rates.values()))
    for side, runs in found.items():
        seconds = statistics.median(one["seconds"] for one in runs)
        print(f"| {side} | {seconds:.1f} | {rates[side]:.1f} | {rates[side] / first:.2f} |")
    print(json.dumps({"tokens_per_second": rates, "runs": found}))


if __name__ == "__main__":
    main()
