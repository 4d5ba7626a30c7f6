"""Putting wrapped layers into a model, and taking them out again.

The model's own modules are replaced in place; `eject` leaves it as it was before.
"""

from collections.abc import Iterator

from torch import nn

from lorakit.errors import InputError
from lorakit.lora.config import LoraConfig
from lorakit.lora.layers import LoraLayer, layer_class
from lorakit.lora.layers.saved import ModulesToSaveWrapper
from lorakit.lora.routing import BASE, Routing
from lorakit.lora.targets import resolve_modules_to_save, resolve_targets

Wrapped = LoraLayer | ModulesToSaveWrapper


def inject(model: nn.Module, config: LoraConfig, adapter_name: str, routing: Routing) -> list[str]:
    """Adds adapter `adapter_name` to every module that `config` targets, wrapping it if need be.

    All targets are resolved before anything is changed, so an error leaves the model as it was.

    Returns: the paths of the adapted modules.
    """
    check_adapter_name(adapter_name)
    targets = resolve_targets(model, config)
    saved = resolve_modules_to_save(model, config)
    _require_apart(model, saved)
    for name in targets:
        module = model.get_submodule(name)
        if not isinstance(module, LoraLayer):
            kind = layer_class(module)
            assert kind is not None  # resolve_targets refuses the rest
            module = kind.from_base(module, config, routing)
            module.training = module.base_layer.training
            if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.TransformerEncoderLayer):
                module.register_forward_pre_hook(_called)
            _replace(model, name, module)
        module.add_adapter(adapter_name, config, name)
    for name in saved:
        module = model.get_submodule(name)
        if not isinstance(module, ModulesToSaveWrapper):
            module = ModulesToSaveWrapper(module, routing)
            _replace(model, name, module)
        module.add_adapter(adapter_name)
    return targets


def wrapped_modules(model: nn.Module) -> Iterator[tuple[str, Wrapped]]:
    """All wrapped modules of `model`, with the paths that they had before they were wrapped."""
    for name, module in model.named_modules():
        if isinstance(module, Wrapped):
            yield name, module


def remove(model: nn.Module, adapter_name: str) -> None:
    """Takes an adapter out; a module that has no other one left is the original again."""
    for name, module in list(wrapped_modules(model)):
        module.delete_adapter(adapter_name)
        if isinstance(module, LoraLayer) and not module.r:
            _replace(model, name, module.base_layer)
        elif isinstance(module, ModulesToSaveWrapper) and not module.modules_to_save:
            _replace(model, name, module.original_module)


def eject(model: nn.Module, active: tuple[str, ...] = ()) -> nn.Module:
    """Puts the original modules back; with `active`, their `modules_to_save` copies stay instead.

    Returns: the model, or its replacement when the model itself was one wrapped module.
    """
    for name, module in list(wrapped_modules(model)):
        original = module.base_layer if isinstance(module, LoraLayer) else module.chosen(active)
        _replace(model, name, original)
    return model


def _require_apart(model: nn.Module, saved: list[str]) -> None:
    """Raises InputError when a module to save would hold another wrapped module, or be in one."""
    wrapped = [name for name, m in wrapped_modules(model) if name not in saved]
    layers = [name for name, m in wrapped_modules(model) if isinstance(m, LoraLayer)]
    for name in saved:
        for other in {*saved, *wrapped} - {name}:
            if other.startswith(f"{name}.") or name.startswith(f"{other}."):
                raise InputError(f"modules_to_save: {name} and {other} cannot both be adapted")
        if name in layers:
            raise InputError(f"modules_to_save: {name} has the LoRA weights of another adapter")


def _called(module: nn.Module, args: tuple) -> None:
    """A hook that does nothing: with one, PyTorch's encoder layer calls its linear layers.

    Without, its fast path reads their weights alone, and adapters would be left out in silence.
    """


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def check_adapter_name(name: str) -> None:
    """Raises InputError for a name that cannot be a key of the banks."""
    if not name or "." in name or "/" in name or name == BASE:
        raise InputError(f"{name!r} cannot be an adapter's name: use letters, digits, '-' and '_'")
    if hasattr(nn.ModuleDict(), name) or hasattr(nn.ParameterDict(), name):
        raise InputError(f"{name!r} cannot be an adapter's name: PyTorch uses that word itself")
