"""A frozen layer with a bank of named adapters beside it.

A wrapped layer keeps PEFT's structure: `base_layer` is the frozen original, `lora_A[name].weight`
(r, in) and `lora_B[name].weight` (out, r) are the adapter `name`. The `Routing` that all layers
of a model share says which of them serve which rows. Finding the layers is `targets.py`'s work,
putting them into a model `injection.py`'s.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lorakit.errors import InputError
from lorakit.lora.config import LoraConfig
from lorakit.lora.routing import Routing


class LoraLayer(nn.Module, ABC):
    """One frozen layer and its adapters: a bank that adapters join, leave, merge into."""

    def __init__(self, base_layer: nn.Module, routing: Routing | None = None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.routing = routing or Routing()
        self.lora_dropout = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._weight_before_merge: nn.Parameter | None = None
        self.base_weight.requires_grad_(False)

    @property
    def base_weight(self) -> nn.Parameter:
        """The frozen weight, as the base layer stores it."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def weight(self) -> torch.Tensor:
        """The base layer's: some models (T5) look at the dtype of their layers' weights."""
        return self.base_weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The base layer's bias, None where it has none."""
        return getattr(self.base_layer, "bias", None)

    @property
    def active_adapters(self) -> list[str]:
        """The adapters of the route in force that this layer has."""
        return [name for name in self.routing.route.shared if name in self.r]

    @property
    def merged(self) -> bool:
        """Whether the base weight contains an adapter's update now."""
        return bool(self.merged_adapters)

    # --- the bank -------------------------------------------------------------------------

    def add_adapter(self, name: str, config: LoraConfig, module_name: str = "") -> None:
        """Makes room for adapter `name` and initialises it; the base and the others stay.

        Weights are float32 where the base is float16 or bfloat16, so that small steps are not
        rounded away, and of the base's own dtype elsewhere.

        Args:
            module_name: this layer's path in the model, for `rank_pattern` and `alpha_pattern`.
        """
        r, alpha = config.rank_for(module_name), config.alpha_for(module_name)
        base = self.base_weight
        half = base.dtype in (torch.float16, torch.bfloat16) or not base.dtype.is_floating_point
        dtype = torch.float32 if half else base.dtype
        self.r[name], self.lora_alpha[name] = r, alpha
        self.scaling[name] = alpha / math.sqrt(r) if config.use_rslora else alpha / r
        p = config.lora_dropout
        dropout = nn.Dropout(p) if p > 0 else nn.Identity()
        self.lora_dropout[name] = dropout.train(self.training)
        self._create(name, r, device=base.device, dtype=dtype)
        self._initialize(name, config.init_lora_weights)

    def delete_adapter(self, name: str) -> None:
        """Forgets adapter `name`, if this layer has it."""
        if name in self.merged_adapters:
            others = [n for n in self.merged_adapters if n != name]
            self.unmerge()
            self.merge(others)
        for part in (self.r, self.lora_alpha, self.scaling):
            part.pop(name, None)
        for bank in (self.lora_dropout, *self._banks()):
            if name in bank:
                del bank[name]

    @abstractmethod
    def adapter_tensors(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of adapter `name` under the ends of PEFT's keys (`lora_A.weight`, …)."""

    @abstractmethod
    def factors(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """`A` (r, d_in) and `B` (d_out, r) of adapter `name`."""

    @abstractmethod
    def _create(self, name: str, r: int, **placement: Any) -> None:
        """Creates the parameters of adapter `name`, of rank `r`, uninitialised."""

    @abstractmethod
    def _initialize(self, name: str, how: bool | str) -> None:
        """Fills the parameters of adapter `name` as `LoraConfig.init_lora_weights` says."""

    @abstractmethod
    def _banks(self) -> tuple[nn.ModuleDict | nn.ParameterDict, ...]:
        """The dictionaries by adapter name that hold parameters."""

    # --- merging --------------------------------------------------------------------------

    def get_delta_weight(self, name: str) -> torch.Tensor:
        """`scaling * B A` of adapter `name`, in the shape in which the base stores its weight.

        Computed in the adapter's dtype; never part of a graph.
        """
        A, B = self.factors(name)
        delta = (B.detach() @ A.detach()).mul_(self.scaling[name])
        return delta.T if self._stored_transposed() else delta

    def _stored_transposed(self) -> bool:
        return False

    @torch.no_grad()
    def merge(
        self,
        adapter_names: Iterable[str] | None = None,
        *,
        safe_merge: bool = False,
        keep_backup: bool = True,
    ) -> None:
        """Adds the update of `adapter_names` (None: the active ones) to the base weight.

        The sum is made in the wider of the two dtypes and rounded once, also when adapters are
        merged one after the other. It becomes a new
        parameter, so a weight that is tied to this one elsewhere stays as it is; the parameter
        that was there is kept for `unmerge`, unless `keep_backup` is false.

        Raises:
            InputError: with `safe_merge`, when the merged weight is not finite.
        """
        wanted = self.active_adapters if adapter_names is None else dict.fromkeys(adapter_names)
        new = [n for n in wanted if n in self.r and n not in self.merged_adapters]
        if not new:
            return
        weight, names = self.base_weight, new
        if self._weight_before_merge is not None:
            weight, names = self._weight_before_merge, self.merged_adapters + new
        total = weight.to(torch.promote_types(weight.dtype, self.factors(names[0])[0].dtype))
        total = total + sum(self.get_delta_weight(name).to(total.dtype) for name in names)
        if safe_merge and not torch.isfinite(total).all():
            raise InputError(f"merging {', '.join(names)} gives weights that are not finite")
        if keep_backup and self._weight_before_merge is None:
            self._weight_before_merge = weight
        self.base_layer.weight = nn.Parameter(total.to(weight.dtype), requires_grad=False)
        self.merged_adapters += new

    def unmerge(self) -> None:
        """Gives the base layer the very weight back that it had before merging."""
        if not self.merged:
            return
        if self._weight_before_merge is None:
            raise RuntimeError("this layer was merged without a backup and cannot be unmerged")
        self.base_layer.weight = self._weight_before_merge
        self._weight_before_merge = None
        self.merged_adapters = []

    # --- computing ------------------------------------------------------------------------

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer's output plus the update of the adapters on the route."""
        route = self.routing.route
        if route.rows is not None:
            if self.merged:
                raise RuntimeError("rows cannot choose adapters while one is merged: unmerge first")
            y = self.base_layer(x, *args, **kwargs)
            names = [name for name in route.row_names if name in self.r]
            if not names:
                return y
            index = route.row_index(x.shape[0], names, x.device)
            update = self._row_update(x, names, index)
            return y + update.view(y.shape).to(y.dtype)
        names = [] if self.merged else self.active_adapters
        return self._forward_shared(x, names, *args, **kwargs)

    @abstractmethod
    def _forward_shared(
        self, x: torch.Tensor, names: list[str], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """The output when `names` serve every row; an empty list is the base alone."""

    @abstractmethod
    def _row_update(self, x: torch.Tensor, names: list[str], index: torch.Tensor) -> torch.Tensor:
        """What the adapters add when row i has the adapter `names[index[i]]`.

        An index of `len(names)` is no adapter. Returns: (batch, n, d_out).
        """

    def _stacked(self, names: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors of `names` in one tensor each, and one more of zeros for "no adapter".

        Ranks are padded with zeros up to the largest, which leaves every product as it is; the
        scaling is folded into `B`.

        Returns: A (n + 1, r, d_in) and B (n + 1, d_out, r).
        """
        r = max(self.r[name] for name in names)
        As, Bs = [], []
        for name in names:
            A, B = self.factors(name)
            As.append(F.pad(A, (0, 0, 0, r - A.shape[0])))
            Bs.append(F.pad(B * self.scaling[name], (0, r - B.shape[1])))
        As.append(torch.zeros_like(As[0]))
        Bs.append(torch.zeros_like(Bs[0]))
        return torch.stack(As), torch.stack(Bs)
