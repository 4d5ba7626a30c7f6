"""Batches of several adapters side by side in one pass, and each adapter's own losses out of it.

In a line, the rows of one adapter follow those of the other; padded, they are blocks of rows. The
route says where each adapter's part begins and ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from lorakit.data.batches import joined_lines
from lorakit.lora.config import LoraConfig
from lorakit.lora.layers import LoraEmbedding, LoraLinear, LoraQuantizedLinear, layer_class
from lorakit.lora.routing import Route
from lorakit.lora.streams import Stream
from lorakit.lora.targets import resolve_targets
from lorakit.models.adapted_head import Targets
from lorakit.models.loaded import base_model
from lorakit.models.loss import IGNORE

Tensors = Mapping[str, torch.Tensor]

_SHARE_PASSES = (LoraLinear, LoraQuantizedLinear, LoraEmbedding)


@dataclass(frozen=True)
class AdapterBatch:
    """Rows of one adapter as tensors, as the adapter would have them alone.

    Args:
        adapter: the adapter's name, or `BASE` for the bare base.
        tensors: `input_ids`, `labels` and `attention_mask`, int64 (batch, seq); or a line, as
            `data.batches.LineCollator` makes it, (1, tokens). A position predicts the label after
            it.
        divisor: what the summed loss is divided by before it is differentiated.
        loss: the summed loss, a scalar, of the losses of its supervised tokens (n,), in nats; by
            default their sum.
        stream: what the adapter's dropout is drawn from; None is PyTorch's own generator.
        smoothing: label smoothing, from 0 to 1.
        entropies: the loss is called with the entropies (n,) of their distributions too.
        targets: tokens whose losses are taken in the place of the labels; None for the labels.
    """

    adapter: str
    tensors: Tensors
    divisor: torch.Tensor | int = 1
    stream: Stream | None = None
    smoothing: float = 0.0
    loss: Callable[..., torch.Tensor] = torch.sum
    targets: Targets | None = None
    entropies: bool = False

    @property
    def size(self) -> int:
        """Its rows, or its tokens where they are a line."""
        rows, tokens = self.tensors["input_ids"].shape
        return tokens if "cu_seq_lens_q" in self.tensors else rows

    @property
    def tokens(self) -> int:
        """The positions that are computed, padding included."""
        return self.tensors["input_ids"].numel()


def passes(batches: Sequence[AdapterBatch], tokens: int | None) -> list[list[AdapterBatch]]:
    """`batches` in order, as many in a pass as have at most `tokens` positions, but at least one.

    Args:
        tokens: None for all in one pass.
    """
    found: list[list[AdapterBatch]] = []
    filled = 0
    for batch in batches:
        if not found or (tokens is not None and filled + batch.tokens > tokens):
            found.append([])
            filled = 0
        found[-1].append(batch)
        filled += batch.tokens
    return found


def side_by_side(
    batches: Sequence[AdapterBatch], pad_token_id: int
) -> tuple[dict[str, torch.Tensor], Route]:
    """One batch of all, and the route by which each part is computed with its own adapter.

    Args:
        batches: all of them lines, or all of them padded.
        pad_token_id: what shorter rows are filled with, where rows are padded.
    """
    tensors = [batch.tensors for batch in batches]
    in_line = "cu_seq_lens_q" in tensors[0]
    whole = joined_lines(tensors) if in_line else _in_blocks(tensors, pad_token_id)
    shape = whole["input_ids"].shape
    widths = tuple(batch["input_ids"].shape[1] for batch in tensors)
    route = Route(
        rows=tuple(batch.adapter for batch in batches),
        shape=(shape[0], shape[1]),
        sizes=tuple(batch.size for batch in batches),
        widths=None if in_line or len(set(widths)) == 1 else widths,
        streams=tuple(batch.stream for batch in batches),
    )
    return whole, route


def all_targets(batches: Sequence[AdapterBatch]) -> Targets | None:
    """The targets of all batches, one behind the other; None where every batch has its labels."""
    if all(batch.targets is None for batch in batches):
        return None
    found: list[Targets] = []
    begin = 0
    for batch in batches:
        labels = batch.tensors["labels"][:, 1:]
        labels = labels[labels != IGNORE]
        own = batch.targets or Targets.one_each(labels)
        found.append(Targets(own.positions + begin, own.tokens))
        begin += len(labels)
    return Targets(
        torch.cat([own.positions for own in found]), torch.cat([own.tokens for own in found])
    )


def _in_blocks(batches: Sequence[Tensors], pad_token_id: int) -> dict[str, torch.Tensor]:
    width = max(batch["input_ids"].shape[1] for batch in batches)
    fill = {"input_ids": pad_token_id, "attention_mask": 0, "labels": IGNORE}
    return {
        name: torch.cat(
            [F.pad(batch[name], (0, width - batch[name].shape[1]), value=v) for batch in batches]
        )
        for name, v in fill.items()
    }


def why_not_shared(base: nn.Module, config: LoraConfig) -> str | None:
    """Why rows of this adapter cannot be trained in one pass with other adapters' rows, or None.

    A base with dropout of its own draws it for a whole batch: there no adapters share a pass.

    Raises:
        InputError: the configuration matches nothing in the model.
    """
    if config.init.kind.changes_base:
        return f"init_lora_weights={config.init_lora_weights} quantises the base"
    if config.init.kind.collect:
        return f"init_lora_weights={config.init_lora_weights} starts from data"
    if config.bias != "none":
        return f"bias={config.bias} trains biases of the base"
    names = "modules_to_save", "trainable_token_indices", "target_parameters"
    for name in (*names, "layer_replication", "ensure_weight_tying"):
        if getattr(config, name):
            return f"it sets {name}"
    get_head = getattr(base_model(base), "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    for path in resolve_targets(base, config):
        module = base.get_submodule(path)
        inside = getattr(module, "base_layer", module)
        plain = type(inside) is nn.Linear and not (config.use_dora or config.lora_bias)
        if module is head and not plain:
            return f"it adapts the output layer {path} by more than two plain factors"
        kind = layer_class(inside)
        if kind is None or not issubclass(kind, _SHARE_PASSES):
            return f"it adapts {path}, a {type(module).__name__}"
    return None
