"""`transformers.Trainer` for adapters: honest loss, a step's batches, held-out scores.

Everything that Trainer does well stays Trainer's (optimiser, schedule, accumulation, several
processes, callbacks). Here is only what an adapter needs otherwise: what the loss is divided by,
in which order rows come, and what held-out rows score; checkpoints are `checkpointed_trainer.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate, chain, islice
from typing import Any

import torch
from accelerate.utils import gather_object, patch_environment
from torch import nn
from torch.utils.data import DataLoader
from transformers.training_args import TrainingArguments

from lorakit.data.batches import count_tokens, in_parts, parts_of
from lorakit.data.masking import TokenizedRow
from lorakit.data.streaming import RowStream
from lorakit.errors import InputError
from lorakit.lora.model import LoraModel
from lorakit.objectives.batch_sums import EACH, MAX, Loss, added, as_tensors, with_sums
from lorakit.objectives.forward import Forward
from lorakit.objectives.objective import Batch, Objective
from lorakit.progress import track
from lorakit.rl.rollouts import Rollouts
from lorakit.rl.sources import RolloutSource
from lorakit.training.batching import (
    BatchDataset,
    Batching,
    EpochSampler,
    StreamDataset,
    only,
)
from lorakit.training.checkpointed_trainer import CheckpointedTrainer
from lorakit.training.generation import HeldOutAnswers
from lorakit.training.interrupt import Interrupt
from lorakit.training.neftune import EmbeddingNoise
from lorakit.training.position import planned_steps, steps_per_epoch
from lorakit.training.schedule import over_loraplus_groups, warm_from_first
from lorakit.training.sharded import asks_for_fsdp, switch_on
from lorakit.training.watch import checksums

PASS_TOKENS = {"cpu": 2048, "cuda": 16_384}
"""The tokens of a pass by device, where more are no faster and take more memory."""


class LoraTrainer(CheckpointedTrainer):
    """Trains the active adapter of a `LoraModel` on tokenised rows.

    Args:
        model: the wrapped model.
        args: Trainer's own arguments.
        train_rows, eval_rows: the rows; `eval_rows` may be empty.
        batching: how rows become batches.
        objective: what is learned: the loss of a batch, and the scores of held-out rows.
        loraplus_lr_ratio: how many times faster `B` learns than `A` (LoRA+); None for as fast.
        tokenizer: for answers that the model samples in training, if the objective asks for some.
        stream: the rows to learn from, of which `train_rows` are then only the first.
        source: what samples completions; None opens the objective's own.

    Attributes:
        start: the adapter's checksums before the first step; None where weights are spread.
        interrupt: what processes agree on stopping by; None to ignore signals.
        answers: held-out prompts that each evaluation answers.
    """

    def __init__(
        self,
        model: LoraModel,
        args: TrainingArguments,
        train_rows: Sequence[TokenizedRow],
        eval_rows: Sequence[TokenizedRow],
        batching: Batching,
        objective: Objective,
        loraplus_lr_ratio: float | None = None,
        stream: RowStream | None = None,
        tokenizer: Any = None,
        source: RolloutSource | None = None,
    ) -> None:
        self.expected_batches = partial(batching.train_batches, train_rows, args)
        sampler = EpochSampler(self.expected_batches)
        dataset: BatchDataset | StreamDataset = BatchDataset(train_rows, batching, learning=True)
        if stream is not None:
            count = args.max_steps * args.gradient_accumulation_steps * args.world_size
            sampler = EpochSampler(lambda epoch: range(count))
            batches = batching.stream_batches(stream, args)
            dataset = StreamDataset(batches, train_rows, batching, count)
        self.held_out = batching.eval_batches(eval_rows, args)
        held_out = BatchDataset(eval_rows, batching, learning=False)
        self.objective, self.batching = objective, batching
        self.rollouts: Rollouts | None = None
        if objective.on_policy:
            collate = batching.collator(learning=True)
            self.rollouts = Rollouts(objective, tokenizer, collate, source)
        self._metrics: dict[str, torch.Tensor] = {}  # summed since they were logged last
        self.loraplus_lr_ratio = loraplus_lr_ratio
        self.interrupt: Interrupt | None = None
        self.answers: HeldOutAnswers | None = None
        # Trainer would make a smoother of its own, which the loss here has no use for.
        smoothing, args.label_smoothing_factor = args.label_smoothing_factor, 0.0
        try:
            super().__init__(
                sampler,
                model=model,
                args=args,
                train_dataset=dataset,
                eval_dataset=held_out if eval_rows else None,
                data_collator=only,
            )
        finally:
            args.label_smoothing_factor = smoothing
        if args.world_size > 1:
            objective.gather = self._gather
        objective.pass_tokens = self._pass_tokens()
        self.forward = objective.forward(model, self.is_spread)
        self.start = None if self.is_spread else checksums(model)
        self.noise = EmbeddingNoise(model, args.neftune_noise_alpha)
        self.neftune_noise_alpha = None  # Trainer's takes a line of rows for one row
        # compute_loss divides by the whole optimiser step's tokens itself.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True

    @property
    def is_spread(self) -> bool:
        """Whether no process has all weights."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _pass_tokens(self) -> int | None:
        """`Objective.pass_tokens`; several processes must take as many passes each, and DeepSpeed
        steps after each."""
        if self.args.world_size > 1 or self.is_spread or not isinstance(self.model, LoraModel):
            return None
        return PASS_TOKENS.get(next(self.model.parameters()).device.type)

    def create_accelerator_and_postprocess(self) -> None:
        """As Trainer's; FSDP2 that is asked for is used on CPUs too."""
        wanted = asks_for_fsdp(self.args)
        with patch_environment(accelerate_use_fsdp=wanted):  # else set for later runs too
            super().create_accelerator_and_postprocess()
            if wanted:
                switch_on(self.accelerator, self.args.fsdp_plugin_args)
                self.is_fsdp_enabled = True
        if self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3:
            raise InputError(
                "DeepSpeed's ZeRO stage 3 is not supported: use stage 2, or training.fsdp: true, "
                "which spreads the weights too"
            )

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """Trainer's; resumes at the place in the rows at which the checkpoint was written.

        What an optimiser averages for evaluation is then in the weights.
        """
        self.compute_constants()
        found = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        self._averaged()
        return found

    def compute_constants(self, runs: int = 1) -> None:
        """What training does not change of the rows, where that is computed before it begins.

        Args:
            runs: how many runs learn from these rows and have it in common.
        """
        batches = len(self.sampler)
        epochs = planned_steps(self.args, batches) / steps_per_epoch(self.args, batches)
        if not self.objective.computes_constants(epochs * runs) or self.is_spread:
            return
        # Rows of a stream are read once, so that nothing would be saved.
        learned = None if self.streams else self.train_dataset
        for dataset in filter(None, (learned, self.eval_dataset)):
            if not self.objective.constants.of(dataset.rows):
                self._compute_constants(dataset.rows)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's, over the groups of LoRA+ where these are asked for."""
        if (ratio := self.loraplus_lr_ratio) and self.optimizer is None:
            trained = self.model if model is None else model
            chosen = self.get_optimizer_cls_and_kwargs(self.args, trained)
            self.optimizer_cls_and_kwargs = over_loraplus_groups(trained, self.args, ratio, *chosen)
        return super().create_optimizer(model)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """Trainer's, with a warm-up that begins above 0."""
        if self.lr_scheduler is None:
            made = super().create_scheduler(num_training_steps, optimizer)
            warmup = self.args.get_warmup_steps(num_training_steps)
            self.lr_scheduler = warm_from_first(made, warmup, num_training_steps)
        return self.lr_scheduler

    # --- loss -----------------------------------------------------------------------------

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Trainer's, of each part of a batch that is computed in several passes."""
        step = super().training_step
        losses = [step(model, part, num_items_in_batch) for part in parts_of(inputs)]
        return torch.stack(losses).sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """The batch's share of the loss per supervised token of the whole optimiser step.

        `num_items_in_batch` counts the supervised tokens of all accumulated batches and ranks,
        so the sum over them is the mean over tokens, however they were divided up.
        """
        with self.noise.on(inputs):
            forward = self.forward.calling(model, self.args.label_smoothing_factor)
            loss = self.objective.loss(forward, inputs)
        self.take_metrics(loss)
        whole = loss.count if num_items_in_batch is None else num_items_in_batch
        whole = max(whole, 1)  # nothing to learn where all completions are masked
        # DDP averages gradients over ranks; the sum is wanted.
        return loss.total * self.accelerator.num_processes / whole

    def take_metrics(self, loss: Loss) -> None:
        """Adds the metrics of a batch that is learned to those that are logged next."""
        if loss.metrics and self.model.training:
            self._metrics = added(self._metrics, loss.sums())

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Trainer's, with the objective's metrics since the last time beside the loss."""
        if self._metrics and "loss" in logs:
            found = self.objective.held_out(self._over_processes(self._metrics))
            self._metrics = {}
            logs |= {name: value for name, value in found.items() if name != "loss"}
        super().log(logs, *args, **kwargs)

    @torch.no_grad()
    def held_out_scores(self) -> dict[str, float]:
        """The held-out rows' `loss` per supervised token (or the objective's unit), and scores,
        those of answers too where some are generated.
        """
        self.model.eval()
        self._averaged()
        before: dict[str, torch.Tensor] = {}
        if self.objective.needs_all_batches and not self.objective.samples_held_out:
            before = self._over_held_out(self.objective.beforehand)

        def loss(forward: Forward, batch: Batch) -> Mapping[str, torch.Tensor]:
            return self.objective.loss(forward, with_sums(batch, before)).sums()

        found = self.objective.held_out(self._over_held_out(loss))
        if self.answers is not None:
            place = self.args.process_index, self.args.world_size
            found |= self.answers.scores(self._lora_model(), *place)
        return found

    def _over_held_out(
        self, measure: Callable[[Forward, Batch], Mapping[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """What `measure` gives of all held-out rows, summed over batches and processes."""
        sums: dict[str, torch.Tensor] = {}
        batches, processes = self.held_out, self.args.world_size
        # Every process takes as many turns, as sharded weights need, and no row counts twice.
        turns = range(math.ceil(len(batches) / processes))
        own = [turn * processes + self.args.process_index for turn in turns]
        chosen = [batches[mine % len(batches)] for mine in own]
        made = zip(own, self._of_held_out(chosen), strict=True)
        for mine, batch in track(made, "evaluating batches", len(own)):
            found = self._measured(measure, [self._prepare_inputs(batch)])
            if mine >= len(batches):
                found = {
                    name: value[:0] if name.startswith(EACH) else torch.zeros_like(value)
                    for name, value in found.items()
                }
            sums = added(sums, found)
        return self._over_processes(sums)

    def _of_held_out(self, batches: Sequence[list[int]]) -> Iterator[dict[str, torch.Tensor]]:
        """The tensors of held-out batches, where the model answers them with its completions."""
        made = (self.eval_dataset[rows] for rows in batches)
        if self.rollouts is None or not self.objective.samples_held_out:
            return made
        self._tell_objective(self.state.global_step)
        return iter(self.rollouts.held_out([*made], self._lora_model()))

    def _tell_objective(self, step: int) -> None:
        """`Objective.trainer_state`, which reward functions may read."""
        self.objective.trainer_state = {
            "global_step": step,
            "max_steps": self.state.max_steps,
            "epoch": self.state.epoch or 0.0,
        }

    @torch.no_grad()
    def _compute_constants(self, rows: Sequence[TokenizedRow]) -> None:
        """What training does not change of these rows, each process computing its share."""
        self.model.eval()
        dataset = BatchDataset(rows, self.batching, learning=False)
        batches = self.batching.held_out_batches(rows)
        ends = [*accumulate(len(row.sequences) for row in rows)]
        found: dict[str, torch.Tensor] = {}
        processes = self.args.world_size
        for turn in track(range(math.ceil(len(batches) / processes)), "computing the reference"):
            mine = turn * processes + self.args.process_index
            chosen = batches[mine % len(batches)]
            batch = self._prepare_inputs(dataset[chosen])
            for name, values in self._measured(self.objective.row_constants, [batch]).items():
                found.setdefault(name, torch.zeros(ends[-1], dtype=torch.float64))
                if mine < len(batches):  # else another process has it too
                    begins = [ends[i] - len(rows[i].sequences) for i in chosen]
                    ranges = zip(begins, (ends[i] for i in chosen), strict=True)
                    found[name][[p for begin, end in ranges for p in range(begin, end)]] = values
        self.objective.constants.add(rows, self._over_processes(found))

    def sums_of_held_out(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """A batch's `total` and `count`, and the objective's metrics: float64, on the CPU."""
        [batch] = map(self._prepare_inputs, self._of_held_out([rows]))
        return self._measured(lambda *given: self.objective.loss(*given).sums(), [batch])

    @torch.no_grad()
    def _measured(
        self,
        measure: Callable[[Forward, Batch], Mapping[str, torch.Tensor]],
        batches: Sequence[Batch],
    ) -> dict[str, torch.Tensor]:
        """What `measure` gives of these batches, summed: float64, on the CPU."""
        forward = self.forward.calling(self.model)
        sums: dict[str, torch.Tensor] = {}
        # Compiled for training, the blocks would be compiled again without gradients.
        with torch.compiler.set_stance("force_eager"):
            for batch in batches:
                sums = added(sums, as_tensors(measure(forward, batch)))
        return sums

    def _over_processes(self, sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """These sums, added up over the processes of the run; on the CPU."""
        if self.args.world_size == 1 or not sums:
            return sums
        added_up = {k: v for k, v in sums.items() if not k.startswith((EACH, MAX))}
        own = {k: v.to(self.args.device) for k, v in added_up.items()}
        found: dict[str, torch.Tensor] = self.accelerator.reduce(own, "sum")
        together: dict[str, torch.Tensor] = {}
        for name, value in sums.items():
            if name.startswith(EACH):
                together[name] = torch.cat(gather_object([value]))
            elif name.startswith(MAX):
                together[name] = torch.stack(gather_object([value])).amax(0)
        return {name: value.cpu() for name, value in found.items()} | together

    def _gather(self, own: list[Any]) -> tuple[list[Any], int]:
        """`Objective.gather` over the processes of the run."""
        parts = gather_object([own])
        before = sum(len(part) for part in parts[: self.args.process_index])
        return [value for part in parts for value in part], before

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Logs and returns what `held_out_scores` gives, as `eval_loss` and so on."""
        metrics = {f"{metric_key_prefix}_{k}": value for k, value in self.held_out_scores().items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _evaluate(
        self, trial: Any, ignore_keys_for_eval: list[str] | None, skip_scheduler: bool = False
    ) -> dict[str, float]:
        """Trainer's; a run that is resumed has had its evaluation before the start."""
        if skip_scheduler and self.state.global_step > 0:
            return {}
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    # --- batches --------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, torch.Tensor]], num_batches: int, device: Any
    ) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor]:
        """This process' batches of an optimiser step, and what the loss of all is divided by.

        Counts both kinds of tokens, as the step will use them up, and whether a process was
        asked to stop.
        """
        before = self._sampled
        batches = self.with_answers(list(islice(epoch_iterator, num_batches)))
        sampled, took = (now - was for now, was in zip(self._sampled, before, strict=True))
        self.counts.sampling_seconds += took
        return self.counted(batches, int(sampled))

    def counted(
        self, batches: Sequence[dict[str, torch.Tensor]], sampled: int = 0
    ) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor]:
        """Batches of an optimizer step as the loss takes them, and what it is divided by.

        Args:
            sampled: how many tokens were sampled for them.
        """
        if self.objective.needs_all_batches:
            batches = self.with_all_sums([self._prepare_inputs(batch) for batch in batches])
        tokens = torch.zeros(5, dtype=torch.int64, device=self.args.device)
        tokens[4] = sampled
        tokens[2] = self.interrupt is not None and self.interrupt.asked
        for batch in chain.from_iterable(map(parts_of, batches)):
            tokens[0] += count_tokens(batch)
            tokens[1] += self.objective.supervised(batch)
            tokens[3] += self.objective.count(batch)
        tokens = self.accelerator.reduce(tokens, "sum")
        self.counts.train_tokens += int(tokens[0])
        self.counts.supervised_tokens += int(tokens[1])
        self.counts.sampled_tokens += int(tokens[4])
        if self.interrupt:
            self.interrupt.agreed = bool(tokens[2])
        return [*batches], tokens[3]

    @property
    def _sampled(self) -> tuple[float, float]:
        """Tokens that were sampled, and the seconds for that."""
        return (0, 0.0) if self.rollouts is None else (self.rollouts.tokens, self.rollouts.seconds)

    def with_all_sums(
        self, batches: Sequence[dict[str, torch.Tensor]]
    ) -> list[dict[str, torch.Tensor]]:
        """Batches of an optimizer step with the sums that each needs of all of them."""
        parts = [parts_of(batch) for batch in batches]
        self.model.eval()  # nothing is drawn, so that a run resumes to the same numbers
        every = [*chain.from_iterable(parts)]
        sums = self._over_processes(self._measured(self.objective.beforehand, every))
        self.model.train()
        return [in_parts([with_sums(part, sums) for part in own]) for own in parts]

    def with_answers(
        self, batches: list[dict[str, torch.Tensor]], step: int | None = None
    ) -> list[dict[str, torch.Tensor]]:
        """Batches of an optimizer step with what the model samples for them, if anything.

        Args:
            step: its number; None is the next one's.
        """
        if self.rollouts is None:
            return batches
        step = self.state.global_step if step is None else step
        self._tell_objective(step)
        return self.rollouts.put_into(batches, self._lora_model(), step)

    def get_train_dataloader(self) -> DataLoader:
        """Batches as `batching` makes them; to the dataloader each is one item."""
        return self._get_dataloader(
            self.train_dataset, "Training", 1, lambda _: self.sampler, is_training=True
        )


def enable_checkpointing(model: Any, args: TrainingArguments) -> None:
    """Lets `model` compute activations again in the backward pass, if `args` ask for it."""
    if args.gradient_checkpointing:
        kwargs = dict(args.gradient_checkpointing_kwargs or {})
        own = {key: kwargs.pop(key) for key in ("every_n_layers", "offload") if key in kwargs}
        model.gradient_checkpointing_enable(kwargs or None, **own)
