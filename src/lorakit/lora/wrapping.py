"""The wrappers in a model: finding them, putting them around modules, taking them out again.

The model's own modules are replaced in place. Around one module may stand several wrappers, always
in the order of their `nesting`. Which modules an adapter needs is `injection.py`'s to say.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import nn

from lorakit.errors import InputError, listed
from lorakit.lora.architecture import without_wrappers
from lorakit.lora.layers import (
    LoraLayer,
    LoraLinear,
    LoraParameter,
    ModulesToSaveWrapper,
    TrainedHead,
    TrainedTokens,
    WrappedModule,
    layer_class,
    unwrapped,
)
from lorakit.lora.routing import BASE, Routing
from lorakit.lora.targets import tied_modules


def wrapped_modules(model: nn.Module) -> Iterator[tuple[str, WrappedModule]]:
    """All wrapped modules of `model`, with the paths that they had before they were wrapped.

    A module inside another wrapped one has `base_layer` in its path, as in PEFT's files; the
    wrappers of FSDP and `torch.compile` are left out.
    """
    seen: set[int] = set()
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    while waiting:
        name, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        inside: dict[str, nn.Module | None] = module._modules
        if isinstance(module, WrappedModule):
            yield without_wrappers(name), module
            # Adapters' own modules are many, and none of them is wrapped.
            inside = {module.inner_name: module.inner}
        before = f"{name}." if name else ""
        waiting += [(before + key, m) for key, m in reversed(inside.items()) if m is not None]


def wrapped_places(model: nn.Module) -> Iterator[tuple[str, WrappedModule]]:
    """All wrapped modules, each with the path that the model's own module inside it had."""
    outermost = ""
    inside: set[int] = set()
    for path, module in wrapped_modules(model):
        if id(module) not in inside:
            outermost = path
            inside = {id(wrapper) for wrapper in chain_of(module)[:-1]}
        yield outermost, module


def adapter_modules(model: nn.Module, name: str) -> Iterator[tuple[str, WrappedModule]]:
    """The wrapped modules that have adapter `name`, with the paths that PEFT's files have.

    They are those that the modules have where the adapter is alone: around one module may be
    wrappers of other adapters, and a module's parameters are wrapped in the order of its own.
    """
    parameters: dict[str, list[LoraParameter]] = {}
    for path, module in wrapped_places(model):
        if name not in module.adapters:
            continue
        if isinstance(module, LoraParameter):
            parameters.setdefault(path, []).append(module)
        else:
            yield path, module
    for path, wrappers in parameters.items():
        order = [key for key, _ in unwrapped(wrappers[0]).named_parameters(recurse=False)]
        wrappers.sort(key=lambda wrapper: order.index(wrapper.parameter_name), reverse=True)
        for depth, wrapper in enumerate(wrappers):  # the first parameter is the innermost
            yield path + ".base_layer" * depth, wrapper


# --- what cannot be in one model, or serve one row ------------------------------------------


def check_adapter_name(name: str) -> None:
    """Raises InputError for a name that cannot be a key of the layers' dictionaries."""
    if not name or "." in name or "/" in name or name == BASE:
        raise InputError(f"{name!r} cannot be an adapter's name: use letters, digits, '-' and '_'")
    if hasattr(nn.ModuleDict(), name) or hasattr(nn.ParameterDict(), name):
        raise InputError(f"{name!r} cannot be an adapter's name: PyTorch uses that word itself")


def require_together(model: nn.Module, names: Sequence[str]) -> None:
    """Raises InputError when one of these adapters has a module whole that another adapts too."""
    serving: dict[str, list[WrappedModule]] = {}
    for path, module in wrapped_places(model):
        module.require_together(names)
        if not set(names).isdisjoint(module.adapters):
            serving.setdefault(path, []).append(module)
    for path, wrappers in serving.items():
        whole = any(isinstance(w, ModulesToSaveWrapper | TrainedTokens) for w in wrappers)
        if whole and len(wrappers) > 1:
            raise InputError(
                f"{listed(names)} train {path} itself and what is added to it: run adapters one "
                "at a time"
            )


def require_apart(
    model: nn.Module, saved: Sequence[str], targets: Sequence[str], tokens: Iterable[str] = ()
) -> None:
    """Raises InputError when a module to save would hold another wrapped module, or be in one."""
    for name in tokens:
        if name in saved or name in targets:
            raise InputError(f"trainable_token_indices: {name} is adapted as a whole already")
    if not saved:
        return
    wrapped = {path for path, _ in wrapped_places(model)}
    for name in saved:
        for other in {*saved, *targets, *wrapped} - {name}:
            if other.startswith(f"{name}.") or name.startswith(f"{other}."):
                raise InputError(f"modules_to_save: {name} and {other} cannot both be adapted")


# --- taking out -----------------------------------------------------------------------------


def remove(
    model: nn.Module, adapter_name: str, wrappers: Sequence[WrappedModule] | None = None
) -> None:
    """Takes an adapter out; a module that has no other one left is the original again.

    Args:
        wrappers: those that have it, where they are known.
    """
    if wrappers is None:
        wrappers = [module for _, module in wrapped_modules(model)]
    for module in wrappers:
        module.delete_adapter(adapter_name)
    if not all(module.adapters for module in wrappers):
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


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


# --- putting in -----------------------------------------------------------------------------


def chain_of(module: nn.Module) -> list[Any]:
    """A module's wrappers from the outermost, and the model's own module as the last."""
    chain = [module]
    while isinstance(chain[-1], WrappedModule):
        chain.append(chain[-1].inner)
    return chain


def wrap(model: nn.Module, path: str, nesting: int, make: Callable[[Any], Any]) -> Any:
    """The wrapper with this `nesting` around the module at `path`, made if there is none."""
    chain = chain_of(model.get_submodule(path))
    at = next(i for i, module in enumerate(chain) if _nesting(module) >= nesting)
    if _nesting(chain[at]) == nesting:
        return chain[at]
    return _insert(model, path, at, make(chain[at]))


def wrap_layer(model: nn.Module, path: str, routing: Routing) -> LoraLayer:
    """The layer with low-rank adapters at `path`."""
    chain = chain_of(model.get_submodule(path))
    if len(chain) > 1 and _nesting(chain[-2]) == LoraLayer.nesting:
        return chain[-2]
    kind = layer_class(chain[-1])
    assert kind is not None  # resolve_targets refuses the rest
    for at, wrapper in enumerate(chain):
        if isinstance(wrapper, LoraParameter) and isinstance(chain[-1], nn.Linear):
            return _insert(model, path, at, wrapper.as_layer())

    def make(module: nn.Module) -> LoraLayer:
        layer = kind.from_base(module, routing)
        if isinstance(model.get_submodule(path.rpartition(".")[0]), nn.TransformerEncoderLayer):
            layer.register_forward_pre_hook(_called)
        return layer

    return wrap(model, path, LoraLayer.nesting, make)


def wrap_parameter(model: nn.Module, path: str, parameter: str, routing: Routing) -> LoraLayer:
    """The wrapper of the module at `path` for one of its parameters."""
    if not path:
        raise InputError(f"target_parameters: {parameter} is the model's own: put it in a module")
    chain = chain_of(model.get_submodule(path))
    for wrapper in chain:
        if isinstance(wrapper, LoraParameter) and wrapper.parameter_name == parameter:
            return wrapper
        # Others adapt this linear layer, whose weight is all that it has.
        if isinstance(wrapper, LoraLinear) and isinstance(chain[-1], nn.Linear):
            return wrapper
    at = next(i for i, module in enumerate(chain) if _nesting(module) >= LoraParameter.nesting)
    return _insert(model, path, at, LoraParameter(chain[at], parameter, routing))


def wrap_tokens(model: nn.Module, path: str, routing: Routing) -> TrainedTokens:
    """The embedding or head at `path` for trained rows; what is tied to it follows it."""
    tied = tied_modules(model, path)
    is_head = isinstance(unwrapped(model.get_submodule(path)), nn.Linear)
    kind = TrainedHead if is_head else TrainedTokens
    embedding = wrap(model, path, TrainedTokens.nesting, partial(kind, routing=routing))
    for one in tied:
        wrap(model, one, TrainedTokens.nesting, embedding.tie)
    return embedding


def wrap_whole(model: nn.Module, path: str, routing: Routing) -> ModulesToSaveWrapper:
    """The wrapper of the module at `path` for copies of it."""
    make = partial(ModulesToSaveWrapper, routing=routing)
    return wrap(model, path, ModulesToSaveWrapper.nesting, make)


def _nesting(module: nn.Module) -> int:
    return module.nesting if isinstance(module, WrappedModule) else LoraLayer.nesting + 1


def _insert(model: nn.Module, path: str, at: int, wrapper: Any) -> Any:
    """Puts a wrapper into the `at`th place of the chain at `path`."""
    if at:
        around = chain_of(model.get_submodule(path))[at - 1]
        setattr(around, around.inner_name, wrapper)
    else:
        parent, _, last = path.rpartition(".")
        setattr(unwrapped(model.get_submodule(parent)), last, wrapper)
    return wrapper


def _called(module: nn.Module, args: tuple) -> None:
    """A hook that does nothing: with one, PyTorch's encoder layer calls its linear layers.

    Without, its fast path reads their weights alone, and adapters would be left out in silence.
    """
