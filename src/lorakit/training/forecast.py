"""How long a run will take and how much memory, measured on a few of its own batches.

The batches of all epochs are known before the first step. Some of them, spread evenly over all
sizes, and the largest are trained for real on this machine; what they take stands for the others.
Weights and random numbers are afterwards what they were.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import count
from statistics import mean, pstdev

import torch
from transformers.trainer_utils import IntervalStrategy

from lorakit.data.batches import parts_of
from lorakit.errors import LorakitError
from lorakit.progress import track
from lorakit.training.machine import LESS_MEMORY, memory_mb, peak_memory_mb
from lorakit.training.position import planned_steps, steps_per_epoch
from lorakit.training.trainer import LoraTrainer, enable_checkpointing

TRIED, EVALUATED = 8, 3
"""Batches that are timed, of training and of the held-out rows."""

TIGHT = 0.9  # of the memory: what else runs may need the rest

LEAST_ERROR = 0.05  # of the time: a machine is not the same from minute to minute


@dataclass(frozen=True)
class Forecast:
    """What a run will take from its first step on; times in seconds, memory in MB of 10**6 bytes.

    Attributes:
        steps: of the optimiser.
        error: `seconds` more or less; by as much the measured steps differ from each other.
        evaluations: of the held-out rows, the base model's at the end included.
        longest_tokens: of the largest batch, which was trained too.
        peak_memory_mb: of the process, or on the GPU.
        memory_mb: what the machine, the container or the GPU has.
        generates: evaluations generate answers, whose time is not in it.
    """

    steps: int
    seconds: float
    error: float
    train_seconds: float
    eval_seconds: float
    evaluations: int
    longest_tokens: int
    peak_memory_mb: float
    memory_mb: float
    generates: bool = False

    @property
    def line(self) -> str:
        """The forecast as one line, with the time of day at which the run will be done."""
        end = datetime.now() + timedelta(seconds=self.seconds)
        tight = self.peak_memory_mb > TIGHT * self.memory_mb
        done = end.strftime("%H:%M" if self.seconds < 20 * 3600 else "%d %B, %H:%M")
        return (
            f"forecast: {self.steps:,} steps and {self.evaluations} evaluations in "
            f"{_duration(self.seconds)} ± {_duration(self.error)} (done at {done}), peak memory "
            f"{self.peak_memory_mb / 1e3:.1f} of {self.memory_mb / 1e3:.0f} GB"
            + (f", which is tight: {LESS_MEMORY}" if tight else "")
            + ("; the answers of eval.generate take more" if self.generates else "")
        )


def forecast(trainer: LoraTrainer) -> Forecast:
    """Trains a few batches of a run that has not begun, in this process.

    Raises:
        LorakitError: the largest batch does not fit into the GPU's memory.
    """
    args = trainer.args
    steps = planned_steps(args, len(trainer.sampler))
    lengths = [len(row) for row in trainer.train_dataset.rows]
    batches = _all_batches(trainer, steps)
    largest = max(batches, key=lambda batch: sum(lengths[i] for i in batch))
    longest = sum(lengths[i] for i in largest)
    with _undone(trainer) as train:
        try:
            train(largest)  # takes the memory, and what only the first step takes
            before, began = _sampling_seconds(trainer), time.perf_counter()
            rate, spread = _rate(train, _spread_out(batches, lengths, TRIED), lengths)
            # What is sampled once and learned several times was sampled for each batch here.
            again = 1 - 1 / trainer.objective.num_iterations
            sampled = (_sampling_seconds(trainer) - before) / (time.perf_counter() - began)
            rate *= 1 - sampled * again
            eval_seconds, evaluations = _evaluations(trainer, steps)
        except torch.OutOfMemoryError as error:
            raise LorakitError(
                f"the GPU's {memory_mb() / 1e3:.0f} GB are not enough for the largest batch "
                f"({len(largest)} rows, {longest:,} tokens) and the evaluation: {LESS_MEMORY}"
            ) from error
    train_seconds = rate * sum(lengths[i] for batch in batches for i in batch)
    seconds = train_seconds + eval_seconds * evaluations
    return Forecast(
        steps=steps,
        seconds=seconds,
        error=max(LEAST_ERROR, spread) * seconds,
        train_seconds=train_seconds,
        eval_seconds=eval_seconds,
        evaluations=evaluations,
        longest_tokens=longest,
        peak_memory_mb=peak_memory_mb(),
        memory_mb=memory_mb(),
        generates=trainer.answers is not None,
    )


def _sampling_seconds(trainer: LoraTrainer) -> float:
    return trainer.rollouts.seconds if trainer.rollouts is not None else 0.0


def _all_batches(trainer: LoraTrainer, steps: int) -> list[list[int]]:
    """The batches of the whole run."""
    together = trainer.args.gradient_accumulation_steps
    batches: list[list[int]] = []
    epoch = 0
    while steps > 0:
        # The last step of an epoch takes what is left.
        expected = trainer.expected_batches(epoch)
        batches += expected[: steps * together]
        steps -= math.ceil(len(expected) / together)
        epoch += 1
    return batches


@contextmanager
def _undone(trainer: LoraTrainer) -> Iterator[Callable[[Sequence[int]], None]]:
    """Gives a function that trains on a batch; nothing is left of that but the memory it took."""
    model, args = trainer.model, trainer.args
    enable_checkpointing(model, args)  # as Trainer does when it begins
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=True)
    was_training = model.training
    model.train()

    steps = count()

    def train(rows: Sequence[int]) -> None:
        [batch] = trainer.with_answers([trainer.train_dataset[list(rows)]], next(steps))
        for part in parts_of(trainer._prepare_inputs(batch)):
            loss = trainer.objective.loss(trainer.forward.calling(model), part)
            (loss.total / loss.count).backward()
        if torch.nn.utils.clip_grad_norm_(parameters, 1.0).isfinite():
            optimizer.step()  # of length 0
        optimizer.zero_grad()
        _wait()

    try:
        with torch.random.fork_rng():
            yield train
    finally:
        optimizer.zero_grad()
        model.train(was_training)


def _rate(
    run: Callable[[Sequence[int]], None], batches: Sequence[Sequence[int]], lengths: Sequence[int]
) -> tuple[float, float]:
    """Seconds a token, and the standard deviation of that over the batches, as a share."""
    seconds, tokens = [], []
    for batch in track(batches, "measuring batches for the forecast"):
        began = time.perf_counter()
        run(batch)
        seconds.append(time.perf_counter() - began)
        tokens.append(sum(lengths[i] for i in batch))
    rates = [s / n for s, n in zip(seconds, tokens, strict=True)]
    return sum(seconds) / sum(tokens), pstdev(rates) / mean(rates)


def _evaluations(trainer: LoraTrainer, steps: int) -> tuple[float, int]:
    """The seconds of an evaluation, and how many there will be."""
    if not trainer.held_out:
        return 0.0, 0
    args, every = trainer.args, steps
    if args.eval_strategy == IntervalStrategy.EPOCH:
        every = steps_per_epoch(args, len(trainer.sampler))
    elif args.eval_strategy == IntervalStrategy.STEPS:  # below 1 it is a share
        every = math.ceil(args.eval_steps * (1 if args.eval_steps >= 1 else steps))

    def evaluate(batch: Sequence[int]) -> None:
        trainer.model.eval()
        trainer.sums_of_held_out(list(batch))
        _wait()
        trainer.model.train()

    lengths = [len(row) for row in trainer.eval_dataset.rows]
    chosen = _spread_out(trainer.held_out, lengths, EVALUATED)
    rate, _ = _rate(evaluate, [chosen[-1], *chosen], lengths)
    # The last one counts once, and then the base model has its own.
    return rate * sum(lengths), math.ceil(steps / every) + 1


def _spread_out(
    batches: Sequence[Sequence[int]], lengths: Sequence[int], count: int
) -> list[Sequence[int]]:
    """`count` batches, from the middle of as many equal parts of all of them sorted by size."""
    ordered = sorted(batches, key=lambda batch: sum(lengths[i] for i in batch))
    count = min(count, len(ordered))
    return [ordered[(2 * i + 1) * len(ordered) // (2 * count)] for i in range(count)]


def _duration(seconds: float) -> str:
    """In the unit that tells most: `42 s`, `12 min`, `3.4 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
