"""The model of transformers inside what wraps it, and what it does by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def base_model(model: nn.Module) -> Any:
    """What `model.get_base_model()` gives, or `model` itself where it wraps nothing.

    Returns: Any, since torch's modules say of every attribute that it is a tensor or a module.
    """
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model


def has_dropout(model: nn.Module) -> bool:
    """Whether anything of `model` draws dropout in training."""
    from torch.nn import Dropout

    settings: Any = base_model(model).config.get_text_config()
    rates = [module.p for module in model.modules() if isinstance(module, Dropout)]
    return any(rates) or bool(getattr(settings, "attention_dropout", None))
