"""What an adapter's trainer takes for a model, where several are trained on one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lorakit.lora.folders import save_adapter, write_card
from lorakit.lora.model import LoraModel
from lorakit.lora.routing import Route


class AdapterShare(nn.Module):
    """The parameters of one adapter, under the names and in the order that they have alone.

    So an optimiser over them, its groups, and its state in a checkpoint are those of a run that
    trains this adapter by itself.

    Args:
        whole: the model with all adapters.
        name: the adapter.
    """

    def __init__(self, whole: LoraModel, name: str) -> None:
        super().__init__()
        object.__setattr__(self, "whole", whole)  # no submodule: its parameters are not ours
        self.active_adapter = name
        own = {id(tensor) for tensor in whole.adapter_tensors(name).values()}
        for path, parameter in whole.named_parameters():
            if id(parameter) in own:
                *parents, last = ("default" if p == name else p for p in path.split("."))
                place: nn.Module = self
                for parent in parents:
                    if parent not in place._modules:
                        place.add_module(parent, nn.Module())
                    place = place._modules[parent]  # type: ignore[assignment]
                place.register_parameter(last, parameter)

    whole: LoraModel

    def get_base_model(self) -> nn.Module:
        """The base model, with all adapters beside its layers."""
        return self.whole.get_base_model()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own, with this adapter for every row."""
        with self.whole.routing.using(Route(shared=(self.active_adapter,))):
            return self.whole(*args, **kwargs)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        """The whole model's: it is asked by every adapter's trainer for the same."""
        kwargs = (
            None if gradient_checkpointing_kwargs is None else {**gradient_checkpointing_kwargs}
        )
        self.whole.gradient_checkpointing_enable(kwargs, **options)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        """The newer name of `gradient_checkpointing_enable`."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **options)

    def save_pretrained(self, save_directory: str | Path, is_main_process: bool = True) -> None:
        """Writes this adapter alone, as `LoraModel.save_pretrained` writes an only one."""
        folder = Path(save_directory)
        save_adapter(self.whole, folder, self.active_adapter, write=is_main_process)
        if is_main_process:
            write_card(folder, self.get_base_model())
