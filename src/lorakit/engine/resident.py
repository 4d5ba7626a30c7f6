"""A resident base model with many adapters: one pass for rows of any of them.

`forward_backward` accumulates gradients, `optim_step` applies one adapter's, `sample` answers with
the weights as they are then; none knows a recipe or a training loop. Each adapter's gradients and
answers are those of its own rows alone, whatever else is in the pass. Sweeps and the server's
engine compute on this too.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorakit.data.batches import Collator, LineCollator
from lorakit.data.masking import TokenizedRow
from lorakit.engine.adapter_copy import AdapterCopy
from lorakit.engine.adapter_optimizer import (
    OPTIMIZER_NAME,
    AdamW,
    load_optimizer,
    optimizer_tensors,
)
from lorakit.engine.batch import Batch
from lorakit.engine.carried import Carried, how_carried
from lorakit.engine.prefix_cache import prefixes_of
from lorakit.engine.requests import check_prompt, context_length_of
from lorakit.engine.sampled import Sampled, rows_to_sample, sampled
from lorakit.engine.sampler import write_rows
from lorakit.engine.sampling import Ending, Sampling, end_tokens
from lorakit.engine.shared_pass import AdapterBatch, all_targets, side_by_side, why_not_shared
from lorakit.engine.token_losses import (
    AdapterRow,
    PassResult,
    TokenLoss,
    cross_entropy,
    row_passes,
    targets_of,
)
from lorakit.errors import InputError, did_you_mean, listed
from lorakit.lora.config import LoraConfig
from lorakit.lora.joining import pack_adapter, unpack_adapter
from lorakit.lora.model import LoraModel
from lorakit.lora.packed import same_inputs
from lorakit.lora.routing import BASE, Route
from lorakit.lora.streams import Stream
from lorakit.lora.vocabulary import vocabulary_size
from lorakit.models.fused import fused_forwards, in_use
from lorakit.models.lines import Lines
from lorakit.models.loaded import has_dropout
from lorakit.models.loss import SupervisedLoss


class ResidentModel:
    """A frozen base and its adapters, each with gradients, dropout and optimizer of its own.

    Args:
        base: the base model; it is wrapped in place while there is an adapter.
        pad_token_id: what shorter rows are filled with, where the model takes no lines.
        stays_wrapped: the base is answered from too, and wrapped for good; adapters that change
            it are refused then.
    """

    def __init__(
        self, base: nn.Module, pad_token_id: int = 0, *, stays_wrapped: bool = False
    ) -> None:
        self.base: Any = base
        self._stays_wrapped = stays_wrapped
        self.pad_token_id = pad_token_id
        self.device: torch.device = next(base.parameters()).device
        self._base_draws = has_dropout(base)
        self._fused = fused_forwards(base)
        self._model: LoraModel | None = None
        self._loss: SupervisedLoss | None = None
        self._collate: Collator | LineCollator | None = None
        self._streams: dict[str, Stream] = {}
        self._alone: set[str] = set()
        self._optimizers: dict[str, torch.optim.AdamW] = {}

    # --- adapters -------------------------------------------------------------------------

    @property
    def model(self) -> LoraModel:
        """The base with its adapters, if there are any."""
        if self._model is None:
            self._model = LoraModel(self.base, None)
        return self._model

    @property
    def adapters(self) -> list[str]:
        """The names of all adapters."""
        return [] if self._model is None else self._model.adapters

    def create(self, name: str, config: LoraConfig, seed: int = 0) -> None:
        """Adds a new adapter; `seed` decides its first values and its dropout.

        Rows of an adapter that cannot share a pass with others (`why_not_shared`) get their own.

        Raises:
            InputError: the name is taken, `config` matches nothing in the base, or it changes the
                base that other adapters share.
        """
        self._require_new(name)
        reason, beside = why_not_shared(self.base, config), self.adapters or self._stays_wrapped
        if beside and config.init.kind.changes_base:
            raise InputError(f"adapter {name} cannot be created beside others: {reason}")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            if beside:
                self.model.add_adapter(name, config)
            else:  # the first one may change the base itself
                self._unwrap()
                self._model = LoraModel(self.base, config, name)
        self._added(name, seed, reason)

    def load(self, name: str, folder: str | Path, seed: int = 0, *, optimizer: bool = True) -> None:
        """Adds the adapter in `folder`, with its optimizer's state if `save` has left one there.

        Args:
            seed: of its dropout.
            optimizer: False begins with a new optimizer.

        Raises:
            InputError: the name is taken, or the folder holds no adapter that fits the base.
        """
        self._require_new(name)
        if self.adapters or self._stays_wrapped:
            self.model.load_adapter(folder, name, is_trainable=True)
        else:
            self._unwrap()
            self._model = LoraModel.from_pretrained(self.base, folder, name, is_trainable=True)
        self._added(name, seed, why_not_shared(self.base, self.model.peft_config[name]))
        state = Path(folder) / OPTIMIZER_NAME
        if optimizer and state.is_file():
            load_optimizer(self.made_optimizer(name), self.trained(name), state)

    def save(self, name: str, folder: str | Path, *, optimizer: bool = True) -> None:
        """Writes an adapter in PEFT's form, and its optimizer's state if it has made a step."""
        self.copied(name, optimizer=optimizer).save(folder)

    def copied(self, name: str, *, optimizer: bool = True) -> AdapterCopy:
        """An adapter as it is now, for any thread to write, with the optimizer's state if any."""
        self._require(name)
        state: dict[str, torch.Tensor] = {}
        if optimizer and name in self._optimizers:
            state = optimizer_tensors(self._optimizers[name], self.trained(name))
        return AdapterCopy.of(self.model, name, state)

    def remove(self, name: str) -> None:
        """Forgets an adapter; without any the base is as it was."""
        self._require(name)
        if self.adapters == [name] and not self._stays_wrapped:
            self._unwrap()
        else:
            self.model.delete_adapter(name)
        self._streams.pop(name)
        self._alone.discard(name)
        self._optimizers.pop(name, None)
        self._loss = self._collate = None

    def _unwrap(self) -> None:
        """The base is as it was before there was any adapter."""
        if self._model is not None:
            self._model.unload()
            self._model = None

    def trained(self, name: str) -> dict[str, torch.Tensor]:
        """The trained parameters of an adapter, under the keys of PEFT's files."""
        self._require(name)
        tensors = self.model.adapter_tensors(name)
        return {key: tensor for key, tensor in tensors.items() if tensor.requires_grad}

    def optimizer(self, name: str) -> torch.optim.AdamW | None:
        """The optimizer of an adapter that has made a step."""
        return self._optimizers.get(name)

    def stream(self, name: str) -> Stream:
        """What an adapter's dropout is drawn from."""
        return self._streams[name]

    # --- computing ------------------------------------------------------------------------

    def forward_backward(
        self,
        rows: Sequence[AdapterRow],
        loss: TokenLoss = cross_entropy,
        *,
        max_tokens: int | None = None,
    ) -> PassResult:
        """Adds the gradients of the rows' losses, summed, to those of their adapters.

        Args:
            loss: of each row; the sum is neither a mean over tokens nor over rows.
            max_tokens: so many tokens at most go through the model at a time.

        Raises:
            InputError: there is no such adapter, or a row has nothing to learn from.
        """
        for row in rows:
            if row.adapter == BASE:
                raise InputError("the bare base is not trained: give rows an adapter's name")
        return self._over_rows(rows, loss, max_tokens, learning=True)

    @torch.no_grad()
    def forward(
        self,
        rows: Sequence[AdapterRow],
        loss: TokenLoss | None = None,
        *,
        max_tokens: int | None = None,
    ) -> PassResult:
        """As `forward_backward` without dropout and gradients; rows may be the bare base's."""
        return self._over_rows(rows, loss, max_tokens, learning=False)

    def _over_rows(
        self,
        rows: Sequence[AdapterRow],
        loss: TokenLoss | None,
        max_tokens: int | None,
        *,
        learning: bool,
    ) -> PassResult:
        collate = self._collator()
        tokenized = [TokenizedRow([*row.input_ids], [*row.labels], "rows") for row in rows]
        for row, made in zip(rows, tokenized, strict=True):
            self._require(row.adapter)
            if not made.supervised:
                raise InputError(f"a row of {row.adapter} has no token to learn")
        logprobs: list[torch.Tensor] = [torch.empty(0)] * len(rows)
        losses = [0.0] * len(rows) if loss else []
        self._train(learning)
        with in_use(self._fused if learning else []):
            for by_adapter in row_passes(rows, self._alone, max_tokens):
                batches = [
                    AdapterBatch(
                        name,
                        {
                            k: t.to(self.device)
                            for k, t in collate([tokenized[i] for i in own]).items()
                        },
                        stream=self._streams.get(name) if learning else None,
                        targets=targets_of([rows[i] for i in own], self.device),
                    )
                    for name, own in by_adapter.items()
                ]
                total: list[torch.Tensor] = []
                for own, nats in zip(by_adapter.values(), self.token_losses(batches), strict=True):
                    shapes = [rows[i].shape for i in own]
                    parts = nats.neg().split([math.prod(shape) for shape in shapes])
                    for i, flat, shape in zip(own, parts, shapes, strict=True):
                        part = flat.view(shape)
                        logprobs[i] = part.detach()
                        if loss:
                            value = loss(part, rows[i])
                            losses[i] = float(value.detach())
                            total.append(value)
                if learning:
                    torch.stack(total).sum().backward()
        return PassResult(logprobs, losses)

    def backward(self, batches: Sequence[AdapterBatch]) -> list[torch.Tensor]:
        """One pass over ready-made batches: adds the gradients of each one's loss.

        Returns: of each batch its summed loss divided by its divisor, a scalar.
        """
        self._train(True)
        measured = self._of_tokens(batches, any(batch.entropies for batch in batches))
        found = [b.loss(*own) / b.divisor for own, b in zip(measured, batches, strict=True)]
        # No adapter has a parameter in another's loss: the sum's gradients are each one's own.
        torch.stack(found).sum().backward()
        return [value.detach() for value in found]

    def token_losses(self, batches: Sequence[AdapterBatch]) -> list[torch.Tensor]:
        """The loss of every learned token (n,) of each batch, in nats, out of one forward pass.

        Activation checkpointing comes back to the route that is in force here.
        """
        return [own[0] for own in self._of_tokens(batches)]

    def _of_tokens(
        self, batches: Sequence[AdapterBatch], entropies: bool = False
    ) -> list[tuple[torch.Tensor, ...]]:
        """The losses of each batch, and the entropies (n,) of the tokens' distributions."""
        if self._loss is None:
            # Answers that are under way leave the route of their rows behind them.
            with self.model.routing.using(Route()):
                self._loss = SupervisedLoss(self.model)
            # The head takes its parts from all positions where it has an adapter.
            self._loss.keeps_logits &= len(self.adapters) == 1
        loss = self._loss
        if len(batches) == 1:
            [one] = batches
            drawing = one.stream.drawing() if one.stream else nullcontext()
            route = Route(shared=() if one.adapter == BASE else (one.adapter,))
            with self.model.routing.using(route), drawing:
                if entropies:
                    return [loss.with_entropies(self.model, one.tensors)]
                own = loss.of_tokens(self.model, one.tensors, one.smoothing, one.targets)
                return [(own,)]
        whole, route = side_by_side(batches, self.pad_token_id)
        counts = torch.stack([loss.count(batch.tensors["labels"]) for batch in batches]).tolist()
        smoothing: float | torch.Tensor = 0.0
        if any(batch.smoothing for batch in batches):
            of_each = torch.tensor([batch.smoothing for batch in batches], dtype=torch.float64)
            smoothing = of_each.repeat_interleave(torch.tensor(counts)).to(self.device)
        with self.model.routing.using(route):
            if entropies:
                found = loss.with_entropies(self.model, whole)
                return [*zip(*(values.split(counts) for values in found), strict=True)]
            losses = loss.of_tokens(self.model, whole, smoothing, all_targets(batches))
        each = zip(batches, counts, strict=True)
        sizes = [len(b.targets.tokens) if b.targets else n for b, n in each]
        return [(own,) for own in losses.split(sizes)]

    def optim_step(self, name: str, step: AdamW) -> dict[str, float]:
        """Applies the gradients of an adapter, and clears them.

        Returns: `grad_norm`, before clipping.

        Raises:
            InputError: there is no such adapter, or it has no gradients, or has dropped NaN or Inf.
        """
        parameters = list(self.trained(name).values())
        if all(parameter.grad is None for parameter in parameters):
            raise InputError(f"adapter {name} has no gradients: call forward_backward first")
        optimizer = self.made_optimizer(name)
        for group in optimizer.param_groups:
            group["lr"], group["betas"], group["eps"] = step.learning_rate, step.betas, step.eps
            group["weight_decay"] = step.weight_decay
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if not norm.isfinite():
            optimizer.zero_grad()
            raise InputError(
                "no step, as gradients are NaN or Inf: load a checkpoint, lower the rate"
            )
        if step.max_grad_norm:
            nn.utils.clip_grads_with_norm_(parameters, step.max_grad_norm, norm)
        optimizer.step()
        optimizer.zero_grad()
        unpack_adapter(self.model, name)
        return {"grad_norm": float(norm)}

    def drop_gradients(self, name: str) -> None:
        """Forgets the gradients that an adapter has accumulated."""
        for parameter in self.trained(name).values():
            parameter.grad = None

    def shares_passes(self, name: str) -> bool:
        """Whether an adapter's rows, or the bare base's, share a pass with others'."""
        return name not in self._alone

    # --- sampling -------------------------------------------------------------------------

    def answering(self) -> None:
        """Prepares the model to answer, as it may have been trained meanwhile."""
        self._train(False)

    @cached_property
    def carried(self) -> Carried:
        """Whether answers join and leave freely, and how prompts may be read."""
        self._train(False)
        with self.model.routing.using(Route()):
            return how_carried(self.base)

    def answers(self, rows: int, length: int, **kept: Any) -> Batch:
        """An empty batch of answers, for so many rows of so many tokens at most.

        A row's adapter is one of this model, packed (`pack`) or not.

        Args:
            kept: `features`, `prefixes` and `drafts` of `Carried.batch`, under adapters that are
                not trained.
        """
        kept["packed"] = lambda: self.model.packed
        return self.carried.batch(self.base, self.model.routing, rows, length, **kept)

    def pack(self, names: Iterable[str] = ()) -> None:
        """Lays the factors of these adapters out for sampling, as they are now."""
        model = self.model
        if model.packed is None:
            with torch.no_grad(), model.routing.using(Route()):
                one = torch.zeros(1, 1, dtype=torch.long, device=self.device)
                run = nullcontext if self.carried.why_not else lambda: self.base(input_ids=one)
                families = same_inputs(self.base, run)
                model.pack(families)
                if model.packed is not None and self.carried.step is not None:
                    model.packed.hold(families)
        for name in names:
            if model.packed is not None and name not in model.packed:
                pack_adapter(model, name)

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        adapters: Sequence[str],
        sampling: Sampling | None = None,
        *,
        ends: Collection[int] | None = None,
        max_rows: int = 16,
    ) -> list[Sampled]:
        """Answers to prompts, each by its own adapter as it is now; as many at once as have room.

        Args:
            prompts: the tokens of each.
            adapters: the name of each one's adapter, `BASE` for the bare base.
            sampling: None is greedy. With a seed, prompt number i draws from `seed + i`.
            ends: tokens that end an answer; None for those of the model's configuration.
            max_rows: so many answers are written at once.

        Returns: in the order of the prompts.

        Raises:
            InputError: there is no such adapter, a prompt is empty or too long, or the sampling
                settings have stop texts or a grammar, which need a tokenizer.
            LorakitError: the model failed.
        """
        if len(prompts) != len(adapters):
            raise InputError(f"{len(prompts)} prompts need as many adapters, not {len(adapters)}")
        context, vocabulary = context_length_of(self.base), vocabulary_size(self.base)
        for name, prompt in zip(adapters, prompts, strict=True):
            self._require(name)
            check_prompt(prompt, context, vocabulary)
        own = Ending(frozenset(end_tokens(self.base) if ends is None else ends))
        rows = rows_to_sample(prompts, adapters, sampling or Sampling(), own, context, self.device)
        if not rows:
            return []
        tickets = [row.ticket for row in rows]
        longest = max(len(t.prompt) + t.sampling.max_new_tokens for t in tickets)
        self._train(False)
        self.pack(name for name in dict.fromkeys(adapters) if name != BASE)
        prefixes = prefixes_of([(row.adapter, row.prompt) for row in rows])
        batch = self.answers(min(max_rows, len(rows)), longest, prefixes=prefixes)
        write_rows(batch, rows, self.model.routing)
        return [sampled(row) for row in rows]

    # --- inside ---------------------------------------------------------------------------

    def _train(self, learning: bool) -> None:
        # Setting it goes through all modules; the base may have been set by itself.
        if not self.model.training == self.base.training == learning:
            self.model.train(learning)

    def made_optimizer(self, name: str) -> torch.optim.AdamW:
        """The optimizer of an adapter, which is made now if there is none yet."""
        if name not in self._optimizers:
            self._optimizers[name] = torch.optim.AdamW(self.trained(name).values(), fused=True)
        return self._optimizers[name]

    def _collator(self) -> Collator | LineCollator:
        if self._collate is None:
            with self.model.routing.using(Route()):  # as for the loss
                lines = Lines(self.model).refused is None
            self._collate = LineCollator() if lines else Collator(self.pad_token_id)
        return self._collate

    def _added(self, name: str, seed: int, alone: str | None) -> None:
        """Every adapter is trained, and none serves rows that do not ask for it."""
        self._alone |= {name} if alone or self._base_draws else set()
        self.model.set_adapter([])
        self._loss = self._collate = None
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self._streams[name] = Stream(self.device)
        self.model.set_requires_grad(self._streams)

    def _require_new(self, name: str) -> None:
        if name in (*self.adapters, BASE):
            raise InputError(f"there is an adapter {name} already: take another name")

    def _require(self, name: str) -> None:
        if name != BASE and name not in self.adapters:
            near = did_you_mean(name, self.adapters)
            raise InputError(f"there is no adapter {name}{near}: {listed(self.adapters) or 'none'}")
