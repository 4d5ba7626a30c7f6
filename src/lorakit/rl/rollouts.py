"""Completions in the place of prompts: the batches of a step as they are learned.

Those of all batches of an optimizer step are sampled together, from the weights as they are. Where
a recipe learns completions in several steps (`steps_per_generation`, `num_iterations`), those of
all these steps are sampled before the first, and kept until the last; checkpoints have them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorakit.data.batches import taken_from, under
from lorakit.objectives.completion_rows import CompletionGroup, kept_groups, kept_tensors
from lorakit.rl.sources import RolloutSource, open_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lorakit.data.masking import TokenizedRow
    from lorakit.lora.model import LoraModel
    from lorakit.objectives.objective import Collate, Objective
    from lorakit.objectives.rollout import AskedPrompt, Rollout, RowsOfBatches

Tensors = dict[str, torch.Tensor]
Asking = Generator["Sequence[AskedPrompt]", "Sequence[Rollout]", list[Tensors]]
"""Yields prompts, is sent their rollouts, and returns batches."""

_AHEAD = "ahead."
"""Of a batch: those behind it whose prompts are sampled with its own, under `ahead.NUMBER.`."""
_KEPT = "rollouts-{}.safetensors"


def with_ahead(batch: Tensors, ahead: Sequence[Tensors]) -> Tensors:
    """A batch with those behind it whose prompts are sampled with its own, by `Rollouts`."""
    found = dict(batch)
    for i, other in enumerate(ahead):
        found |= under(f"{_AHEAD}{i}.", other)
    return {**found, f"{_AHEAD}count": torch.tensor(len(ahead))}


class Rollouts:
    """Puts completions of the model into batches.

    Args:
        objective: asks for them, and makes rows of them.
        tokenizer: says what ends a completion.
        collate: makes a batch of rows.
        source: writes them; None for the objective's own.

    Attributes:
        tokens, seconds: that were sampled, and how long sampling with rewards took.
        keep: takes what is kept of the completions of a step.
    """

    def __init__(
        self,
        objective: Objective,
        tokenizer: PreTrainedTokenizerBase,
        collate: Collate,
        source: RolloutSource | None = None,
    ) -> None:
        self._objective, self._collate = objective, collate
        self._source = source or open_source(objective.rollouts, objective, tokenizer)
        self._kept: list[Any] = []  # the rows of batches that are learned in several steps
        self._served = 0  # batches of them
        self.tokens, self.seconds = 0, 0.0
        self.keep: Callable[[dict[str, Any]], None] = lambda line: None

    def put_into(self, batches: Sequence[Tensors], model: LoraModel, step: int) -> list[Tensors]:
        """The batches of an optimizer step, those of prompts with completions in their place.

        Args:
            model: under the route that is in force.
            step: optimizer steps so far.

        Raises:
            LorakitError: the model failed, or a reward again and again.
        """
        return self._written(self.into(batches, step), model, step)

    def held_out(self, batches: Sequence[Tensors], model: LoraModel) -> list[Tensors]:
        """Held-out batches with completions in the place of prompts."""
        return self._written(self.into_held_out(batches), model, None)

    def into(self, batches: Sequence[Tensors], step: int) -> Asking:
        """As `put_into`, for whoever writes the completions of several runs together."""
        count = batches[0].get(f"{_AHEAD}count")
        if count is not None:
            ahead = [taken_from(batches[0], f"{_AHEAD}{i}.") for i in range(int(count))]
            self._kept, self._served = (yield from self._sampled([batches[0], *ahead], step)), 0
        if not self._kept:
            return self._collated(batches, (yield from self._sampled(batches, step)))
        begin, self._served = self._served, self._served + len(batches)
        size, times = len(self._kept), self._objective.num_iterations
        rows = [self._kept[(begin + i) % size] for i in range(len(batches))]
        if begin:
            rows = [[_again(one) for one in several] for several in rows]
        if self._served >= size * times:
            self._kept, self._served = [], 0
        return self._collated(batches, rows)

    def into_held_out(self, batches: Sequence[Tensors]) -> Asking:
        """As `held_out`, for whoever writes the completions of several runs together."""
        return self._collated(batches, (yield from self._sampled(batches, None)))

    def _written(self, asking: Asking, model: LoraModel, step: int | None) -> list[Tensors]:
        try:
            asked = next(asking)
            while True:
                asked = asking.send(self._source.write(asked, model, step))
        except StopIteration as end:
            batches: list[Tensors] = end.value
        return batches

    def _collated(self, batches: Sequence[Tensors], rows: RowsOfBatches) -> list[Tensors]:
        return [
            batch if own is None else self._collate(own)
            for batch, own in zip(batches, rows, strict=True)
        ]

    def _sampled(
        self, batches: Sequence[Tensors], step: int | None
    ) -> Generator[Sequence[AskedPrompt], Sequence[Rollout], RowsOfBatches]:
        """The rows in the place of each batch."""
        began, sampling = time.perf_counter(), self._objective.sampled_rows(batches, step)
        try:
            asked = next(sampling)
            while True:
                written = (yield asked) if asked else []
                self.tokens += sum(sum(one.learned) for one in written)
                asked = sampling.send(written)
        except StopIteration as end:
            rows: RowsOfBatches = end.value
        self.seconds += time.perf_counter() - began
        if step is not None and (kept := self._objective.taken_completions()):
            self.keep({"step": step + 1, **kept})
        return rows

    # --- in checkpoints -----------------------------------------------------------------------

    def save(self, folder: Path, process: int) -> None:
        """Writes what of this process is still to be learned into a checkpoint, if anything is."""
        if not self._kept:
            return
        from safetensors.torch import save_file

        kept = kept_tensors(self._kept)
        metadata = {"served": str(self._served), "rest": kept["rest"]}
        save_file(kept["tensors"], folder / _KEPT.format(process), metadata)

    def resume(self, checkpoint: Path, process: int) -> None:
        """Takes up what `save` has written."""
        self._kept, self._served = [], 0
        file = checkpoint / _KEPT.format(process)
        if not file.is_file():
            return
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            metadata = opened.metadata()
        self._kept = kept_groups(tensors, metadata["rest"])
        self._served = json.loads(metadata["served"])


def write_together(
    asking: Mapping[str, Asking],
    write: Callable[[Sequence[AskedPrompt], Sequence[str]], Sequence[Rollout]],
) -> dict[str, list[Tensors]]:
    """The batches of several runs, whose completions are written together.

    Args:
        asking: `Rollouts.into`, or `into_held_out`, by the adapter that answers.
        write: of prompts and the adapter of each.
    """
    found: dict[str, list[Tensors]] = {}
    sent: dict[str, Sequence[Rollout] | None] = dict.fromkeys(asking)
    while sent:
        asked: dict[str, Sequence[AskedPrompt]] = {}
        for name, rollouts in sent.items():
            try:
                asked[name] = asking[name].send(rollouts)  # type: ignore[arg-type]
            except StopIteration as end:
                found[name] = end.value
        every = [(prompt, name) for name, own in asked.items() for prompt in own]
        written = iter(write([one for one, _ in every], [n for _, n in every]) if every else ())
        sent = {name: [next(written) for _ in own] for name, own in asked.items()}
    return found


def _again(row: TokenizedRow) -> TokenizedRow:
    return row.again() if isinstance(row, CompletionGroup) else row
