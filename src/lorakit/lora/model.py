"""A model with adapters: computing with them, and merging.

`LoraModel` is what PEFT calls `PeftModel`, with its method names and its module structure
(`model.base_model.model`). Which adapters there are is in `bank.py`, what a layer computes in
`layers/`, where layers are found in `targets.py`, saving and loading in `storage.py`.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lorakit.errors import InputError
from lorakit.lora.base_model import forward_of_base
from lorakit.lora.config import LoraConfig
from lorakit.lora.merging import merge_and_eject, merge_layers
from lorakit.lora.parameters import tied_apart
from lorakit.lora.routing import BASE, require_one_per_row
from lorakit.lora.status import TunerLayerStatus, TunerModelStatus, layer_status, model_status
from lorakit.lora.storage import StoredBank
from lorakit.lora.wrapping import eject


class LoraModel(StoredBank):
    """Any module with LoRA adapters beside its frozen weights.

    The model is changed in place: its targeted layers are wrapped, everything else is frozen.
    Attributes that are not found here are the wrapped model's (`model.config`, `model.device`).

    Args:
        model: the base model.
        config: the first adapter's configuration; None begins without adapters.
        adapter_name: the first adapter's name.
        options: as in `AdapterBank`.

    Raises:
        InputError: `config` matches nothing in `model`.
    """

    # transformers' Trainer trains a quantised model only where this says that it has adapters.
    _hf_peft_config_loaded = True

    def __init__(
        self,
        model: nn.Module,
        config: LoraConfig | None,
        adapter_name: str = "default",
        **options: Any,
    ) -> None:
        super().__init__(model, config, adapter_name, **options)
        self.register_state_dict_post_hook(tied_apart)
        for newer_first in ("is_activation_checkpointing", "is_gradient_checkpointing"):
            if hasattr(model, newer_first):
                if getattr(model, newer_first):
                    self.gradient_checkpointing_enable()  # again, with what routing needs
                break

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
            labels: for the base model; named because `Trainer` looks for it in the class.
            adapter_names: one adapter a row of the batch, or `"__base__"` for none.
        """
        if labels is not None:
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
        for name in set(adapter_names) - {BASE}:
            self.require(name)
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
        enable: Any = getattr(model, "enable_input_require_grads", None)
        if enable is not None:
            enable()
        return model

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
            self.require(name)
        merge_layers(self.get_base_model(), names, safe_merge)

    def unmerge_adapter(self) -> None:
        """Takes everything that was merged out of the base weights again."""
        for layer in self._layers():
            layer.unmerge()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Iterable[str] | None = None,
    ) -> nn.Module:
        """The plain base model with adapters (None: the active ones) added to its weights.

        Args:
            progressbar: as in PEFT's function; merging is quick, and shows none.
            safe_merge: refuse, before anything is changed, weights that are not finite.
        """
        names = self.active_adapters if adapter_names is None else list(adapter_names)
        for name in names:
            self.require(name)
        return self._as_before(merge_and_eject(self.get_base_model(), names, safe_merge))

    def unload(self) -> nn.Module:
        """The plain base model, as it was before any adapter."""
        self.unmerge_adapter()
        if self.biases:
            self.biases.use(False)
        bare = eject(self.get_base_model())
        self._replication.undo()
        return self._as_before(bare)

    def _as_before(self, model: nn.Module) -> nn.Module:
        """The plain model, with those parameters trainable that were before any adapter."""
        before = set(self._trainable_before)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in before)
        return model

    # --- looking at it --------------------------------------------------------------------

    def print_trainable_parameters(self) -> None:
        """Prints `trainable params: … || all params: … || trainable%: …`."""
        trainable, total = self.get_nb_trainable_parameters()
        sys.stdout.write(
            f"trainable params: {trainable:,d} || all params: {total:,d} || "
            f"trainable%: {100 * trainable / total:.4f}\n"
        )

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """The state of every wrapped layer."""
        return layer_status(self.base_model)

    def get_model_status(self) -> TunerModelStatus:
        """The state of all layers together."""
        types = {name: config.peft_type for name, config in self.peft_config.items()}
        counted = self.get_nb_trainable_parameters()
        return model_status(self, self.base_model, types, counted)


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
        autocast_adapter_dtype: as in `AdapterBank`.
        revision: of the base on the hub, for the adapter's configuration.
        low_cpu_mem_usage: the adapter has no values until some are loaded.
    """
    if mixed:
        raise InputError("mixed=True: lorakit has adapters of one method, LoRA: leave it out")
    config = copy.deepcopy(peft_config)
    if revision is not None:
        config.revision = revision
    return LoraModel(
        model,
        config,
        adapter_name,
        autocast_adapter_dtype=autocast_adapter_dtype,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )
