"""Steps of GRPO: TRL's GRPOTrainer with PEFT, and `lorakit train`.

    python -m benchmarks.grpo [--steps 6 --prompts 4 --generations 8 --tokens 64]

All sides have the same prompts, reward, LoRA, seed, learning rate and loss (`dapo`, without KL to a
reference); a step samples `--prompts` times `--generations` completions of at most `--tokens`
tokens at temperature 1, and learns from all of them once. The prompts ask for stories, so that
hardly any completion ends earlier; the reward is the share of different words.

- trl: GRPOTrainer and PEFT as they come on a CPU: transformers' generate, and activation
  checkpointing.
- trl_plain: without activation checkpointing, which is faster and larger.
- lorakit: the engine samples from the weights that are trained.

Time is Trainer's whole loop, and that of a step behind the first. Memory is the process' peak, with
that of the processes that it started (lorakit calls reward functions in one of their own).
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.peers import FIELDS, clock_of, compare
from benchmarks.turns import Figures, memory_of_children, peak_memory_mb, take_turns

SIDES = ("trl", "trl_plain", "lorakit")

REWARDS = '''\
def distinct_words(completions, **kwargs):
    """The share of words that are different ones."""
    found = []
    for completion in completions:
        words = completion[0]["content"].lower().split()
        found.append(len(set(words)) / max(1, len(words)))
    return found
'''


def measure(side: str, options: argparse.Namespace) -> Figures:
    """Trains some steps in this process."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    clock = clock_of(transformers.Trainer)
    training = {
        "max_steps": options.steps,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 42,
    }
    with tempfile.TemporaryDirectory() as place, memory_of_children() as of_children:
        folder = Path(place)
        (folder / "rewards.py").write_text(REWARDS)
        if side == "lorakit":
            logs = _with_lorakit(options, training, folder)
        else:
            training["gradient_checkpointing"] = side == "trl"
            logs = _with_trl(options, training, folder)
    completions = options.steps * options.prompts * options.generations
    return {
        "completions_per_second": completions / clock["seconds"],
        "memory_mb": peak_memory_mb() + of_children(),
        "children_mb": of_children(),
        "later_step": clock.get("later_step", clock["seconds"]),
        "steps": clock["steps"],
    } | logs


def _stories(options: argparse.Namespace) -> list[list[dict[str, str]]]:
    from lorakit.demo.orders import CITIES, COLORS, ITEMS

    items, asked = [*ITEMS], []
    for i in range(options.steps * options.prompts):
        what = f"{COLORS[i % len(COLORS)]} {items[i % len(items)]} in {CITIES[i % len(CITIES)]}"
        asked.append(f"Write a long story about a {what}.")
    return [[{"role": "user", "content": text}] for text in asked]


def _with_lorakit(
    options: argparse.Namespace, training: dict[str, Any], folder: Path
) -> dict[str, float]:
    import lorakit

    rows = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in _stories(options))
    (folder / "prompts.jsonl").write_text(rows)
    recipe = {
        "model": options.model,
        "dtype": options.dtype,
        "data": {"train": f"{folder}/prompts.jsonl", "eval": 0},
        "objective": {
            "type": "grpo",
            "num_generations": options.generations,
            "max_completion_length": options.tokens,
            "temperature": 1.0,
            "beta": 0.0,
            "loss_type": "dapo",
            "rewards": [f"{folder}/rewards.py:distinct_words"],
        },
        "lora": FIELDS,
        "training": training | {"per_device_train_batch_size": options.prompts},
        "samples": 0,
        "output_dir": f"{folder}/run",
    }
    lorakit.train(recipe, quiet=True)
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    logged = [one for one in map(json.loads, lines) if "reward" in one]
    return _means(logged, {"reward": "reward", "length": "completions/mean_length"})


def _with_trl(
    options: argparse.Namespace, training: dict[str, Any], folder: Path
) -> dict[str, float]:
    import datasets
    import peft
    import torch
    import trl

    import lorakit

    model, tokenizer = lorakit.load_model(options.model, options.dtype)
    sys.path.insert(0, str(folder))
    import rewards  # type: ignore[import-not-found]

    config = trl.GRPOConfig(
        **training,
        per_device_train_batch_size=options.prompts * options.generations,
        num_generations=options.generations,
        max_completion_length=options.tokens,
        temperature=1.0,
        beta=0.0,
        loss_type="dapo",
        output_dir=f"{folder}/trl",
        report_to="none",
        disable_tqdm=True,
        bf16=options.dtype == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=[rewards.distinct_words],
        args=config,
        train_dataset=datasets.Dataset.from_list([{"prompt": p} for p in _stories(options)]),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(**FIELDS, task_type="CAUSAL_LM"),
    )
    trainer.train()
    logged = [one for one in trainer.state.log_history if "reward" in one]
    return _means(logged, {"reward": "reward", "length": "completions/mean_length"})


def _means(logged: list[dict[str, Any]], names: dict[str, str]) -> dict[str, float]:
    return {key: sum(one[name] for one in logged) / len(logged) for key, name in names.items()}


def main() -> None:
    """Takes turns, prints a table, and last one line of JSON with the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options.side, options)))
        return
    given = {k: v for k, v in vars(options).items() if k not in ("rounds", "sides", "side")}
    case = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    found = take_turns("benchmarks.grpo", options.sides, case, options.rounds)
    title = f"{options.prompts} prompts of {options.generations} completions, {options.dtype}"
    columns = {
        "completions/s": "completions_per_second",
        "s a later step": "later_step",
        "MB": "memory_mb",
        "reward": "reward",
        "tokens": "length",
        "steps": "steps",
    }
    compare(title, found, columns, speed="completions_per_second")


if __name__ == "__main__":
    main()
