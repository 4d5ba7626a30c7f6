"""Watching a run: `monitor.jsonl`, and warnings that name the cause and the cure.

A warning is given once in a run, when it first holds, and stands in `metrics.jsonl` too. An adapter
that has learned nothing is found by checksums of its tensors. What is measured is `monitor.py`'s.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from lorakit.errors import listed
from lorakit.lora.model import LoraModel
from lorakit.objectives.objective import Objective
from lorakit.training.monitor import AdapterState, LoraMonitor
from lorakit.training.recorder import StepLines

EXPLODES = 10.0  # times the median of the gradients before
SEEN_BEFORE = 5  # gradients that make a median worth comparing with
STILL = 1e-7  # of the frozen weight's norm, which float32 adds without a trace
STILL_AFTER = 10  # steps
RISES = 3  # evaluations in a row


@dataclass(frozen=True)
class Warned:
    """A warning: the step, a name for it, what was seen with its cause, and what to do."""

    step: int
    name: str
    message: str
    cure: str

    @property
    def line(self) -> str:
        """The warning as one line."""
        return f"warning, step {self.step}: {self.message}. {self.cure}"

    def to_dict(self) -> dict[str, Any]:
        """Its line in `metrics.jsonl`."""
        found = {"step": self.step, "warning": self.name}
        return {**found, "message": self.message, "cure": self.cure}


class Watch(TrainerCallback):
    """Measures the adapter on every logged step and looks for what goes wrong.

    Args:
        model: the model, before a checkpoint is loaded: changes are measured from here.
        objective: has warnings of its own.
        measured: where measurements go; the first line names the modules.
        lines: where warnings go.
        say: shows a line to the user.
    """

    def __init__(
        self,
        model: LoraModel,
        objective: Objective,
        measured: StepLines,
        lines: StepLines,
        say: Callable[[str], None],
    ) -> None:
        self.monitor, self.objective = LoraMonitor(model), objective
        self.measured, self.lines, self.say = measured, lines, say
        self.warned: set[str] = set()
        self._gradients: list[float] = []
        self._eval_losses: list[tuple[int, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes up the warnings and losses of a run that is resumed."""
        self.measured.begin(state.global_step)
        if not self.measured.read():
            start = self.monitor.measure()
            norms = [_short(s.weight_norm) for s in start.values()]
            self.measured.append({"step": 0, "modules": list(start), "weight_norm": norms})
        self.warned |= {line["warning"] for line in self.lines.read() if "warning" in line}
        self._gradients = [e["grad_norm"] for e in state.log_history if "grad_norm" in e]
        self._eval_losses = [
            (e["step"], e["eval_loss"]) for e in state.log_history if "eval_loss" in e
        ]
        for entry in state.log_history:  # an objective compares with the first evaluations
            self._tell(Warned(entry["step"], *found) for found in self.objective.warnings(entry))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measures on the steps that Trainer logs, while the gradients are still there."""
        step = state.global_step + 1
        if step % max(1, state.logging_steps):
            return
        states = self.monitor.measure()
        self.measured.append(
            {
                "step": step,
                "gradient_norm": [_short(s.gradient_norm) for s in states.values()],
                "update_norm": [_short(s.update_norm) for s in states.values()],
            }
        )
        self._tell(_of_movement(step, self.monitor.total(states)))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Looks at what was logged; a gradient's norm is as it was before clipping."""
        step, logs = state.global_step, logs or {}
        if (norm := logs.get("grad_norm")) is not None:
            self._tell(_of_gradients(step, norm, self._gradients))
            self._gradients.append(norm)
        if "eval_loss" in logs:
            self._eval_losses.append((step, logs["eval_loss"]))
            self._tell(_of_held_out(self._eval_losses))
        self._tell(Warned(step, *found) for found in self.objective.warnings(logs))

    def _tell(self, warnings: Iterable[Warned]) -> None:
        for warned in warnings:
            if warned.name not in self.warned:
                self.warned.add(warned.name)
                self.lines.append(warned.to_dict())
                self.say(warned.line)


def _of_movement(step: int, total: AdapterState) -> Iterator[Warned]:
    if step < STILL_AFTER:
        return
    if total.gradient_norm == 0:
        yield Warned(
            step,
            "no gradient",
            "no gradient reaches the adapter: its modules do not take part in the loss",
            "Choose other lora.target_modules.",
        )
    elif total.relative_update < STILL:
        yield Warned(
            step,
            "still",
            f"the adapter does not move: ‖ΔW‖/‖W‖ is {total.relative_update:.1e} after "
            f"{step} steps, so the steps are too small",
            "Raise training.learning_rate; look whether warm-up or the schedule keep it at 0.",
        )


def _of_gradients(step: int, norm: float, before: list[float]) -> Iterator[Warned]:
    usual = median(before) if len(before) >= SEEN_BEFORE else 0.0
    if usual > 0 and norm > EXPLODES * usual:
        yield Warned(
            step,
            "gradients explode",
            f"the gradient's norm is {norm:.3g}, {norm / usual:.0f} times what it was: the steps "
            "are too large, or a row of this step is unlike all others",
            "Lower training.learning_rate, keep training.max_grad_norm at 1, "
            "and look at the longest and the strangest rows (lorakit check --show).",
        )


def _of_held_out(losses: list[tuple[int, float]]) -> Iterator[Warned]:
    last = [loss for _, loss in losses[-RISES - 1 :]]
    if len(last) > RISES and all(a < b for a, b in pairwise(last)):
        best, loss = min(losses, key=lambda entry: entry[1])
        yield Warned(
            losses[-1][0],
            "held-out loss rises",
            f"the held-out loss has risen {RISES} times in a row, from {last[0]:.4f} to "
            f"{last[-1]:.4f}: the rows are being learned by heart",
            f"Step {best} was best ({loss:.4f}): train for fewer epochs, or keep the best with "
            "early_stopping_patience=2.",
        )


def _short(value: float) -> float:
    """Four significant digits: what a reader can see, at a third of the bytes."""
    return float(f"{value:.4g}")


def checksums(model: nn.Module) -> dict[str, int]:
    """Of the trained tensors of a model: those that require a gradient."""
    return {
        name: zlib.crc32(p.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def unchanged_modules(start: Mapping[str, int], model: nn.Module) -> tuple[list[str], int]:
    """The modules whose trained tensors have the checksums `start`, and the number of all."""
    moved: dict[str, bool] = {}
    for name, value in checksums(model).items():
        module = name.partition(".lora_")[0] if ".lora_" in name else name.rpartition(".")[0]
        moved[module] = moved.get(module, False) or start.get(name) != value
    return [module for module, changed in moved.items() if not changed], len(moved)


_NO_SIGNAL = "frac_reward_zero_std"
"""Of the log: the share of groups of completions whose rewards are all equal."""


def warn_of_unchanged(
    start: Mapping[str, int], model: nn.Module, step: int, lines: StepLines
) -> Iterator[str]:
    """Appends a warning to `lines` if modules are as they were at `start`; yields it as a line.

    Args:
        start: the `checksums` of `model` then.
        step: the run's last.
    """
    modules, total = unchanged_modules(start, model)
    if not modules:
        return
    shares = [line[_NO_SIGNAL] for line in lines.read() if _NO_SIGNAL in line]
    if len(modules) == total and shares and min(shares) == 1:
        warned = Warned(
            step,
            "unchanged",
            f"the adapter is unchanged after {step} steps: in every group all completions had the "
            "same reward, so nothing was learned",
            "Look at completions and their rewards with lorakit rewards: give part of the reward "
            "for parts of the answer, train on some answers first, or take other prompts.",
        )
    elif len(modules) == total:
        warned = Warned(
            step,
            "unchanged",
            f"the adapter is unchanged: after {step} steps each of its {total} modules has the "
            "very numbers that it began with, so nothing was learned",
            "Look whether lora.target_modules take part in the loss, and whether "
            "training.learning_rate and its schedule are above 0.",
        )
    else:
        warned = Warned(
            step,
            "partly unchanged",
            f"{len(modules)} of {total} modules are unchanged after {step} steps: "
            f"{listed(modules, 3)}",
            "No gradient has reached them: leave them out of lora.target_modules, or train longer "
            "where they are experts.",
        )
    if not any(line.get("warning") == warned.name for line in lines.read()):
        lines.append(warned.to_dict())
    yield warned.line
