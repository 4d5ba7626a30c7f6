"""LoRA beside a linear layer, `nn.Linear` or GPT-2's `Conv1D`."""

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn

from lorakit.lora.config import LoraConfig
from lorakit.lora.initialize import initialize_linear
from lorakit.lora.kernels import lora_linear
from lorakit.lora.layers.base import LoraLayer
from lorakit.lora.routing import Route, Routing


class LoraLinear(LoraLayer):
    """`y = x W^T + b + scaling * dropout(x) A^T B^T` beside a frozen linear layer.

    Usable alone: `LoraLinear(nn.Linear(512, 512), r=8, lora_alpha=16)` has one adapter, named
    `default`, active. GPT-2's `Conv1D`, which stores its weight (in, out), is a base layer too.

    Args:
        base_layer: the layer to freeze; x (..., d_in) to y (..., d_out).
        r, lora_alpha, lora_dropout, use_rslora, init_lora_weights: as in `LoraConfig`. `r=None`
            starts with an empty bank.
        fan_in_fan_out: the base weight is stored (in, out).
    """

    def __init__(
        self,
        base_layer: nn.Module,
        r: int | None = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        *,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        fan_in_fan_out: bool | None = None,
        routing: Routing | None = None,
    ) -> None:
        super().__init__(base_layer, routing)
        self.fan_in_fan_out = is_conv1d(base_layer) if fan_in_fan_out is None else fan_in_fan_out
        rows, columns = self.base_weight.shape
        self.in_features, self.out_features = (
            (rows, columns) if self.fan_in_fan_out else (columns, rows)
        )
        if (bias := getattr(base_layer, "bias", None)) is not None:
            bias.requires_grad_(False)
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        if r is not None:
            config = LoraConfig(
                r=r,
                lora_alpha=lora_alpha,
                lora_dropout=lora_dropout,
                use_rslora=use_rslora,
                init_lora_weights=init_lora_weights,
            )
            self.add_adapter("default", config)
            self.routing.route = Route(shared=("default",))

    @classmethod
    def from_base(cls, base_layer: nn.Module, config: LoraConfig, routing: Routing) -> Self:
        """An empty bank around `base_layer`, on a model's shared routing."""
        # `config.fan_in_fan_out` is left to the layer: a head beside GPT-2's layers is not one.
        return cls(base_layer, r=None, routing=routing)

    def factors(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        return self.lora_A[name].weight, self.lora_B[name].weight  # type: ignore[return-value]

    def adapter_tensors(self, name: str) -> dict[str, nn.Parameter]:
        A, B = self.factors(name)
        return {"lora_A.weight": A, "lora_B.weight": B}

    def _create(self, name: str, r: int, **placement: Any) -> None:
        # skip_init: `_initialize` fills them, and a second filling would cost time and draws.
        skip = nn.utils.skip_init
        self.lora_A[name] = skip(nn.Linear, self.in_features, r, bias=False, **placement)
        self.lora_B[name] = skip(nn.Linear, r, self.out_features, bias=False, **placement)

    def _initialize(self, name: str, how: bool | str) -> None:
        initialize_linear(*self.factors(name), how)

    def _banks(self) -> tuple[nn.ModuleDict, nn.ModuleDict]:
        return self.lora_A, self.lora_B

    def _stored_transposed(self) -> bool:
        return self.fan_in_fan_out

    def _forward_shared(
        self, x: torch.Tensor, names: list[str], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if len(names) == 1 and self._fusable(x, names[0]):
            A, B = self.factors(names[0])
            bias = self.base_layer.bias
            return lora_linear(x, self.base_weight, bias, A, B, self.scaling[names[0]])  # type: ignore[arg-type]
        y = self.base_layer(x, *args, **kwargs)
        for name in names:
            A, B = self.factors(name)
            xA = F.linear(self.lora_dropout[name](x), A.to(x.dtype))
            y = y + F.linear(xA, B.to(x.dtype)) * self.scaling[name]
        return y

    def _row_update(self, x: torch.Tensor, names: list[str], index: torch.Tensor) -> torch.Tensor:
        A, B = (factor.to(x.dtype)[index] for factor in self._stacked(names))
        rows = self._row_dropout(x.reshape(x.shape[0], -1, x.shape[-1]), names, index)
        return torch.bmm(torch.bmm(rows, A.mT), B.mT)

    def _row_dropout(
        self, rows: torch.Tensor, names: list[str], index: torch.Tensor
    ) -> torch.Tensor:
        """Drops from every row at the rate of its own adapter. rows: (batch, n, d_in)."""
        rates = [getattr(self.lora_dropout[name], "p", 0.0) for name in names]
        if not self.training or not any(rates):
            return rows
        keep = 1 - torch.tensor([*rates, 0.0], device=rows.device, dtype=rows.dtype)[index]
        keep = keep[:, None, None]
        return rows * torch.bernoulli(keep.expand_as(rows)) / keep

    def _fusable(self, x: torch.Tensor, name: str) -> bool:
        """Whether the fused function computes what the plain formula would."""
        base = self.base_layer
        bias = getattr(base, "bias", None)
        return (
            type(base) is nn.Linear
            and not self.fan_in_fan_out
            and x.dtype == base.weight.dtype
            and not base.weight.requires_grad
            and (bias is None or not bias.requires_grad)
            and (not self.training or isinstance(self.lora_dropout[name], nn.Identity))
            and not torch.is_autocast_enabled(x.device.type)
            and "forward" not in vars(base)  # accelerate replaces it to move weights
            and not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks)
        )


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' `Conv1D` (GPT-2), a linear layer stored (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")
