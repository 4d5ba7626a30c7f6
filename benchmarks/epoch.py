"""An epoch over real rows: the seed document's recipe, TRL's SFTTrainer, and `lorakit train`.

    python -m benchmarks.epoch [--data rows.json --rows 96 --dtypes bfloat16 float32]

The rows are a JSON list in any of lorakit's formats; without a file they are the demo's orders.

- seed: Trainer and PEFT, every row padded to the largest length.
- trl: SFTTrainer and PEFT as they come, rows padded to the longest of their batch. Activation
  checkpointing is on then, which is slower and smaller; trl_plain is without it.
- lorakit: batches of as many rows, in one line.
- packed: `data.packing`, batches of as many tokens as the seed's, without padding.

All have the same rows, labels (the answers' tokens), seed, schedule and adapter. Tokens are real
ones, padding is not counted; time is Trainer's whole loop; "first step" counts from the start of
the process. The held-out loss is taken of each side's model by one function.

With `--random hidden=2048,layers=16` the base is a Llama of that size with random weights, for
GPUs that the bundled model leaves idle.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.peers import FIELDS, clock_of, one_epoch, warmed
from benchmarks.turns import Figures, peak_memory_mb, take_turns
from lorakit.demo.orders import make_rows

SIDES = ("seed", "trl", "trl_plain", "lorakit", "packed", "compiled")


def measure(side: str, options: argparse.Namespace) -> Figures:
    """Trains one epoch in this process."""
    import torch
    import transformers

    import lorakit

    transformers.utils.logging.disable_progress_bar()
    [dtype] = options.dtypes
    training = one_epoch(options)
    clock = clock_of(transformers.Trainer)
    with tempfile.TemporaryDirectory() as place:
        train, held_out = _split(options, Path(place))
        if side in ("lorakit", "packed", "compiled"):
            recipe = {
                "model": options.model,
                "dtype": dtype,
                "compile": side == "compiled",
                "data": {"train": str(train), "eval": 0, "max_length": options.length},
                "lora": FIELDS,
                "training": training,
                "output_dir": f"{place}/run",
            }
            recipe["data"]["packing"] = side == "packed"
            lorakit.train(recipe, quiet=True)
            memory = peak_memory_mb()
            from lorakit.adapters.open import open_adapter

            opened = open_adapter(Path(place) / "run", dtype=dtype)
            model, tokenizer = opened.model, opened.tokenizer
        else:
            make = _with_the_seed_s_recipe if side == "seed" else _with_trl
            if side == "trl_plain":
                training["gradient_checkpointing"] = False
            common = {"output_dir": f"{place}/run", "report_to": "none", "disable_tqdm": True}
            common["use_cpu"] = not torch.cuda.is_available()
            model, tokenizer = make(train, dtype, options, training | common)
            memory = peak_memory_mb()
        loss, tokens = _held_out_loss(model, tokenizer, held_out, train, options.length)
    return {
        "tokens_per_second": tokens / clock["seconds"],
        "memory_mb": memory,
        "held_out_loss": loss,
        "first_step": clock["first_step"],
        "steps": clock["steps"],
    }


def _split(options: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """The first rows of the file, and half as many behind them to be held out."""
    rows = json.loads(options.data.read_text())
    parts = rows[: options.rows], rows[options.rows : options.rows * 3 // 2]
    paths = folder / "train.json", folder / "held_out.json"
    for path, part in zip(paths, parts, strict=True):
        path.write_text(json.dumps(part))
    return paths


def _tokenized(path: Path, tokenizer: Any, length: int) -> list[Any]:
    from lorakit.data.dataset import prepare

    return prepare(tokenizer, path, 0, max_length=length).train


def _adapted(options: argparse.Namespace, dtype: str) -> tuple[Any, Any, Any]:
    import peft
    import transformers

    import lorakit

    model, tokenizer = lorakit.load_model(options.model, dtype)
    transformers.set_seed(42)
    return model, tokenizer, peft.LoraConfig(**FIELDS, task_type="CAUSAL_LM")


def _with_the_seed_s_recipe(
    train: Path, dtype: str, options: argparse.Namespace, arguments: dict[str, Any]
) -> tuple[Any, Any]:
    import peft
    import transformers

    model, tokenizer, config = _adapted(options, dtype)
    model = peft.get_peft_model(model, config)
    dataset = []
    for row in _tokenized(train, tokenizer, options.length):
        pads = options.length - len(row)
        dataset.append(
            {
                "input_ids": row.input_ids + [tokenizer.pad_token_id] * pads,
                "attention_mask": [1] * len(row) + [0] * pads,
                "labels": row.labels + [-100] * pads,
            }
        )
    trainer = transformers.Trainer(
        model=model, args=transformers.TrainingArguments(**arguments), train_dataset=dataset
    )
    warmed(trainer).train()
    return model, tokenizer


def _with_trl(
    train: Path, dtype: str, options: argparse.Namespace, arguments: dict[str, Any]
) -> tuple[Any, Any]:
    import datasets
    import trl

    model, tokenizer, config = _adapted(options, dtype)
    rows = _tokenized(train, tokenizer, options.length)
    dataset = datasets.Dataset.from_list(
        [{"input_ids": row.input_ids, "labels": row.labels} for row in rows]
    )
    arguments |= {"max_length": options.length, "bf16": dtype == "bfloat16"}
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**arguments),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=config,
    )
    warmed(trainer).train()
    return trainer.model, tokenizer


def _held_out_loss(
    model: Any, tokenizer: Any, held_out: Path, train: Path, length: int
) -> tuple[float, int]:
    """The loss over the held-out rows (nats a token), and the training rows' real tokens."""
    import torch

    from lorakit.data.batches import Collator
    from lorakit.models.loss import SupervisedLoss

    model.eval()
    loss = SupervisedLoss(model, own_logits=True)
    collate = Collator(tokenizer.pad_token_id)
    sums = [0.0, 0]
    with torch.inference_mode():
        for row in _tokenized(held_out, tokenizer, length):
            batch = {name: t.to(model.device) for name, t in collate([row]).items()}
            total, count = loss(model, batch)
            sums = [sums[0] + float(total), sums[1] + int(count)]
    tokens = sum(len(row) for row in _tokenized(train, tokenizer, length))
    return sums[0] / sums[1], tokens


def random_llama(size: str, folder: Path) -> str:
    """Writes a Llama with random weights in bfloat16 and the bundled tokenizer; its folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import lorakit

    wanted = {key: int(value) for key, value in (part.split("=") for part in size.split(","))}
    hidden, layers = wanted["hidden"], wanted["layers"]
    _, tokenizer = lorakit.load_model("smollm2-135m-instruct")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def main() -> None:
    """Takes turns, prints a table, and last one line of JSON with the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="a JSON list of rows")
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512, help="the largest length of a row")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--random", help="hidden=2048,layers=16: a random Llama of this size")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options.side, options)))
        return

    name = options.data.name if options.data else "the demo"
    table = Table(title=f"{options.rows} rows of {name}, batch {options.batch}")
    headings = ("dtype", "", "real tokens/s", "× trl", "× seed", "MB", "× trl", "held-out loss")
    for heading in (*headings, "steps", "first step s"):
        table.add_column(heading, justify="right")
    results = []
    with tempfile.TemporaryDirectory() as place:
        if options.random:
            options.model = random_llama(options.random, Path(place) / "model")
        if not options.data:
            options.data = Path(place) / "orders.json"
            options.data.write_text(json.dumps(make_rows(options.rows * 3 // 2, seed=42)))
        names = ("data", "rows", "batch", "length", "learning_rate", "model")
        given = [f"--{n.replace('_', '-')}={getattr(options, n)}" for n in names]
        for dtype in options.dtypes:
            case = [*given, f"--dtypes={dtype}"]
            found = take_turns("benchmarks.epoch", options.sides, case, options.rounds)
            for side, figures in found.items():
                ratios = {
                    f"{key}_by_{peer}": figures[key] / found[peer][key]
                    for key in ("tokens_per_second", "memory_mb", "held_out_loss")
                    for peer in ("trl", "seed")
                    if peer in found
                }
                results.append({"dtype": dtype, "side": side} | figures | ratios)
                table.add_row(
                    dtype,
                    side,
                    f"{figures['tokens_per_second']:.1f}",
                    f"{ratios.get('tokens_per_second_by_trl', 0):.2f}",
                    f"{ratios.get('tokens_per_second_by_seed', 0):.2f}",
                    f"{figures['memory_mb']:.0f}",
                    f"{ratios.get('memory_mb_by_trl', 0):.2f}",
                    f"{figures['held_out_loss']:.4f}",
                    f"{figures['steps']:.0f}",
                    f"{figures['first_step']:.1f}",
                )
    Console(width=120).print(table)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
