"""LoRA beside a convolution of one, two or three dimensions."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lorakit.errors import InputError
from lorakit.lora.config import LoraConfig
from lorakit.lora.layers.layer import LoraLayer
from lorakit.lora.routing import Routing

_CONVOLUTIONS: dict[int, Callable[..., torch.Tensor]] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


class LoraConv(LoraLayer):
    """`y = conv(x, W) + b + scaling * conv1x1(conv(dropout(x), A), B)` beside `nn.Conv1d/2d/3d`.

    As in PEFT `lora_A[name]` is a convolution from d_in to r channels with the base's kernel,
    stride and padding, never grouped, and `lora_B[name]` one of size 1 from r to d_out channels
    with the base's groups. The update of a grouped base has no place in its weight, so it cannot
    be merged.
    """

    def __init__(self, base_layer: nn.Module, routing: Routing | None = None) -> None:
        super().__init__(base_layer, routing)
        base: Any = base_layer
        self.in_features, self.out_features = base.in_channels, base.out_channels
        self._spatial: int = self.base_weight.dim() - 2

    def add_adapter(
        self, name: str, config: LoraConfig, module_name: str = "", *options: bool
    ) -> None:
        """As every layer's; the rank must be a multiple of a grouped base's groups."""
        r, groups = config.rank_for(module_name), self.base_layer.groups
        if r % groups:
            raise InputError(f"{module_name} has {groups} groups: r must be a multiple, not {r}")
        super().add_adapter(name, config, module_name, *options)

    def _create(self, name: str, r: int, bias: bool, **placement: Any) -> None:
        base: Any = self.base_layer
        skip, kind = nn.utils.skip_init, _plain_kind(base)
        shape = {k: getattr(base, k) for k in ("stride", "padding", "dilation", "padding_mode")}
        size, one = base.kernel_size, (1,) * self._spatial
        # `skip_init` takes what a plain convolution takes.
        A = skip(kind, self.in_features, r, size, bias=False, **shape, **placement)
        B = skip(kind, r, self.out_features, one, groups=base.groups, bias=bias, **placement)
        self.lora_A[name], self.lora_B[name] = A, B

    def _check(self, config: LoraConfig) -> None:
        if not config.init.kind.any_shape:
            raise InputError(
                f"init_lora_weights='{config.init_lora_weights}' is not defined for convolutions"
            )
        if config.use_dora and self.base_layer.groups != 1:
            raise InputError("use_dora=True is not defined for grouped convolutions")

    def _get_name(self) -> str:
        return f"lora.{_plain_kind(self.base_layer).__name__}"

    def matrices(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """`A` (r, d_in * kernel) and `B` (d_out, r), block-diagonal when the base is grouped."""
        A, B = (kernel.flatten(1) for kernel in self._kernels(name))
        groups = self.base_layer.groups
        return A, B if groups == 1 else torch.block_diag(*B.chunk(groups))

    def _kernels(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        return self.lora_A[name].weight, self.lora_B[name].weight  # type: ignore[return-value]

    def initial_places(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self._kernels(name)  # the matrices of a grouped base are no views

    def changed_parameters(self, names: Sequence[str]) -> list[str]:
        if self.base_layer.groups != 1:
            raise InputError("adapters beside a grouped convolution cannot be merged into it")
        return super().changed_parameters(names)

    def _as_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.flatten(1)

    def _as_stored(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix.view(matrix.shape[0], -1, *self.base_weight.shape[2:])

    def _low_rank(self, x: torch.Tensor, name: str) -> torch.Tensor:
        A, B = self._kernels(name)
        xA = self._convolve(x, A.to(x.dtype))
        convolve = _CONVOLUTIONS[self._spatial + 2]
        xAB = convolve(xA, B.to(x.dtype), groups=self.base_layer.groups)
        return xAB * self.scaling[name]

    def _base_product(
        self, x: torch.Tensor, y: torch.Tensor, dropped: torch.Tensor
    ) -> torch.Tensor:
        if dropped is not x:
            return self._convolve(dropped, self.base_weight)
        bias = self.base_layer.bias
        return y if bias is None else y - self._per_channel(bias)

    def _stored_magnitude(self, magnitude: torch.Tensor) -> torch.Tensor:
        return magnitude.view(1, -1, *[1] * self._spatial)

    def _per_channel(self, values: torch.Tensor) -> torch.Tensor:
        return values.view(*values.shape, *[1] * self._spatial)

    def _convolve(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The base layer's convolution of `x` with another weight, without a bias."""
        base: Any = self.base_layer
        padding = base.padding
        if base.padding_mode != "zeros":
            x = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)
            padding = 0
        convolve = _CONVOLUTIONS[weight.dim()]
        return convolve(x, weight, None, base.stride, padding, base.dilation)


def _plain_kind(module: nn.Module) -> type[nn.Module]:
    """`nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`, of which `module` is one."""
    return next(kind for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(module, kind))
