"""What stands between a `LoraModel` and the model that it wraps."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

_OF_THE_ADAPTERS = frozenset(
    {
        "active_adapters",
        "delete_adapter",
        "disable_adapter_layers",
        "enable_adapter_layers",
        "merge_adapter",
        "merge_and_unload",
        "peft_config",
        "set_adapter",
        "targeted_module_names",
        "targeted_parameter_names",
        "unload",
        "unmerge_adapter",
    }
)


class BaseModel(nn.Module):
    """Holds the wrapped model as `.model`, which gives parameters the names PEFT's files have.

    In PEFT this place has an object of its own, with the methods that change adapters; so that
    scripts find them there, they lead to the `LoraModel`'s.
    """

    prefix = "lora_"
    """What the names of an adapter's parameters have in them (PEFT's word)."""

    def __init__(self, model: nn.Module, adapters: nn.Module) -> None:
        super().__init__()
        self.model = model
        vars(self)["_adapters"] = adapters  # not as a submodule, which would hold itself

    @property
    def active_adapter(self) -> str | list[str]:
        """The name of the active adapter, or the list of them."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns."""
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("model", "_adapters"):
                raise
            return getattr(self._adapters if name in _OF_THE_ADAPTERS else self.model, name)


class _Shown(functools.partial):
    """A bound method that shows the signature of the base model's forward to those who look."""

    @property
    def __signature__(self) -> inspect.Signature:
        (model,) = self.args
        return inspect.signature(model.get_base_model().forward)


class forward_of_base:  # noqa: N801 (a decorator)
    """A `forward` whose signature, in an instance, is that of the model that it wraps."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __get__(self, model: nn.Module | None, owner: type) -> Callable[..., Any]:
        return self.function if model is None else _Shown(self.function, model)
