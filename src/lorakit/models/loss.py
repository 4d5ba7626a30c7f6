"""Cross-entropy of the supervised tokens of a batch, and of labels that logits answer in place.

Of a causal model no other logits are computed: where it ends in a frozen linear layer, its forward
is stopped before that layer and the loss is taken in chunks (`cross_entropy.py`; `adapted_head.py`
where adapters stand beside that layer). Classes, tags and a decoder's tokens are labels of the
model's own logits.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorakit.errors import InputError
from lorakit.models.loaded import base_model, in_evaluation

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lorakit.lora.spans import Span
    from lorakit.models.adapted_head import Targets

IGNORE = -100
"""The label of a position that is read but not learned (PyTorch's and transformers' value)."""

# Configurations call the factor on the logits by these names; some multiply by it, some divide.
_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
_SOFTCAPS = ("final_logit_softcapping", "output_logit_soft_cap")


@dataclass(frozen=True)
class OutputLayer:
    """What a model does behind its last hidden state: `post(linear(h))`.

    `post(z)` is `scale * z`, then `softcap * tanh(z / softcap)` if there is a softcap.

    Attributes:
        linear: a frozen `nn.Linear`, or a `LoraLinear` around one.
    """

    linear: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        """The logits (…, V) of hidden states (…, d)."""
        import torch

        z: torch.Tensor = self.linear(h) * self.scale
        return z if self.softcap is None else torch.tanh(z / self.softcap) * self.softcap


class SupervisedLoss:
    """The summed negative log likelihood of a batch's supervised tokens, in nats.

    Args:
        model: the model that will be called, or what is inside its wrappers.
        own_logits: the model computes its own logits, as it must where its weights are spread
            over machines.
        temperature: what logits are divided by, as in sampling.

    Attributes:
        output: how the model gets its logits, where that is a frozen linear layer.
        adapted: the same where adapters stand beside that layer.
    """

    def __init__(
        self, model: nn.Module, own_logits: bool = False, temperature: float = 1.0
    ) -> None:
        from torch import nn

        self.temperature = temperature
        found = None if own_logits else output_layer(model)
        plain = found is not None and type(found.linear) is nn.Linear
        self.output = found if plain else None
        self.adapted = None if plain else found
        forward = inspect.signature(base_model(model).forward)
        self.keeps_logits = "logits_to_keep" in forward.parameters

    def __call__(
        self, model: nn.Module, batch: Mapping[str, torch.Tensor], smoothing: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum over the batch (float32 or wider) and the number of supervised tokens (int64).

        Args:
            batch, smoothing: as in `of_tokens`.
        """
        return self.of_tokens(model, batch, smoothing).sum(), self.count(batch["labels"])

    def of_tokens(
        self,
        model: nn.Module,
        batch: Mapping[str, torch.Tensor],
        smoothing: float | torch.Tensor = 0.0,
        several: Targets | None = None,
    ) -> torch.Tensor:
        """The loss of every supervised token (n,), row after row, in float32 or wider.

        Args:
            batch: `input_ids` and `labels` (batch, seq), and what else the model's forward takes.
                A position predicts the label after it. Names with a dot are an objective's own.
            smoothing: with e the target is (1 - e) of the label and e / V of each of V tokens
                (Szegedy et al. 2016, arXiv:1512.00567); a tensor (n,) has one for each token.
            several: m targets in the place of the labels, which say only which n positions are
                supervised; (m,) is returned then, and nothing is smoothed.
        """
        import torch

        from lorakit.models.adapted_head import (
            Head,
            Targets,
            adapted_cross_entropy,
            spans_on_route,
        )
        from lorakit.models.cross_entropy import chunked_cross_entropy

        output = self.output
        spans: tuple[Span, ...] = ()
        factors: list[torch.Tensor] = []
        if self.adapted is not None and self.temperature == 1:
            keep = batch["labels"][:, 1:] != IGNORE
            linear: Any = self.adapted.linear
            if (found := spans_on_route(linear, batch["input_ids"], keep)) is not None:
                output, spans, factors = self.adapted, tuple(found[0]), found[1]
        h, targets = self._states(model, batch, output)
        if output is None:
            if several is not None:
                losses: torch.Tensor = -h.log_softmax(-1)[several.positions, several.tokens]
                return losses
            return smoothed(h, targets, smoothing)
        frozen: Any = getattr(output.linear, "base_layer", output.linear)
        even = None
        if isinstance(smoothing, torch.Tensor) or smoothing:
            wide = torch.promote_types(h.dtype, torch.float32)
            even = torch.as_tensor(smoothing, dtype=wide, device=h.device).expand(targets.shape)
        W, b, scale, softcap = frozen.weight, frozen.bias, output.scale, output.softcap
        if not spans and several is None:
            return chunked_cross_entropy(h, W, b, targets, scale, softcap, even, self.temperature)
        head = Head(W, b, scale, softcap, spans)
        return adapted_cross_entropy(h, head, several or Targets.one_each(targets), factors, even)

    def with_collisions(
        self, model: nn.Module, batch: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of every supervised token as in `of_tokens`, and log sum_v p_v^2 (n,) of the
        distribution over tokens that it is of, without gradients.

        sum_v p_v^2 is how likely two draws are the same token.
        """
        import torch

        from lorakit.models.cross_entropy import CHUNK_ELEMENTS, chunked_cross_entropy

        h, targets = self.states(model, batch)
        if self.output is None:
            losses = smoothed(h, targets)
        else:
            linear: Any = self.output.linear
            scale, softcap = self.output.scale, self.output.softcap
            losses = chunked_cross_entropy(
                h, linear.weight, linear.bias, targets, scale, softcap, None, self.temperature
            )
        found = []
        with torch.no_grad():
            for part in h.detach().split(max(1, CHUNK_ELEMENTS // self.classes(h))):
                z = self.logits(part)
                found.append((2 * z).logsumexp(-1) - 2 * z.logsumexp(-1))
        return losses, torch.cat(found)

    def with_entropies(
        self, model: nn.Module, batch: Mapping[str, torch.Tensor], learned: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of every supervised token as in `of_tokens`, and the entropy (n,) in nats of
        the distribution over tokens that it is of.

        Args:
            learned: gradients go through the entropies too.
        """
        import torch

        from lorakit.models.cross_entropy import cross_entropy_and_entropy

        h, targets = self.states(model, batch)
        if self.output is not None:
            linear: Any = self.output.linear
            return cross_entropy_and_entropy(
                h,
                linear.weight,
                linear.bias,
                targets,
                self.output.scale,
                self.output.softcap,
                self.temperature,
                learned,
            )
        with torch.set_grad_enabled(learned and torch.is_grad_enabled()):
            logs = h.log_softmax(-1)
            entropies = -(logs.exp() * logs).sum(-1)
        return smoothed(h, targets), entropies

    def states(
        self, model: nn.Module, batch: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What predicts each supervised token, row after row, and these tokens (n,).

        Args:
            batch: as in `of_tokens`.

        Returns: hidden states (n, d), of which `logits` makes logits; where the model must compute
            its own, these (n, V), in float32 or wider.
        """
        return self._states(model, batch, self.output)

    def _states(
        self, model: nn.Module, batch: Mapping[str, torch.Tensor], output: OutputLayer | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from lorakit.models.row_attention import rows_apart

        targets = batch["labels"][:, 1:]
        keep = targets != IGNORE
        inputs = {k: tensor for k, tensor in batch.items() if k != "labels" and "." not in k}
        with rows_apart(batch):
            if output is None:
                if self.keeps_logits:
                    columns = keep.any(dim=0).nonzero().squeeze(1)
                    targets, keep = targets[:, columns], keep[:, columns]
                    logits = model(**inputs, use_cache=False, logits_to_keep=columns).logits
                else:
                    logits = model(**inputs, use_cache=False).logits[:, :-1]
                logits = logits[keep]
                logits = logits.float() if logits.element_size() < 4 else logits
                return self._tempered(logits), targets[keep]
            with head_inputs(output.linear) as reached:
                model(**inputs, use_cache=False)
        [h] = reached
        return h[:, :-1][keep], targets[keep]

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """The logits (n, V) of what `states` returns, in float32 or wider."""
        if self.output is None:
            return states
        z = self.output.logits(states)
        return self._tempered(z.float() if z.element_size() < 4 else z)

    def _tempered(self, logits: torch.Tensor) -> torch.Tensor:
        return logits if self.temperature == 1 else logits / self.temperature

    def classes(self, states: torch.Tensor) -> int:
        """The size V of the vocabulary of `logits`."""
        return states.shape[-1] if self.output is None else int(self.output.linear.out_features)  # type: ignore[arg-type]

    def count(self, labels: torch.Tensor) -> torch.Tensor:
        """How many of `labels` (batch, seq) the loss is taken on."""
        return (labels[:, 1:] != IGNORE).sum()


class LabelLoss:
    """The summed negative log likelihood of a batch's labels, in nats.

    Args:
        model: the model that will be called, or what is inside its wrappers.
        targets: the labels are what a decoder writes, and reads one place later.
    """

    def __init__(self, model: nn.Module, targets: bool = False) -> None:
        base = base_model(model)
        self.decoder_inputs = _shift(base) if targets else None
        self.caches = "use_cache" in inspect.signature(base.forward).parameters

    def __call__(
        self, model: nn.Module, batch: Mapping[str, torch.Tensor], smoothing: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum over the batch (float32 or wider) and the number of labels (int64)."""
        total, count, _ = self.with_logits(model, batch, smoothing)
        return total, count

    def with_logits(
        self, model: nn.Module, batch: Mapping[str, torch.Tensor], smoothing: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sum and number as above, and the logits (batch, places, classes).

        Args:
            batch: `labels` (batch, places), `IGNORE` where there is none, and what the model's
                forward takes. Its logits are (batch, classes) or (batch, places, classes).
            smoothing: as in `SupervisedLoss.of_tokens`, over the classes.
        """
        labels = batch["labels"]
        inputs: dict[str, Any] = {k: tensor for k, tensor in batch.items() if k != "labels"}
        if self.caches:
            inputs["use_cache"] = False
        if self.decoder_inputs is not None:
            inputs["decoder_input_ids"] = self.decoder_inputs(labels=labels)
        logits = model(**inputs).logits.reshape(*labels.shape, -1)
        if logits.element_size() < 4:
            logits = logits.float()
        total = smoothed(logits.flatten(0, 1), labels.flatten(), smoothing).sum()
        return total, self.count(labels), logits

    def count(self, labels: torch.Tensor) -> torch.Tensor:
        """How many of `labels` the loss is taken on."""
        return (labels != IGNORE).sum()


def smoothed(
    logits: torch.Tensor, targets: torch.Tensor, smoothing: float | torch.Tensor = 0.0
) -> torch.Tensor:
    """The cross-entropy (n,) of logits (n, V) with targets (n,), 0 where these are `IGNORE`.

    Args:
        smoothing: as in `SupervisedLoss.of_tokens`.
    """
    import torch
    import torch.nn.functional as F

    losses = F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORE)
    if not isinstance(smoothing, torch.Tensor) and not smoothing:
        return losses
    share = torch.as_tensor(smoothing, dtype=losses.dtype, device=losses.device)
    even = torch.logsumexp(logits, dim=-1) - logits.mean(dim=-1)
    return torch.where(targets == IGNORE, losses, (1 - share) * losses + share * even)


def output_layer(model: nn.Module) -> OutputLayer | None:
    """How `model` gets its logits, None where that is not a frozen linear layer and a factor.

    There may be adapters beside the layer (`LoraLinear`).

    What the configuration suggests is tried against the model's own logits, and only what gives
    the same is returned.
    """
    import torch
    from torch import nn

    from lorakit.lora.layers.linear import LoraLinear

    base = base_model(model)
    get_output_embeddings = getattr(base, "get_output_embeddings", None)
    linear: Any = get_output_embeddings() if callable(get_output_embeddings) else None
    frozen = linear.base_layer if type(linear) is LoraLinear else linear
    if type(frozen) is not nn.Linear or any(p.requires_grad for p in frozen.parameters()):
        return None
    config = base.config.get_text_config()
    softcap = next((s for name in _SOFTCAPS if (s := getattr(config, name, None))), None)
    found = {float(s) for name in _SCALES if (s := getattr(config, name, None))}
    factors = [1.0, *found, *(1 / s for s in found)]
    reached: list[torch.Tensor] = []
    handle = linear.register_forward_pre_hook(lambda _, inputs: reached.append(inputs[0]))
    try:
        ids = torch.arange(2, 8, device=frozen.weight.device)[None]
        with torch.no_grad(), in_evaluation(model):
            wanted = model(input_ids=ids, use_cache=False).logits
            if len(reached) != 1:
                return None
            for layer in (OutputLayer(linear, factor, softcap) for factor in factors):
                if _same(layer.logits(reached[0]), wanted):
                    return layer
    finally:
        handle.remove()
    return None


def _same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Equal but for the rounding of their dtype."""
    import torch

    if found.shape != wanted.shape:
        return False
    rounding = 4 * torch.finfo(wanted.dtype).eps * float(wanted.abs().max())
    return bool(((found - wanted).abs() <= rounding).all())


@contextmanager
def head_inputs(linear: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collects what `linear` is given, and lets the model end with one column in its place."""
    reached: list[torch.Tensor] = []

    def stand_in(h: torch.Tensor) -> torch.Tensor:
        reached.append(h)
        return h[..., :1]

    before = vars(linear).get("forward")
    linear.forward = stand_in
    try:
        yield reached
    finally:
        del linear.forward
        if before is not None:
            linear.forward = before


def _shift(model: Any) -> Callable[..., torch.Tensor]:
    """How `model` makes a decoder's input of its labels (batch, places): one place later."""
    own = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if own is not None:
        return own
    start, pad = model.config.decoder_start_token_id, model.config.pad_token_id
    if start is None or pad is None:
        raise InputError(
            f"{type(model).__name__} does not say what its decoder begins with: set "
            "decoder_start_token_id and pad_token_id in its config.json"
        )

    def shifted(labels: torch.Tensor) -> torch.Tensor:
        inputs = labels.new_full(labels.shape, start)
        inputs[:, 1:] = labels[:, :-1]
        return inputs.masked_fill(inputs == IGNORE, pad)

    return shifted
