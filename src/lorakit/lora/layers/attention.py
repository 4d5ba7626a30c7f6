"""LoRA inside PyTorch's own `nn.MultiheadAttention`."""

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn

from lorakit.errors import InputError
from lorakit.lora.config import LoraConfig
from lorakit.lora.layers.linear import LoraLinear
from lorakit.lora.routing import Routing


class LoraMultiheadAttention(LoraLinear):
    """LoRA beside the packed input projection and the output projection of an attention layer.

    As in PEFT both are adapted: the input projection here, `in_proj_weight` (3 d, d), the output
    projection as a wrapped layer of its own, `base_layer.out_proj`. The projections are computed
    with their adapters; PyTorch's function does the attention between them.
    """

    weight_name = "in_proj_weight"
    bias_name = "in_proj_bias"

    def __init__(self, base_layer: nn.Module, routing: Routing | None = None) -> None:
        if getattr(base_layer, "in_proj_weight", None) is None:
            raise InputError(
                "LoRA beside nn.MultiheadAttention needs query, key and value of the same width"
            )
        super().__init__(base_layer, r=None, routing=routing)
        if not isinstance(self.base_layer.out_proj, LoraLinear):
            out_proj = LoraLinear.from_base(self.base_layer.out_proj, self.routing)
            self.base_layer.out_proj = out_proj

    @classmethod
    def from_base(cls, base_layer: nn.Module, routing: Routing) -> Self:
        """An empty bank around `base_layer`, on a model's shared routing."""
        return cls(base_layer, routing)

    def add_adapter(
        self, name: str, config: LoraConfig, module_name: str = "", *options: bool
    ) -> None:
        """Adds the adapter to both projections."""
        super().add_adapter(name, config, module_name, *options)
        out_proj = self.base_layer.out_proj
        out_proj.add_adapter(name, config, f"{module_name}.out_proj", *options)

    def forward(  # type: ignore[override]
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `nn.MultiheadAttention`; the names on the route may differ from row to row."""
        options: dict[str, Any] = {
            "key_padding_mask": key_padding_mask,
            "need_weights": need_weights,
            "attn_mask": attn_mask,
            "average_attn_weights": average_attn_weights,
            "is_causal": is_causal,
        }
        if self.merged or not self._on_route():
            return self.base_layer(query, key, value, **options)
        if self.routing.route.rows is not None and query.dim() == 2:
            raise InputError("adapter_names needs rows, and nn.MultiheadAttention got one sequence")
        base, d = self.base_layer, self.in_features
        # Adapters of rows are told apart by the first dimension; the attention wants (n, batch, d).
        swap = query.dim() == 3 and not base.batch_first
        inputs = {id(x): x.transpose(0, 1) if swap else x for x in (query, key, value)}
        projected = {i: LoraLinear.forward(self, x).chunk(3, dim=-1) for i, x in inputs.items()}
        q, k, v = (projected[id(x)][i] for i, x in enumerate((query, key, value)))
        if query.dim() == 3:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        one = torch.eye(d, dtype=q.dtype, device=q.device)
        attended, weights = F.multi_head_attention_forward(
            q, k, v, d, base.num_heads, None, None, base.bias_k, base.bias_v, base.add_zero_attn,
            base.dropout, one, None, self.training, use_separate_proj_weight=True,
            q_proj_weight=one, k_proj_weight=one, v_proj_weight=one, **options,
        )  # fmt: skip
        if attended.dim() == 2:
            return base.out_proj(attended), weights
        out = base.out_proj(attended.transpose(0, 1))  # rows first
        return (out if base.batch_first else out.transpose(0, 1)), weights

    def base_output(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Queries, keys and values of `x` side by side, (…, 3 d), without adapters."""
        return F.linear(x, self.base_weight, self.base_layer.in_proj_bias)
