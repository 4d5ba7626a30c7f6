"""What stands between a `LoraModel` and the model that it wraps."""

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
