"""A model with adapters: adding, choosing, leaving out, merging, saving and loading them.

`LoraModel` is what PEFT calls `PeftModel`, with its method names and its module structure
(`model.base_model.model`). What a layer computes is in `layers/`, where layers are found in
`targets.py`, what a folder holds in `checkpoint.py`.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from lorakit.errors import InputError, did_you_mean, listed
from lorakit.lora.base_model import BaseModel
from lorakit.lora.biases import TrainedBiases
from lorakit.lora.checkpoint import (
    adapter_parameters,
    load_tensors,
    read_adapter,
    without_base_copies,
    write_adapter,
)
from lorakit.lora.combine import Settings
from lorakit.lora.config import LoraConfig
from lorakit.lora.injection import eject, inject, remove, wrapped_modules
from lorakit.lora.layers import Mergeable
from lorakit.lora.merging import merge_and_eject, merge_layers
from lorakit.lora.routing import BASE, Route, Routing, require_one_per_row
from lorakit.lora.targets import PRESETS, suffixes_for
from lorakit.lora.weighted import combination


class LoraModel(nn.Module):
    """Any module with LoRA adapters beside its frozen weights.

    The model is changed in place: its targeted layers are wrapped, everything else is frozen.
    Attributes that are not found here are the wrapped model's (`model.config`, `model.generate`).

    Args:
        model: the base model.
        config: the first adapter's configuration.
        adapter_name: the first adapter's name.

    Raises:
        InputError: `config` matches nothing in `model`.
    """

    def __init__(self, model: nn.Module, config: LoraConfig, adapter_name: str = "default") -> None:
        super().__init__()
        if any(True for _ in wrapped_modules(model)):
            raise InputError(
                "this model has adapters already: use add_adapter, or unload() it first"
            )
        self.routing = Routing()
        self.peft_config: dict[str, LoraConfig] = {}
        self.biases: TrainedBiases | None = None
        self.base_model = BaseModel(model)
        self.add_adapter(adapter_name, config)
        self.set_adapter(adapter_name)
        for newer_first in ("is_activation_checkpointing", "is_gradient_checkpointing"):
            if hasattr(model, newer_first):
                if getattr(model, newer_first):
                    self.gradient_checkpointing_enable()  # again, with what routing needs
                break

    # --- the bank of adapters -------------------------------------------------------------

    @property
    def adapters(self) -> list[str]:
        """The names of all adapters."""
        return list(self.peft_config)

    @property
    def active_adapters(self) -> list[str]:
        """The names of the adapters that serve every row now; empty is the base alone."""
        return list(self.routing.route.shared)

    @property
    def active_adapter(self) -> str:
        """The name of the active adapter, the first one when there are several."""
        return next(iter(self.active_adapters), "")

    def add_adapter(self, adapter_name: str, config: LoraConfig) -> None:
        """Adds a new adapter beside the others; the active ones stay active.

        A preset in `target_modules` is replaced by the module names that it stands for here, so
        that the saved configuration means the same to readers that know no presets.
        """
        if adapter_name in self.peft_config:
            raise InputError(f"there is an adapter '{adapter_name}' already")
        if self.biases or (self.adapters and config.bias != "none"):
            raise InputError(
                "an adapter with bias='all' or 'lora_only' trains the base itself and cannot "
                "stand beside others: set bias='none' for all of them"
            )
        model = self.get_base_model()
        config = copy.deepcopy(config)
        found = inject(model, config, adapter_name, self.routing)
        if config.target_modules is None or config.target_modules in PRESETS:
            config.target_modules = suffixes_for(found, model)
        if config.base_model_name_or_path is None:
            name = getattr(getattr(model, "config", None), "_name_or_path", None)
            config.base_model_name_or_path = name or None
        self.peft_config[adapter_name] = config
        own = adapter_parameters(model, adapter_name)
        _set_trainable(own.values(), False)  # until it is active
        if config.bias != "none":
            with_biases = adapter_parameters(model, adapter_name, config.bias)
            self.biases = TrainedBiases(b for key, b in with_biases.items() if key not in own)

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
            self._require(name)
        if not adapters or len(set(adapters)) != len(adapters) or len(adapters) != len(weights):
            raise InputError("add_weighted_adapter needs different adapters, and a weight for each")
        settings = Settings(combination_type, svd_rank, density, majority_sign_method, generator)
        by_name = dict(zip(adapters, weights, strict=True))
        found = combination(self.get_base_model(), self.peft_config, by_name, settings)
        self.add_adapter(adapter_name, found.config)
        load_tensors(self._tensors(adapter_name), found.tensors, adapter_name)
        return found.lost_energy

    def delete_adapter(self, adapter_name: str) -> None:
        """Forgets an adapter; when it was active the others of the active ones stay."""
        self._require(adapter_name)
        if self.biases:
            self.biases.use(False)
            self._set_requires_grad([])
            self.biases = None
        remove(self.get_base_model(), adapter_name)
        del self.peft_config[adapter_name]
        left = [name for name in self.active_adapters if name != adapter_name]
        self.routing.route = Route(shared=tuple(left))

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Makes these adapters, and no others, serve every row; several are added up.

        Args:
            inference_mode: leave their weights frozen; otherwise they alone are trainable.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else [*dict.fromkeys(adapter_name)]
        for name in names:
            self._require(name)
        if self.biases:
            self.biases.use(bool(names))
        if any(layer.merged for layer in self._layers()):
            self.unmerge_adapter()
        self.routing.route = Route(shared=tuple(names))
        self._set_requires_grad([] if inference_mode else names)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block the model is the bare base, also when adapters are merged into it."""
        merged = {layer: list(layer.merged_adapters) for layer in self._layers() if layer.merged}
        for layer in merged:
            layer.unmerge()
        try:
            with self.routing.using(Route()), self._biases_in_force(False):
                yield
        finally:
            for layer, names in merged.items():
                layer.merge(names)

    # --- computing ------------------------------------------------------------------------

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The base model's forward; `adapter_names` gives one adapter a row, or `"__base__"`."""
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
        for name in set(adapter_names) - {BASE}:
            self._require(name)
        if self.biases and set(adapter_names) != {*self.active_adapters}:
            raise InputError(
                "this adapter trains biases of the base itself, so that all rows have it: "
                "leave adapter_names out"
            )
        require_one_per_row(adapter_names, args, kwargs)
        with self.routing.using(Route(rows=tuple(adapter_names))):
            yield

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """The base model's; what the backward pass computes again takes its forward's route.

        Raises:
            InputError: with `use_reentrant`, which knows no routes and, where the embedding is
                frozen, gives no gradients.
        """
        kwargs = self.routing.checkpointing_options(gradient_checkpointing_kwargs or {})
        model: Any = self.get_base_model()
        newer = getattr(model, "activation_checkpointing_enable", None)
        (newer or model.gradient_checkpointing_enable)(kwargs, **options)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """The newer name of `gradient_checkpointing_enable`."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **options)

    # --- merging --------------------------------------------------------------------------

    def merge_adapter(
        self, adapter_names: Iterable[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Adds adapters (None: the active ones) to the base weights; `unmerge_adapter` undoes it.

        The base weights as they were are kept, so undoing gives their very bytes back.
        """
        names = None if adapter_names is None else list(adapter_names)
        for name in names or []:
            self._require(name)
        merge_layers(self.get_base_model(), names, safe_merge)

    def unmerge_adapter(self) -> None:
        """Takes everything that was merged out of the base weights again."""
        for layer in self._layers():
            layer.unmerge()

    def merge_and_unload(
        self, safe_merge: bool = False, adapter_names: Iterable[str] | None = None
    ) -> nn.Module:
        """The plain base model with adapters (None: the active ones) added to its weights."""
        names = self.active_adapters if adapter_names is None else list(adapter_names)
        for name in names:
            self._require(name)
        return merge_and_eject(self.get_base_model(), names, safe_merge)

    def unload(self) -> nn.Module:
        """The plain base model, as it was before any adapter."""
        self.unmerge_adapter()
        if self.biases:
            self.biases.use(False)
        return eject(self.get_base_model())

    # --- files ----------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | Path,
        selected_adapters: Sequence[str] | None = None,
        **_ignored_by_peft_too: Any,
    ) -> None:
        """Writes each adapter as PEFT does: `default` into the folder, others into subfolders."""
        for name in selected_adapters or self.adapters:
            self._require(name)
            folder = Path(save_directory) if name == "default" else Path(save_directory) / name
            config = self.peft_config[name]
            with self._biases_in_force(True):
                write_adapter(folder, config, self._tensors(name))

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
    ) -> Self:
        """`model` with the adapter in the folder `model_id`.

        Args:
            is_trainable: whether to go on training it; otherwise everything is frozen.

        Raises:
            InputError: the folder holds no adapter, a damaged one, or one for another model.
        """
        config, tensors = read_adapter(model_id)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        wrapped = cls(model, config, adapter_name)
        try:
            wrapped._fill(adapter_name, tensors, model_id)
        except InputError:
            wrapped.unload()
            for parameter in trainable:
                parameter.requires_grad_(True)
            raise
        wrapped.set_adapter(adapter_name, inference_mode=not is_trainable)
        return wrapped

    def load_adapter(
        self, model_id: str | Path, adapter_name: str, is_trainable: bool = False
    ) -> None:
        """Adds the adapter in the folder `model_id` beside the others, without activating it."""
        config, tensors = read_adapter(model_id)
        self.add_adapter(adapter_name, config)
        try:
            self._fill(adapter_name, tensors, model_id)
        except InputError:
            self.delete_adapter(adapter_name)
            raise
        if self.biases:
            self.biases.use(bool(self.active_adapters))
        if is_trainable:
            self._train(adapter_name)

    def _fill(self, name: str, tensors: dict[str, Any], folder: str | Path) -> None:
        tensors = without_base_copies(self.get_base_model(), tensors, folder)
        load_tensors(self._tensors(name), tensors, folder)

    def _tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of adapter `name` in the model, under PEFT's keys."""
        return adapter_parameters(self.get_base_model(), name, self.peft_config[name].bias)

    # --- looking at it --------------------------------------------------------------------

    def get_base_model(self) -> nn.Module:
        """The wrapped model itself."""
        return self.base_model.model

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """The number of trainable parameters, and of all."""
        backups = "._before_merge."
        sizes = [
            (p.numel(), p.requires_grad)
            for name, p in self.named_parameters()
            if backups not in name
        ]
        return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)

    def print_trainable_parameters(self) -> None:
        """Prints `trainable params: … || all params: … || trainable%: …`."""
        trainable, total = self.get_nb_trainable_parameters()
        sys.stdout.write(
            f"trainable params: {trainable:,d} || all params: {total:,d} || "
            f"trainable%: {100 * trainable / total:.4f}\n"
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    def _layers(self) -> list[Mergeable]:
        wrapped = wrapped_modules(self.get_base_model())
        return [module for _, module in wrapped if isinstance(module, Mergeable)]

    def _require(self, name: str) -> None:
        if name not in self.peft_config:
            raise InputError(
                f"there is no adapter '{name}'{did_you_mean(name, self.adapters)}; "
                f"there are: {listed(self.adapters) or 'none'}"
            )

    def _biases_in_force(self, trained: bool) -> AbstractContextManager[None]:
        return self.biases.using(trained) if self.biases else nullcontext()

    def _set_requires_grad(self, trained: list[str]) -> None:
        """Makes the parameters of the adapters `trained` trainable, and no others."""
        self.get_base_model().requires_grad_(False)
        for name in trained:
            self._train(name)

    def _train(self, name: str) -> None:
        _set_trainable(self._tensors(name).values(), True)


def _set_trainable(tensors: Iterable[torch.Tensor], trainable: bool) -> None:
    for tensor in tensors:
        if isinstance(tensor, nn.Parameter):  # not a saved module's buffer, nor a tied view
            tensor.requires_grad_(trainable)


def get_peft_model(
    model: nn.Module, peft_config: LoraConfig, adapter_name: str = "default"
) -> LoraModel:
    """`model` with a new adapter as `peft_config` describes it, ready for training."""
    return LoraModel(model, peft_config, adapter_name)
