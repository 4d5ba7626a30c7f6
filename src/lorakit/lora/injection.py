"""Putting wrapped layers into a model, and taking them out again.

The model's own modules are replaced in place; `eject` leaves it as it was before.
"""

from collections.abc import Iterable, Iterator

from torch import nn

from lorakit.errors import InputError
from lorakit.lora.architecture import without_wrappers
from lorakit.lora.config import LoraConfig
from lorakit.lora.layers import (
    LoraEmbedding,
    LoraLayer,
    LoraParameter,
    LoraTiedEmbedding,
    LoraTiedHead,
    ModulesToSaveWrapper,
    TrainedTokens,
    Wrapped,
    layer_class,
)
from lorakit.lora.routing import BASE, Routing
from lorakit.lora.targets import (
    resolve_modules_to_save,
    resolve_parameters,
    resolve_targets,
    resolve_tokens,
    tied_embedding,
    tied_modules,
    warn_of_ties,
    warn_of_unused,
)


def inject(
    model: nn.Module,
    config: LoraConfig,
    adapter_name: str,
    routing: Routing,
    autocast: bool = True,
    initialize: bool = True,
) -> list[str]:
    """Adds adapter `adapter_name` to every module that `config` targets, wrapping it if need be.

    An error leaves the model as it was.

    Args:
        autocast, initialize: as in `LoraLayer.add_adapter`.

    Returns: the paths of the modules that `target_modules` means.
    """
    check_adapter_name(adapter_name)
    targets = resolve_targets(model, config)
    parameters = resolve_parameters(model, config)
    tokens = resolve_tokens(model, config)
    saved = resolve_modules_to_save(model, config)
    _require_apart(model, saved, targets, tokens)
    warn_of_ties(model, config, [*targets, *saved])
    warn_of_unused(config, [*targets, *(".".join(pair) for pair in parameters)])
    try:
        for target in targets:
            path = tied_embedding(model, target) if config.ensure_weight_tying else target
            layer = _wrap_layer(model, path, routing)
            if adapter_name in layer.adapters:
                continue  # as tied to an earlier one
            layer.add_adapter(adapter_name, config, path, autocast, initialize)
            if config.ensure_weight_tying:
                _wrap_tied(model, path, adapter_name, config)
        for path, parameter in parameters:
            wrapper = _wrap_parameter(model, path, parameter, routing)
            place = f"{path}.{parameter}"
            wrapper.add_adapter(adapter_name, config, place, autocast, initialize)
        for path, numbers in tokens.items():
            _wrap_tokens(model, path, routing).add_adapter(adapter_name, numbers)
        for path in saved:
            _wrap_saved(model, path, adapter_name, config, routing)
    except InputError:
        remove(model, adapter_name)
        raise
    return targets


def wrapped_modules(model: nn.Module) -> Iterator[tuple[str, Wrapped]]:
    """All wrapped modules of `model`, with the paths that they had before they were wrapped.

    A module inside another wrapped one has `base_layer` in its path, as in PEFT's files; the
    wrappers of FSDP and `torch.compile` are left out.
    """
    for name, module in model.named_modules():
        if isinstance(module, Wrapped):
            yield without_wrappers(name), module


def remove(model: nn.Module, adapter_name: str) -> None:
    """Takes an adapter out; a module that has no other one left is the original again."""
    for _, module in wrapped_modules(model):
        module.delete_adapter(adapter_name)
    put_back_unused(model)


def put_back_unused(model: nn.Module) -> None:
    """Puts the original modules in the place of those that have no adapter left."""
    for name, module in reversed(list(wrapped_modules(model))):  # from the inside out
        if not module.adapters:
            _replace(model, name, module.original())


def eject(model: nn.Module, active: Iterable[str] = ()) -> nn.Module:
    """Puts the original modules back, or the `modules_to_save` copies of `active` adapters."""
    for name, module in reversed(list(wrapped_modules(model))):
        _replace(model, name, module.original(active))
    return model


def _wrap_layer(model: nn.Module, path: str, routing: Routing) -> LoraLayer:
    module = model.get_submodule(path)
    if isinstance(module, LoraLayer):
        return module
    kind = layer_class(module)
    assert kind is not None  # resolve_targets refuses the rest
    layer = kind.from_base(module, routing)
    if isinstance(model.get_submodule(path.rpartition(".")[0]), nn.TransformerEncoderLayer):
        layer.register_forward_pre_hook(_called)
    _replace(model, path, layer)
    return layer


def _wrap_tied(model: nn.Module, path: str, name: str, config: LoraConfig) -> None:
    """Gives the modules that are tied to a wrapped embedding its adapter `name` too."""
    embedding = model.get_submodule(path)
    if not isinstance(embedding, LoraEmbedding):
        return
    for tied_path in tied_modules(model, path):
        tied = model.get_submodule(tied_path)
        if not isinstance(tied, (LoraTiedEmbedding, LoraTiedHead)):
            kind = LoraTiedEmbedding if isinstance(tied, nn.Embedding) else LoraTiedHead
            tied = kind(tied, embedding)
            _replace(model, tied_path, tied)
        tied.add_adapter(name, config, path)


def _wrap_parameter(model: nn.Module, path: str, parameter: str, routing: Routing) -> LoraParameter:
    if not path:
        raise InputError(f"target_parameters: {parameter} is the model's own: put it in a module")
    module = model.get_submodule(path)
    for wrapper in module.wrappers if isinstance(module, LoraParameter) else []:
        if wrapper.parameter_name == parameter:
            return wrapper
    wrapper = LoraParameter(module, parameter, routing)
    _replace(model, path, wrapper)
    return wrapper


def _wrap_tokens(model: nn.Module, path: str, routing: Routing) -> TrainedTokens:
    module = model.get_submodule(path)
    if isinstance(module, TrainedTokens):
        return module
    tied = tied_modules(model, path)
    embedding = TrainedTokens(module, routing)
    _replace(model, path, embedding)
    for one in tied:
        _replace(model, one, embedding.tie(model.get_submodule(one)))
    return embedding


def _wrap_saved(
    model: nn.Module, path: str, name: str, config: LoraConfig, routing: Routing
) -> None:
    tied = tied_modules(model, path) if config.ensure_weight_tying else []
    tied_to = None
    for one in (path, *tied):
        module = model.get_submodule(one)
        if not isinstance(module, ModulesToSaveWrapper):
            module = ModulesToSaveWrapper(module, routing)
            _replace(model, one, module)
        if name not in module.adapters:
            module.add_adapter(name, tied_to)
        tied_to = tied_to or module.modules_to_save[name]


def _require_apart(
    model: nn.Module, saved: list[str], targets: list[str], tokens: Iterable[str]
) -> None:
    """Raises InputError when a module to save would hold another wrapped module, or be in one."""
    for name in tokens:
        if name in saved or name in targets or isinstance(model.get_submodule(name), LoraLayer):
            raise InputError(f"trainable_token_indices: {name} is adapted as a whole already")
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
