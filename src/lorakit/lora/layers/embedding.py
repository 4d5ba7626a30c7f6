"""LoRA beside an embedding."""

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn

from lorakit.lora.config import LoraConfig
from lorakit.lora.initialize import initialize_embedding
from lorakit.lora.layers.base import LoraLayer
from lorakit.lora.routing import Routing


class LoraEmbedding(LoraLayer):
    """`y = W[x] + scaling * A^T[x] B^T` beside a frozen embedding.

    Where the base multiplies what it looks up (Gemma's `embed_scale`), both terms are multiplied.
    As in PEFT the parameters are `lora_embedding_A[name]` (r, num_embeddings), zero at the
    start, and `lora_embedding_B[name]` (embedding_dim, r), normal.
    """

    def __init__(self, base_layer: nn.Embedding, routing: Routing | None = None) -> None:
        super().__init__(base_layer, routing)
        self.in_features, self.out_features = base_layer.num_embeddings, base_layer.embedding_dim
        self.lora_embedding_A = nn.ParameterDict()
        self.lora_embedding_B = nn.ParameterDict()

    @classmethod
    def from_base(cls, base_layer: nn.Module, config: LoraConfig, routing: Routing) -> Self:
        """An empty bank around `base_layer`, on a model's shared routing."""
        assert isinstance(base_layer, nn.Embedding)
        return cls(base_layer, routing)

    def factors(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        return self.lora_embedding_A[name], self.lora_embedding_B[name]

    def adapter_tensors(self, name: str) -> dict[str, nn.Parameter]:
        A, B = self.factors(name)
        return {"lora_embedding_A": A, "lora_embedding_B": B}

    def _create(self, name: str, r: int, **placement: Any) -> None:
        self.lora_embedding_A[name] = nn.Parameter(torch.empty(r, self.in_features, **placement))
        self.lora_embedding_B[name] = nn.Parameter(torch.empty(self.out_features, r, **placement))

    def _initialize(self, name: str, how: bool | str) -> None:
        initialize_embedding(*self.factors(name), how)

    def _banks(self) -> tuple[nn.ParameterDict, nn.ParameterDict]:
        return self.lora_embedding_A, self.lora_embedding_B

    def _stored_transposed(self) -> bool:
        return True  # an embedding's weight is (num_embeddings, dim), the transpose of B A

    def _forward_shared(
        self, x: torch.Tensor, names: list[str], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        y = self.base_layer(x, *args, **kwargs)
        for name in names:
            A, B = self.factors(name)
            update = F.linear(F.embedding(x, A.T), B) * self.scaling[name]
            y = y + self._scaled_as_base(update).to(y.dtype)
        return y

    def _row_update(self, x: torch.Tensor, names: list[str], index: torch.Tensor) -> torch.Tensor:
        A, B = self._stacked(names)
        slot = index.view(-1, *[1] * (x.dim() - 1)).expand_as(x)
        xA = A.mT[slot, x].reshape(x.shape[0], -1, A.shape[1])
        return self._scaled_as_base(torch.bmm(xA, B[index].mT))

    def _scaled_as_base(self, update: torch.Tensor) -> torch.Tensor:
        """`update` times the factor by which the base multiplies what it looks up, if any."""
        scale = getattr(self.base_layer, "embed_scale", None)
        return update if scale is None else update * torch.as_tensor(scale).to(update)
