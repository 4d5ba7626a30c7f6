"""A model with adapters: what PEFT calls `PeftModel`, with its method names and module structure.

What a layer computes is in `layers/`, where layers are found in `targets.py`, how they are wrapped
in `injection.py` and `wrapping.py`, a whole model's merge in `merging.py`, files in `storage.py`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import nn

from lorakit.errors import InputError, did_you_mean, listed
from lorakit.lora import joining, storage
from lorakit.lora.base_changes import Replication, TrainedBiases, require_beside
from lorakit.lora.base_model import BaseModel, forward_of_base
from lorakit.lora.checkpoint import adapter_parameters, load_tensors
from lorakit.lora.combination import CombineSettings
from lorakit.lora.config import LoraConfig
from lorakit.lora.injection import inject
from lorakit.lora.layers import LoraLayer, LoraParameter, Mergeable
from lorakit.lora.merging import as_before, merge_and_eject, merge_layers
from lorakit.lora.packed import PackedFactors
from lorakit.lora.parameters import count_parameters, set_trainable, tied_apart, to_meta
from lorakit.lora.routing import BASE, Route, Routing, require_one_per_row
from lorakit.lora.status import TunerLayerStatus, TunerModelStatus, layer_status, model_status
from lorakit.lora.weighted import combination
from lorakit.lora.wrapping import eject, remove, require_together, wrapped_modules


class LoraModel(nn.Module):
    """Any module with LoRA adapters, by name, beside its frozen weights.

    The model is changed in place: its targeted layers are wrapped, everything else is frozen.
    Attributes that are not found here are the wrapped model's (`model.config`, `model.device`).

    Args:
        model: the base model.
        config: the first adapter's configuration; it is the adapter's own from here on. None
            begins without adapters.
        adapter_name: the first adapter's name.
        autocast_adapter_dtype: adapters are float32 where the base is float16 or bfloat16;
            otherwise they have the base's dtype.
        initialize: False leaves the adapter's values to be loaded.
        low_cpu_mem_usage: the adapter's parameters are on the meta device until they are loaded.
    """

    # transformers' Trainer trains a quantised model only where this says that it has adapters.
    _hf_peft_config_loaded = True

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
        self.biases = TrainedBiases()
        self._trainable_before = [n for n, p in model.named_parameters() if p.requires_grad]
        self.packed: PackedFactors | None = None
        self._replication = Replication.of(model, config.layer_replication if config else None)
        self.base_model = BaseModel(model, self)
        if config is None:
            model.requires_grad_(False)
        else:
            dtype, meta = autocast_adapter_dtype, low_cpu_mem_usage
            try:
                self._add(adapter_name, config, dtype, initialize, meta)
            except InputError:
                self._replication.undo()
                raise
            self.set_adapter(adapter_name)
        self.register_state_dict_post_hook(tied_apart)
        newer = "is_activation_checkpointing"
        if getattr(model, newer if hasattr(model, newer) else "is_gradient_checkpointing", False):
            self.gradient_checkpointing_enable()  # again, with what routing needs

    def get_base_model(self) -> nn.Module:
        """The wrapped model itself."""
        return self.base_model.model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    # --- files, and inference with many adapters ------------------------------------------

    save_pretrained = storage.save_pretrained
    push_to_hub = storage.push_to_hub
    from_pretrained = classmethod(storage.from_pretrained)
    load_adapter = storage.load_adapter
    pack = joining.pack
    unpack = joining.unpack
    add_packed = joining.add_packed

    # --- computing ------------------------------------------------------------------------

    @forward_of_base
    def forward(
        self,
        *args: Any,
        labels: Any = None,
        adapter_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's forward, and its signature, from which `Trainer` takes its columns.

        Args:
            adapter_names: one adapter a row of the batch, or `"__base__"` for none.
        """
        if labels is not None:  # named above because `Trainer` looks for it in the class
            kwargs["labels"] = labels
        with self._routed(adapter_names, args, kwargs):
            return self.base_model(*args, **kwargs)

    def generate(
        self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        """The base model's `generate`; `adapter_names` as in `forward`."""
        with self._routed(adapter_names, args, kwargs):
            return self.get_base_model().generate(*args, **kwargs)  # type: ignore[operator]

    @contextmanager
    def _routed(
        self, adapter_names: Sequence[str] | None, args: tuple, kwargs: dict[str, Any]
    ) -> Iterator[None]:
        if adapter_names is None:
            yield
            return
        if not adapter_names:
            raise InputError("adapter_names is empty: give one name a row")
        self.require(*set(adapter_names) - {BASE})
        if self.biases and set(adapter_names) != {*self.active_adapters}:
            raise InputError(
                "this adapter trains biases of the base itself, so that all rows have it: "
                "leave adapter_names out"
            )
        if torch.is_grad_enabled() and self.training and not self.routing.recomputes_route:
            raise InputError(
                "adapter_names cannot be trained with use_reentrant=True: leave it out"
            )
        require_one_per_row(adapter_names, args, kwargs)
        with self.routing.rows(self.get_base_model(), adapter_names):
            yield

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """The base model's; what the backward pass computes again takes its forward's route.

        With `use_reentrant=True` only inputs that need gradients give any, so that the embedding's
        output is made to; and rows cannot choose adapters in training.
        """
        kwargs = self.routing.checkpointing_options(gradient_checkpointing_kwargs or {})
        model: Any = self.get_base_model()
        if not self.routing.recomputes_route:
            self.prepare_model_for_gradient_checkpointing(model)
        newer = getattr(model, "activation_checkpointing_enable", None)
        (newer or model.gradient_checkpointing_enable)(kwargs, **options)

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> nn.Module:
        """Makes the embedding's output need gradients, for re-entrant checkpointing."""
        getattr(model, "enable_input_require_grads", lambda: None)()
        return model

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """The newer name of `gradient_checkpointing_enable`."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **options)

    # --- which adapters there are ---------------------------------------------------------

    @property
    def adapters(self) -> list[str]:
        """The names of all adapters."""
        return list(self.peft_config)

    def require(self, *names: str) -> None:
        """Raises InputError when there is no adapter of one of these names."""
        for name in names:
            if name not in self.peft_config:
                raise InputError(
                    f"Adapter {name} does not exist{did_you_mean(name, self.adapters)}; "
                    f"there are: {listed(self.adapters) or 'none'}"
                )

    def adapter_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of adapter `name`, the model's own, under the keys of PEFT's files."""
        return adapter_parameters(self.get_base_model(), name, self.peft_config[name].bias)

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: LoraConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Adds a new adapter beside the others; the active ones stay active."""
        if peft_config.layer_replication != self._replication.ranges:
            raise InputError("layer_replication must be the same for all adapters of a model")
        config = copy.deepcopy(peft_config)
        self._add(adapter_name, config, autocast_adapter_dtype, meta=low_cpu_mem_usage)

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

        It is one of their updates ΔW, whatever their ranks, scalings and target modules; weights
        may be negative. See `combination.combine` for methods; `generator` draws for DARE.

        Returns: the share of the updates' energy that truncating to `svd_rank` cost.

        Raises:
            InputError: a name or method does not exist, or these adapters cannot be combined.
        """
        self.require(*adapters)
        if not adapters or len(set(adapters)) != len(adapters) or len(adapters) != len(weights):
            raise InputError("add_weighted_adapter needs different adapters, and a weight for each")
        method = CombineSettings(
            combination_type, svd_rank, density, majority_sign_method, generator
        )
        by_name = dict(zip(adapters, weights, strict=True))
        found = combination(self.get_base_model(), self.peft_config, by_name, method)
        self._add(adapter_name, found.config, autocast=True, initialize=False)
        load_tensors(self.adapter_tensors(adapter_name), found.tensors, adapter_name)
        return found.lost_energy

    def delete_adapter(self, adapter_name: str) -> None:
        """Forgets an adapter; when no other one is active, the first of those left becomes so.

        Raises:
            InputError: there is no such adapter, or it is merged into the weights.
        """
        self.require(adapter_name)
        wrappers = joining.wrappers_of(self, adapter_name)
        if any(adapter_name in layer.merged_adapters for layer in wrappers):
            raise InputError(
                f"Cannot delete adapter(s) ['{adapter_name}'] while they are merged. "
                "Please unmerge them first."
            )
        if self.biases:
            self.biases.use(False)
            self.get_base_model().requires_grad_(False)
            self.biases = TrainedBiases()
        if self.packed is not None:
            self.packed.remove(adapter_name)
        remove(self.get_base_model(), adapter_name, wrappers)
        del self.peft_config[adapter_name]
        left = [name for name in self.active_adapters if name != adapter_name]
        if self.active_adapters and not left and self.adapters:
            left = self.adapters[:1]
            warnings.warn(f"'{adapter_name}' was active; now '{left[0]}' is", stacklevel=2)
        self.routing.route = Route(shared=tuple(left))

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

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether an adapter serves the rows now."""
        return self.routing.enabled and bool(self.active_adapters)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Makes these adapters, and no others, serve every row; several are added up.

        They alone are trainable afterwards, with `inference_mode` nothing is.

        Raises:
            InputError: there is no such adapter, or two of them each train the same module, or the
                same token, whole.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else [*dict.fromkeys(adapter_name)]
        self.require(*names)
        require_together(self.get_base_model(), names)
        self.biases.use(bool(names))
        self.unmerge_adapter()
        self.routing.route = Route(shared=tuple(names))
        self.get_base_model().requires_grad_(False)
        if not inference_mode:
            self.set_requires_grad(names)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block the model is the bare base, also when adapters are merged into it."""
        layers = self._mergeable()
        merged = {layer: list(layer.merged_adapters) for layer in layers if layer.merged}
        self.unmerge_adapter()
        try:
            with self.routing.disabled(), self.biases.using(False):
                yield
        finally:
            for layer, names in merged.items():
                layer.merge(names)

    def disable_adapter_layers(self) -> None:
        """From here on the model is the bare base, until `enable_adapter_layers`."""
        self.unmerge_adapter()
        self.routing.enabled = False
        self.biases.use(False)

    def enable_adapter_layers(self) -> None:
        """Takes `disable_adapter_layers` back."""
        self.routing.enabled = True
        self.biases.use(bool(self.active_adapters))

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

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """The number of trainable parameters, and of all."""
        return count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Prints `trainable params: … || all params: … || trainable%: …`."""
        trainable, total = self.get_nb_trainable_parameters()
        share = f"trainable%: {100 * trainable / total:.4f}"
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || {share}")

    @property
    def targeted_module_names(self) -> list[str]:
        """The paths of the modules that have adapters."""
        found = self._wrapped(LoraLayer)
        return [path for path, layer in found if not isinstance(layer, LoraParameter)]

    @property
    def targeted_parameter_names(self) -> list[str]:
        """The paths of the parameters that have adapters of their own."""
        found = self._wrapped(LoraParameter)
        return [f"{p.replace('.base_layer', '')}.{layer.parameter_name}" for p, layer in found]

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """The state of every wrapped layer."""
        return layer_status(self.base_model)

    def get_model_status(self) -> TunerModelStatus:
        """The state of all layers together."""
        types = {name: config.peft_type for name, config in self.peft_config.items()}
        return model_status(self, self.base_model, types, self.get_nb_trainable_parameters())

    def _wrapped(self, kind: Any) -> list[tuple[str, Any]]:
        found = wrapped_modules(self.get_base_model())
        return [(path, module) for path, module in found if isinstance(module, kind)]

    # --- merging --------------------------------------------------------------------------

    def _mergeable(self) -> list[Mergeable]:
        return [layer for _, layer in self._wrapped(Mergeable)]

    def merge_adapter(
        self, adapter_names: Iterable[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Adds adapters (None: the active ones) to the base weights; `unmerge_adapter` undoes it.

        The base weights as they were are kept, so undoing gives their very bytes back.
        """
        names = None if adapter_names is None else list(adapter_names)
        self.require(*names or [])
        merge_layers(self.get_base_model(), names, safe_merge)

    def unmerge_adapter(self) -> None:
        """Takes everything that was merged out of the base weights again."""
        for layer in self._mergeable():
            layer.unmerge()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Iterable[str] | None = None,
    ) -> nn.Module:
        """The plain base model with adapters (None: the active ones) added to its weights.

        With `safe_merge` weights with NaN or Inf are refused, before anything is changed;
        `progressbar` has no effect.
        """
        names = self.active_adapters if adapter_names is None else list(adapter_names)
        self.require(*names)
        plain = merge_and_eject(self.get_base_model(), names, safe_merge)
        return as_before(plain, self._trainable_before)

    def unload(self) -> nn.Module:
        """The plain base model, as it was before any adapter."""
        self.unmerge_adapter()
        self.biases.use(False)
        bare = eject(self.get_base_model())
        self._replication.undo()
        return as_before(bare, self._trainable_before)


def get_peft_model(
    model: nn.Module,
    peft_config: LoraConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> LoraModel:
    """`model` with a new adapter as `peft_config` describes it, ready for training.

    Args:
        mixed: True, for adapters of several methods, is refused.
        revision: of the base on the hub, for the adapter's configuration.
        low_cpu_mem_usage: the adapter has no values until some are loaded.
    """
    if mixed:
        raise InputError("mixed=True: lorakit has adapters of one method, LoRA: leave it out")
    config = copy.deepcopy(peft_config)
    if revision is not None:
        config.revision = revision
    options = {
        "autocast_adapter_dtype": autocast_adapter_dtype,
        "low_cpu_mem_usage": low_cpu_mem_usage,
    }
    return LoraModel(model, config, adapter_name, **options)
