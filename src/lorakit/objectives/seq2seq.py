"""Encoder-decoders: the encoder reads the prompt, the decoder learns the answer.

There is no chat template in between: what a row asks is the text that the encoder reads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit.data.batches import LabelCollator
from lorakit.data.seq2seq import tokenize_pair
from lorakit.models.loss import IGNORE, LabelLoss
from lorakit.objectives.batch_sums import Loss
from lorakit.objectives.objective import Batch, Objective

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from lorakit.data.masking import TokenizedRow
    from lorakit.data.samples import Sample
    from lorakit.objectives.forward import Forward


class Seq2Seq(Objective):
    """One answer to one question, learned by a decoder."""

    name = "seq2seq"
    task_type = "SEQ_2_SEQ_LM"
    templated = False
    packable = False

    def tokenize(
        self, sample: Sample, tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> TokenizedRow:
        """Prompt and answer, each cut to `max_length` tokens; see `data.seq2seq`."""
        return tokenize_pair(sample, tokenizer, max_length)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> LabelCollator:
        """Pads prompts and answers, each to a length of its own."""
        return LabelCollator(int(tokenizer.pad_token_id))

    def reader(self, model: nn.Module, own_logits: bool) -> LabelLoss:
        """Cross-entropy of what the decoder writes."""
        return LabelLoss(model, targets=True)

    def loss(self, forward: Forward, batch: Batch) -> Loss:
        """The summed negative log-likelihood of the answers' tokens, in nats."""
        return Loss(forward.label_logits(batch)[0], self.count(batch))

    def supervised(self, batch: Batch) -> torch.Tensor:
        """The tokens of the answers."""
        return (batch["labels"] != IGNORE).sum()
