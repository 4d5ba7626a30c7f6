"""LoRA beside modules that are tied to an embedding, with the embedding's own factors."""

from typing import Any

import torch
from torch import nn

from lorakit.lora.config import LoraConfig
from lorakit.lora.layers.embedding import LoraEmbedding
from lorakit.lora.layers.linear import LoraLinear
from lorakit.lora.layers.weight_updates import RowUpdate


class LoraTiedHead(LoraLinear):
    """A head whose weight is an embedding's, and whose update is the transpose of its update.

    The head's weight is (vocabulary, dim), as is the embedding's, whose update is `Aᵀ Bᵀ`. So the
    head's `A` is the embedding's `Bᵀ`, and its `B` the embedding's `Aᵀ`: it has no parameters.
    """

    nesting = 3
    embedding: LoraEmbedding

    def __init__(self, base_layer: nn.Module, embedding: LoraEmbedding) -> None:
        super().__init__(base_layer, r=None, routing=embedding.routing)
        vars(self)["embedding"] = embedding  # not as a submodule

    def matrices(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The embedding's factors, exchanged and transposed."""
        A, B = self.embedding.matrices(name)
        return B.T, A.T

    def _create(self, name: str, r: int, bias: bool, **placement: Any) -> None:
        """Nothing: the embedding has the parameters."""

    def _initialize(self, name: str, config: LoraConfig, fresh: bool = True) -> None:
        """Nothing: the embedding has done it."""

    def _row_update_of(self, name: str) -> RowUpdate | None:
        # The embedding's own, to the last bit: merged, the two are still one.
        return self.embedding._row_update_of(name)

    def _factor_tensors(self, name: str) -> dict[str, torch.Tensor]:
        A, B = self.matrices(name)
        if A.is_meta:  # values are put in the place of tensors that no view holds on to
            A, B = torch.empty_like(A), torch.empty_like(B)
        return {"lora_A.weight": A, "lora_B.weight": B}

    def bias_update(self, name: str) -> None:
        return None

    def is_plain(self, x: torch.Tensor, name: str) -> bool:
        return False


class LoraTiedEmbedding(LoraEmbedding):
    """Another embedding with the same weight, and with the first one's factors."""

    nesting = LoraTiedHead.nesting
    embedding: LoraEmbedding

    def __init__(self, base_layer: nn.Module, embedding: LoraEmbedding) -> None:
        super().__init__(base_layer, embedding.routing)
        vars(self)["embedding"] = embedding  # not as a submodule

    def matrices(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The first embedding's factors."""
        return self.embedding.matrices(name)

    def _create(self, name: str, r: int, bias: bool, **placement: Any) -> None:
        """Nothing: the first embedding has the parameters."""

    def _initialize(self, name: str, config: LoraConfig, fresh: bool = True) -> None:
        """Nothing: the first embedding has done it."""
