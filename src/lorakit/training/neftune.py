"""NEFTune: noise on the embeddings of a batch that is learned (Jain et al. 2023, arXiv:2310.05914).

To each embedding of a row of L tokens and width d comes noise drawn evenly from ±alpha / sqrt(L d).
L is the row's own length, without padding and also in a line of rows, which transformers' hook
takes for one row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from lorakit.errors import InputError
from lorakit.models.loaded import base_model


class EmbeddingNoise:
    """Adds the noise within `on`, once for a forward pass: an encoder-decoder's prompt has it.

    Args:
        model: its base has input embeddings, where there is noise to add.
        alpha: None or 0 for no noise.

    Raises:
        InputError: alpha is below 0, or the model does not say where its embeddings are.
    """

    def __init__(self, model: nn.Module, alpha: float | None) -> None:
        self.alpha = alpha or 0.0
        self._embedding = input_embedding(model) if self.alpha else None
        if self.alpha < 0:
            raise InputError(f"training.neftune_noise_alpha should be above 0, not {alpha}")

    @contextmanager
    def on(self, batch: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Within this block the embeddings of `batch` have noise.

        Args:
            batch: as the model takes it: padded (batch, seq) with an attention mask, or a line
                (1, tokens) with `cu_seq_lens_q`.
        """
        if self._embedding is None:
            yield
            return

        def add(module: nn.Module, inputs: Any, embedded: torch.Tensor) -> torch.Tensor:
            handle.remove()
            wide = torch.promote_types(embedded.dtype, torch.float32)
            tokens = row_lengths(batch).to(wide)[..., None]
            bound = self.alpha / (tokens * embedded.shape[-1]).sqrt()
            noise = torch.empty_like(embedded, dtype=wide).uniform_(-1, 1) * bound
            return embedded + noise.to(embedded.dtype)

        handle = self._embedding.register_forward_hook(add)
        hooks = self._embedding._forward_hooks
        try:
            yield
            if handle.id in hooks:
                raise InputError(
                    "training.neftune_noise_alpha: the model does not call the module that embeds "
                    "its tokens, so that no noise reaches it: leave it out"
                )
        finally:
            handle.remove()


def row_lengths(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """For every position (batch, seq) the tokens of the row that it is in."""
    ids = batch["input_ids"]
    if "cu_seq_lens_q" in batch:
        lengths = batch["cu_seq_lens_q"].diff()
        return lengths.repeat_interleave(lengths)[None]
    mask = batch.get("attention_mask", torch.ones_like(ids))
    return mask.sum(dim=1, keepdim=True).clamp(min=1).expand(ids.shape)


def input_embedding(model: nn.Module) -> nn.Module:
    """The module that embeds a model's prompt: an encoder's own where there is a decoder too.

    Raises:
        InputError: the model names none.
    """
    base: Any = base_model(model)
    if getattr(base.config, "is_encoder_decoder", False):
        base = base.get_encoder()
    with suppress(NotImplementedError):
        if isinstance(found := base.get_input_embeddings(), nn.Module):
            return found
    raise InputError(
        f"training.neftune_noise_alpha: {type(base).__name__} does not say which module embeds "
        "its tokens: leave it out"
    )
