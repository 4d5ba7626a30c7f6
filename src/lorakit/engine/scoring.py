"""Reward models and classifiers beside a causal base: an adapter's head is taken off its files.

Below the head a model that scores is the same as one that writes, so that such an adapter stands
beside the others of a resident base: a score is one pass over the sequence with its route.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

import torch

from lorakit.data.bounded_templates import isolated_templates
from lorakit.data.masking import tokenize
from lorakit.engine.bounded_tokens import TooManyTokensError
from lorakit.errors import InputError, listed
from lorakit.lora.checkpoint import PREFIX
from lorakit.lora.config import LoraConfig
from lorakit.lora.routing import Route
from lorakit.models.sequence_scores import last_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lorakit.data.samples import Sample
    from lorakit.lora.routing import Routing

_HEAD = "score"
_HEADS = (_HEAD, "classifier")  # PEFT names both, whichever a model has


def without_head(
    config: LoraConfig, tensors: Mapping[str, torch.Tensor]
) -> tuple[LoraConfig, dict[str, torch.Tensor], torch.Tensor | None]:
    """A reward model's or classifier's adapter as one of a causal model, and its head (labels, d).

    Another adapter comes back as it is, with None.
    """
    key = f"{PREFIX}{_HEAD}.weight"
    head = tensors.get(key)
    if config.task_type != "SEQ_CLS" or head is None:
        return config, dict(tensors), None
    config = copy(config)
    config.task_type = "CAUSAL_LM"
    config.modules_to_save = [m for m in config.modules_to_save or () if m not in _HEADS] or None
    rest = {name: tensor for name, tensor in tensors.items() if name != key}
    return config, rest, head.float()


def label_names(record: Mapping[str, Any] | None, number: int) -> tuple[str, ...]:
    """The names of a classifier's labels: the record's, or as transformers calls them."""
    names = (record or {}).get("id2label") or {}
    return tuple(str(names.get(str(i), f"LABEL_{i}")) for i in range(number))


def scored_tokens(sample: Sample, tokenizer: PreTrainedTokenizerBase, limit: int) -> list[int]:
    """The tokens of a conversation that ends with an answer, or of a text, as in training.

    Templates are rendered in another process.

    Raises:
        TooManyTokensError: there are more than `limit`.
        InputError: the template refuses the conversation, or leaves a part of it out.
    """
    characters = len(sample.text or "".join(str(m["content"]) for m in sample.messages))
    if characters > limit * 64:  # more than a token stands for, in any text that is read
        raise TooManyTokensError(limit, limit, False)
    with isolated_templates():
        row = tokenize(sample, tokenizer, 2**31)
    if row.unshown:
        raise InputError(f"the chat template leaves out a part: {listed(row.unshown)}")
    if len(row) >= limit:
        raise TooManyTokensError(len(row), limit - 1, True)
    return row.input_ids


def score(
    model: Any,
    routing: Routing,
    adapter: str,
    head: torch.Tensor,
    tokens: Sequence[int],
    pad_token_id: int,
) -> tuple[float, ...]:
    """What `head` says of the last token that is not padding, under an adapter of `model`.

    Args:
        head: (labels, d).
        model: the causal base.
        routing: of its adapters.
        pad_token_id: as the reward model was trained with.
    """
    device = next(model.parameters()).device
    batch = {"input_ids": torch.tensor([[*tokens]], device=device)}
    with routing.using(Route.of_rows((adapter,))):
        h = model.base_model(**batch, use_cache=False).last_hidden_state
    last = h.flatten(0, 1)[last_tokens(batch, pad_token_id)]
    return tuple((head.to(device) @ last[0].float()).tolist())
