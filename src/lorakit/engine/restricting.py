"""Takes what may not come next out of the logits of several rows at once.

A row's own settings are few numbers each. The form of an answer is a mask over the vocabulary,
which llguidance gives and which is applied to all rows together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lorakit.engine.grammar import GrammarState
from lorakit.engine.sampling import Sampling
from lorakit.errors import InputError


def restrict(
    logits: torch.Tensor,
    sampling: Sequence[Sampling],
    ends: Sequence[frozenset[int]],
    forms: Sequence[GrammarState | None],
) -> dict[int, InputError]:
    """Sets the logits (rows, vocabulary) of tokens that cannot come next to -Inf, in place.

    Args:
        sampling: of each row.
        ends: tokens that must not come yet.
        forms: of the answers; None for any text.

    Returns: why nothing can come next, by the numbers of rows of which that is so.
    """
    refused: dict[int, InputError] = {}
    for row, settings, early in zip(logits, sampling, ends, strict=True):
        if settings.logit_bias:
            tokens, values = zip(*settings.logit_bias, strict=True)
            row[list(tokens)] += torch.tensor(values, dtype=row.dtype, device=row.device)
        if settings.allowed_token_ids:
            allowed = torch.tensor(settings.allowed_token_ids, device=row.device)
            row.copy_(torch.full_like(row, -torch.inf).index_copy_(0, allowed, row[allowed]))
        if early:
            row[list(early)] = -torch.inf
    if any(form is not None for form in forms):
        forbidden = torch.zeros(logits.shape, dtype=torch.bool)
        for at, form in enumerate(forms):
            if form is None:
                continue
            try:
                form.forbid(forbidden[at])
            except InputError as error:
                refused[at] = error
        logits.masked_fill_(forbidden.to(logits.device), -torch.inf)
    for at, most in enumerate(logits.amax(-1).tolist()):
        if not most > -torch.inf:
            none = "allowed_token_ids, min_tokens and the answer's form leave no token"
            refused.setdefault(at, InputError(none))
    return refused
