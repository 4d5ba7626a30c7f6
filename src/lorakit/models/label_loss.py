"""Cross-entropy of labels that a model's logits answer in place: classes, tags, a decoder's tokens.

What a causal model's tokens cost is in `loss.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lorakit.errors import InputError
from lorakit.models.loaded import base_model
from lorakit.models.loss import IGNORE, smoothed

if TYPE_CHECKING:
    import torch
    from torch import nn


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
