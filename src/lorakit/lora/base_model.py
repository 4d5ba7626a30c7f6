"""What stands between a `LoraModel` and the model that it wraps."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn


class BaseModel(nn.Module):
    """Holds the wrapped model as `.model`, which gives parameters the names PEFT's files have."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns."""
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)


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
