"""Rows of a request to compute, in which position i predicts target i, as the engine learns them.

The engine's rows predict their own next token: a datum's targets become labels one place later.
"""

from __future__ import annotations

import numpy as np
import torch

from lorakit.engine.policy_losses import require_inputs
from lorakit.engine.token_losses import AdapterRow
from lorakit.errors import InputError
from lorakit.models.loss import IGNORE
from lorakit.server.training.wire import Datum, PassRequest


def rows_of(
    adapter: str, asked: PassRequest, vocabulary: int, context_length: int
) -> list[AdapterRow]:
    """The rows of a request, for an adapter.

    Args:
        vocabulary: how many tokens the model knows.
        context_length: how many tokens it reads.

    Raises:
        InputError: a datum has no targets, is too long or empty, has numbers that are no tokens,
            or not what the loss reads.
    """
    found = []
    for at, datum in enumerate(asked.data):
        try:
            row = _row(adapter, asked.loss, datum, vocabulary, context_length)
            require_inputs(asked.loss, row, asked.settings)
            found.append(row)
        except InputError as error:
            raise InputError(f"datum {at}: {error}") from error
    return found


def _row(adapter: str, loss: str, datum: Datum, vocabulary: int, context: int) -> AdapterRow:
    inputs = dict(datum.inputs)
    targets = inputs.pop("target_tokens", None)
    if targets is None:
        raise InputError("loss_fn_inputs has no target_tokens")
    several = targets.ndim == 2
    if several and loss != "cross_entropy":
        raise InputError(
            f"the loss {loss} takes target_tokens (N,), one target a token; cross_entropy takes "
            "(N, K)"
        )
    length = len(datum.tokens)
    if not 1 <= length < context:
        raise InputError(f"{length} tokens; from 1 to {context - 1} are taken of a datum")
    for name, tokens in (("model_input", np.array(datum.tokens)), ("target_tokens", targets)):
        if tokens.min() < 0 or tokens.max() >= vocabulary:
            raise InputError(f"{name} must be tokens from 0 to {vocabulary - 1}")
    for name, values in inputs.items():
        if values.shape != targets.shape or not np.isfinite(values).all():
            shape = ", ".join(map(str, targets.shape))
            raise InputError(f"{name} must be finite numbers of shape ({shape})")
    labels = targets[:, 0] if several else targets
    return AdapterRow(
        adapter,
        [*datum.tokens, int(labels[-1])],
        [IGNORE, *labels.tolist()],
        {name: _one_later(values) for name, values in inputs.items()},
        _one_later(targets) if several else None,
    )


def _one_later(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.zeros_like(values[:1]), values]))
