"""LoRA beside an embedding."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lorakit.errors import InputError
from lorakit.lora.config import LoraConfig
from lorakit.lora.layers.layer import LoraLayer
from lorakit.lora.routing import Routing


class LoraEmbedding(LoraLayer):
    """`y = W[x] + scaling * A^T[x] B^T` beside a frozen embedding.

    Where the base multiplies what it looks up (Gemma's `embed_scale`), both terms are multiplied.
    As in PEFT the parameters are `lora_embedding_A[name]` (r, num_embeddings), zero at the
    start, and `lora_embedding_B[name]` (embedding_dim, r), normal; there is no dropout.
    """

    stored_transposed = True
    by_name = (*LoraLayer.by_name, "lora_embedding_A", "lora_embedding_B")

    def __init__(self, base_layer: nn.Module, routing: Routing | None = None) -> None:
        super().__init__(base_layer, routing)
        # (num_embeddings, embedding_dim)
        self.in_features, self.out_features = self.base_weight.shape
        self.lora_embedding_A = nn.ParameterDict()
        self.lora_embedding_B = nn.ParameterDict()

    def _check(self, config: LoraConfig) -> None:
        if config.lora_bias:
            raise InputError("lora_bias=True is not defined for embeddings: leave them out")

    def _create(self, name: str, r: int, bias: bool, **placement: Any) -> None:
        self.lora_embedding_A[name] = nn.Parameter(torch.empty(r, self.in_features, **placement))
        self.lora_embedding_B[name] = nn.Parameter(torch.empty(self.out_features, r, **placement))

    def _initialize(self, name: str, config: LoraConfig, fresh: bool = True) -> None:
        W = self._as_matrix(self.base_weight)
        factors, scaling = self.matrices(name), self.scaling[name]
        _, weight = config.init.fill(*factors, W, scaling, embedding=True)
        if weight is not None:
            self._replace_weight(name, weight)

    def matrices(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.lora_embedding_A[name], self.lora_embedding_B[name]

    def _factor_tensors(self, name: str) -> dict[str, torch.Tensor]:
        A, B = self.matrices(name)
        return {"lora_embedding_A": A, "lora_embedding_B": B}

    def bias_update(self, name: str) -> None:
        return None

    def _as_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.T  # stored (num_embeddings, dim), the transpose of B A

    def _as_stored(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix.T

    def _low_rank(self, x: torch.Tensor, name: str) -> torch.Tensor:
        A, B = self.factors(name)
        return self._scaled_as_base(F.linear(F.embedding(x, A.T), B) * self.scaling[name])

    def _base_product(
        self, x: torch.Tensor, y: torch.Tensor, dropped: torch.Tensor
    ) -> torch.Tensor:
        return y

    def _dropped(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x  # token numbers cannot be dropped

    def _scaled_as_base(self, update: torch.Tensor) -> torch.Tensor:
        """`update` times the factor by which the base multiplies what it looks up, if any."""
        scale = getattr(self.base_layer, "embed_scale", None)
        return update if scale is None else update * torch.as_tensor(scale).to(update)
