"""The adapters of a model: which there are, which are active, which are trained.

`AdapterBank` is the part of `LoraModel` that changes this; computing with them, merging and files
are in `model.py`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Self

import torch
from torch import nn

from lorakit.errors import InputError, did_you_mean, listed
from lorakit.lora.base_model import BaseModel
from lorakit.lora.beside import require_beside
from lorakit.lora.biases import TrainedBiases
from lorakit.lora.checkpoint import adapter_parameters, load_tensors
from lorakit.lora.combination import CombineSettings
from lorakit.lora.config import LoraConfig
from lorakit.lora.injection import inject
from lorakit.lora.joining import AdapterPart, join
from lorakit.lora.layers import (
    LoraLayer,
    LoraLinear,
    LoraParameter,
    LoraQuantizedLinear,
    Mergeable,
)
from lorakit.lora.packed import PackedFactors
from lorakit.lora.parameters import count_parameters, set_trainable, to_meta
from lorakit.lora.replication import Replication
from lorakit.lora.routing import Route, Routing
from lorakit.lora.weighted import combination
from lorakit.lora.wrapping import remove, require_together, wrapped_modules, wrapped_places

_PACKED = (LoraLinear, LoraQuantizedLinear)
"""The kinds of layers, and none made of them, whose products are those of packed factors."""


class AdapterBank(nn.Module):
    """A frozen model and its adapters, by name.

    Args:
        model: the base model; it is changed in place.
        config: the first adapter's configuration; it is the adapter's own from here on. None
            begins without adapters.
        adapter_name: the first adapter's name.
        autocast_adapter_dtype: adapters are float32 where the base is float16 or bfloat16;
            otherwise they have the base's dtype.
        initialize: False leaves the adapter's values to be loaded.
        low_cpu_mem_usage: the adapter's parameters are on the meta device until they are loaded.
    """

    def __init__(
        self,
        model: nn.Module,
        config: LoraConfig | None,
        adapter_name: str = "default",
        *,
        autocast_adapter_dtype: bool = True,
        initialize: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__()
        if any(True for _ in wrapped_modules(model)):
            raise InputError(
                "this model has adapters already: use add_adapter, or unload() it first"
            )
        self.routing = Routing()
        self.peft_config: dict[str, LoraConfig] = {}
        self.biases: TrainedBiases | None = None
        self._trainable_before = [n for n, p in model.named_parameters() if p.requires_grad]
        self.packed: PackedFactors | None = None
        ranges = config.layer_replication if config else None
        self._replication = Replication.of(model, ranges)
        self.base_model = BaseModel(model, self)
        if config is None:
            model.requires_grad_(False)
            return
        try:
            self._add(adapter_name, config, autocast_adapter_dtype, initialize, low_cpu_mem_usage)
        except InputError:
            self._replication.undo()
            raise
        self.set_adapter(adapter_name)

    def get_base_model(self) -> nn.Module:
        """The wrapped model itself."""
        return self.base_model.model

    # --- which there are --------------------------------------------------------------------

    @property
    def adapters(self) -> list[str]:
        """The names of all adapters."""
        return list(self.peft_config)

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: LoraConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Adds a new adapter beside the others; the active ones stay active.

        A preset in `target_modules` is replaced by the module names that it stands for here, so
        that the saved configuration means the same to readers that know no presets.
        """
        if peft_config.layer_replication != self._replication.ranges:
            raise InputError("layer_replication must be the same for all adapters of a model")
        config = copy.deepcopy(peft_config)
        self._add(adapter_name, config, autocast_adapter_dtype, meta=low_cpu_mem_usage)

    def pack(self, families: Iterable[Sequence[str]] = ()) -> None:
        """Prepares for inference with many adapters, whose values stay as they are from here on.

        Args:
            families: the paths of layers that get the same input (`packed.same_inputs`).
        """
        self.routing.frozen = True
        self.packed = PackedFactors(self.get_base_model(), families)

    def add_packed(
        self, adapter_name: str, config: LoraConfig, parts: Sequence[AdapterPart]
    ) -> None:
        """Adds an adapter for inference beside the others, which may be in use meanwhile.

        Args:
            config: as the model has it that the parts are of.
            parts: all that it has (`injection.parts_of`), frozen; they are not copied.

        An error, of whatever kind, leaves the model as it was.
        """
        assert self.packed is not None
        require_beside(adapter_name, config, self.peft_config)
        try:
            join(self.get_base_model(), adapter_name, parts, self.routing)
            self.peft_config[adapter_name] = config
            self.packed.put(adapter_name, self._packable())
        except BaseException:
            self.packed.remove(adapter_name)
            remove(self.get_base_model(), adapter_name)
            self.peft_config.pop(adapter_name, None)
            raise

    def _packable(self) -> dict[str, LoraLinear]:
        """The linear layers whose products may be made of packed factors, by their paths."""
        found: dict[str, LoraLinear] = {}
        changed = set()  # layers that run with another weight at times
        for path, layer in wrapped_places(self.get_base_model()):
            if isinstance(layer, LoraParameter):
                changed.add(path)
            elif isinstance(layer, LoraLinear) and type(layer) in _PACKED:
                if path in changed:
                    layer.family = None
                else:
                    found[path] = layer
        return found

    def _add(
        self,
        adapter_name: str,
        config: LoraConfig,
        autocast: bool,
        initialize: bool = True,
        meta: bool = False,
    ) -> None:
        require_beside(adapter_name, config, self.peft_config)
        model = self.get_base_model()
        inject(model, config, adapter_name, self.routing, autocast, initialize and not meta)
        self.peft_config[adapter_name] = config
        own_tensors = adapter_parameters(model, adapter_name)
        if meta:
            to_meta(own_tensors.values())
        set_trainable(own_tensors.values(), False)  # until it is active
        if config.bias != "none":
            known = {id(tensor) for tensor in own_tensors.values()}  # "all" are B's biases too
            with_biases = adapter_parameters(model, adapter_name, config.bias).values()
            self.biases = TrainedBiases(bias for bias in with_biases if id(bias) not in known)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
        *,
        generator: torch.Generator | None = None,
    ) -> float:
        """Adds the weighted combination of `adapters` as the new adapter `adapter_name`.

        It is a combination of what the adapters do, of their updates ΔW, whatever their ranks,
        scalings and target modules; weights may be negative. See `combine.combine` for methods.

        Args:
            generator: draws for DARE; None is PyTorch's own.

        Returns: the share of the updates' energy that truncating to `svd_rank` cost.

        Raises:
            InputError: a name or method does not exist, or these adapters cannot be combined.
        """
        for name in adapters:
            self.require(name)
        if not adapters or len(set(adapters)) != len(adapters) or len(adapters) != len(weights):
            raise InputError("add_weighted_adapter needs different adapters, and a weight for each")
        settings = CombineSettings(
            combination_type, svd_rank, density, majority_sign_method, generator
        )
        by_name = dict(zip(adapters, weights, strict=True))
        found = combination(self.get_base_model(), self.peft_config, by_name, settings)
        self._add(adapter_name, found.config, autocast=True, initialize=False)
        load_tensors(self.adapter_tensors(adapter_name), found.tensors, adapter_name)
        return found.lost_energy

    def delete_adapter(self, adapter_name: str) -> None:
        """Forgets an adapter; when no other one is active, the first of those left becomes so.

        Raises:
            InputError: there is no such adapter, or it is merged into the weights.
        """
        self.require(adapter_name)
        if any(adapter_name in layer.merged_adapters for layer in self._layers()):
            raise InputError(
                f"Cannot delete adapter(s) ['{adapter_name}'] while they are merged. "
                "Please unmerge them first."
            )
        if self.biases:
            self.biases.use(False)
            self.get_base_model().requires_grad_(False)
            self.biases = None
        if self.packed is not None:
            self.packed.remove(adapter_name)
        remove(self.get_base_model(), adapter_name)
        del self.peft_config[adapter_name]
        left = [name for name in self.active_adapters if name != adapter_name]
        if self.active_adapters and not left and self.adapters:
            left = self.adapters[:1]
            warnings.warn(f"'{adapter_name}' was active; now '{left[0]}' is", stacklevel=2)
        self.routing.route = Route(shared=tuple(left))

    def adapter_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of adapter `name`, the model's own, under the keys of PEFT's files."""
        return adapter_parameters(self.get_base_model(), name, self.peft_config[name].bias)

    # --- which are active -------------------------------------------------------------------

    @property
    def active_adapters(self) -> list[str]:
        """The names of the adapters that serve every row, unless adapters are disabled."""
        return list(self.routing.chosen.shared)

    @property
    def active_adapter(self) -> str:
        """The name of the active adapter, the first one when there are several."""
        return next(iter(self.active_adapters), "")

    @property
    def active_peft_config(self) -> LoraConfig:
        """The configuration of the active adapter."""
        return self.peft_config[self.active_adapter]

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Makes these adapters, and no others, serve every row; several are added up.

        Args:
            inference_mode: leave their weights frozen; otherwise they alone are trainable.

        Raises:
            InputError: there is no such adapter, or two of them each train the same module, or the
                same token, whole.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else [*dict.fromkeys(adapter_name)]
        for name in names:
            self.require(name)
        require_together(self.get_base_model(), names)
        if self.biases:
            self.biases.use(bool(names))
        for layer in self._layers():
            layer.unmerge()
        self.routing.route = Route(shared=tuple(names))
        self.get_base_model().requires_grad_(False)
        if not inference_mode:
            self.set_requires_grad(names)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block the model is the bare base, also when adapters are merged into it."""
        merged = {layer: list(layer.merged_adapters) for layer in self._layers() if layer.merged}
        for layer in merged:
            layer.unmerge()
        try:
            with self.routing.disabled(), self._biases_in_force(False):
                yield
        finally:
            for layer, names in merged.items():
                layer.merge(names)

    def disable_adapter_layers(self) -> None:
        """From here on the model is the bare base, until `enable_adapter_layers`."""
        for layer in self._layers():
            layer.unmerge()
        self.routing.enabled = False
        if self.biases:
            self.biases.use(False)

    def enable_adapter_layers(self) -> None:
        """Takes `disable_adapter_layers` back."""
        self.routing.enabled = True
        if self.biases:
            self.biases.use(bool(self.active_adapters))

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether an adapter serves the rows now."""
        return self.routing.enabled and bool(self.active_adapters)

    # --- which are trained ------------------------------------------------------------------

    def set_requires_grad(
        self, adapter_names: str | Iterable[str], requires_grad: bool = True
    ) -> None:
        """Makes the parameters of these adapters trainable, or freezes them."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self.require(name)
            trains_B = self.peft_config[name].init.kind.trains_B
            for key, tensor in self.adapter_tensors(name).items():
                frozen = not trains_B and ("lora_B" in key or "lora_embedding_B" in key)
                set_trainable([tensor], requires_grad and not frozen)

    def train(self, mode: bool = True) -> Self:
        """As every module's; says so when there is nothing to train."""
        if mode and not any(parameter.requires_grad for parameter in self.parameters()):
            warnings.warn(
                "no parameter of this model is trainable: load the adapter with "
                "is_trainable=True, or make it active with set_adapter",
                stacklevel=2,
            )
        return super().train(mode)

    @property
    def targeted_module_names(self) -> list[str]:
        """The paths of the modules that have adapters."""
        return [path for path, layer in self._lora_layers() if not isinstance(layer, LoraParameter)]

    @property
    def targeted_parameter_names(self) -> list[str]:
        """The paths of the parameters that have adapters of their own."""
        return [
            f"{path.replace('.base_layer', '')}.{layer.parameter_name}"
            for path, layer in self._lora_layers()
            if isinstance(layer, LoraParameter)
        ]

    def _lora_layers(self) -> Iterator[tuple[str, LoraLayer]]:
        wrapped = wrapped_modules(self.get_base_model())
        return ((path, layer) for path, layer in wrapped if isinstance(layer, LoraLayer))

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """The number of trainable parameters, and of all."""
        return count_parameters(self)

    def _layers(self) -> list[Mergeable]:
        wrapped = wrapped_modules(self.get_base_model())
        return [module for _, module in wrapped if isinstance(module, Mergeable)]

    def require(self, name: str) -> None:
        """Raises InputError when there is no adapter of this name."""
        if name not in self.peft_config:
            raise InputError(
                f"Adapter {name} does not exist{did_you_mean(name, self.adapters)}; "
                f"there are: {listed(self.adapters) or 'none'}"
            )

    def _biases_in_force(self, trained: bool) -> AbstractContextManager[None]:
        return self.biases.using(trained) if self.biases else nullcontext()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)
