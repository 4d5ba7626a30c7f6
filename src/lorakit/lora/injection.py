"""Putting wrapped layers into a model, and taking them out again.

The model's own modules are replaced in place; `eject` leaves it as it was before.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from lorakit.errors import InputError, listed
from lorakit.lora.architecture import without_wrappers
from lorakit.lora.config import LoraConfig
from lorakit.lora.layers import (
    LoraEmbedding,
    LoraLayer,
    LoraLinear,
    LoraParameter,
    LoraTiedEmbedding,
    LoraTiedHead,
    ModulesToSaveWrapper,
    TiedModule,
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
    unwrapped,
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
            if adapter_name in wrapper.adapters:
                raise InputError(f"target_parameters: {path} is adapted as a layer already")
            wrapper.add_adapter(adapter_name, config, place, autocast, initialize)
        for path, numbers in tokens.items():
            _wrap_tokens(model, path, routing).add_adapter(adapter_name, numbers)
        for path in saved:
            _wrap_saved(model, path, adapter_name, config, routing)
    except InputError:
        remove(model, adapter_name)
        raise
    return targets


class AdapterPart(NamedTuple):
    """What an adapter has beside one module.

    Attributes:
        path: of the model's own module.
        kind: of the wrapper.
        parameter: the one that is adapted, if it is a parameter.
        tied_to: the path of the embedding whose factors it shares, if it shares them.
        values: by the wrapper's attribute.
    """

    path: str
    kind: type[nn.Module]
    parameter: str
    tied_to: str
    values: dict[str, Any]


def parts_of(model: nn.Module, name: str) -> list[AdapterPart]:
    """All that adapter `name` of `model` has, for `join`."""
    places = {
        id(module): (path.replace(".base_layer", ""), module)
        for path, module in wrapped_places(model)
        if name in module.adapters
    }
    parts = []
    for path, module in places.values():
        if isinstance(module, TiedModule):
            continue  # it has nothing of its own, and is wrapped with its embedding
        values = {
            attribute: by_name[name]
            for attribute in module.by_name
            if name in (by_name := getattr(module, attribute))
        }
        parameter = module.parameter_name if isinstance(module, LoraParameter) else ""
        tied_to = ""
        if isinstance(module, LoraTiedEmbedding | LoraTiedHead):
            tied_to, _ = places[id(module._embedding[0])]
        parts.append(AdapterPart(path, type(module), parameter, tied_to, values))
    return sorted(parts, key=lambda part: bool(part.tied_to))


def join(model: nn.Module, name: str, parts: Sequence[AdapterPart], routing: Routing) -> None:
    """Adds an adapter as `name` that a model of the same structure has, with the same values.

    Nothing is looked for or initialised, and the values are not copied, so that it is quick.

    Raises:
        InputError: a module that it trains whole is, or holds, one that another adapts.
    """
    check_adapter_name(name)
    saved = [part.path for part in parts if part.kind is ModulesToSaveWrapper]
    if saved:
        _require_apart(model, saved, [part.path for part in parts], ())
    for part in parts:
        wrapper = _wrap_as(model, part, routing)
        for attribute, value in part.values.items():
            getattr(wrapper, attribute)[name] = value


def adapter_modules(model: nn.Module, name: str) -> Iterator[tuple[str, Wrapped]]:
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


def wrapped_places(model: nn.Module) -> Iterator[tuple[str, Wrapped]]:
    """All wrapped modules, each with the path that the model's own module inside it had."""
    outermost = ""
    inside: set[int] = set()
    for path, module in wrapped_modules(model):
        if id(module) not in inside:
            outermost = path
            inside = {id(wrapper) for wrapper in _chain(module)[:-1]}
        yield outermost, module


def wrapped_modules(model: nn.Module) -> Iterator[tuple[str, Wrapped]]:
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
        if isinstance(module, Wrapped):
            yield without_wrappers(name), module
            # Adapters' own modules are many, and none of them is wrapped.
            inside = {(inner := _attribute(module)): inside[inner]}
        before = f"{name}." if name else ""
        waiting += [(before + key, m) for key, m in reversed(inside.items()) if m is not None]


def require_together(model: nn.Module, names: Sequence[str]) -> None:
    """Raises InputError when one of these adapters has a module whole that another adapts too."""
    serving: dict[str, list[Wrapped]] = {}
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


def remove(model: nn.Module, adapter_name: str) -> None:
    """Takes an adapter out; a module that has no other one left is the original again."""
    wrapped = list(wrapped_modules(model))
    for _, module in wrapped:
        module.delete_adapter(adapter_name)
    _put_back_unused(model, wrapped)


def put_back_unused(model: nn.Module) -> None:
    """Puts the original modules in the place of those that have no adapter left."""
    _put_back_unused(model, list(wrapped_modules(model)))


def _put_back_unused(model: nn.Module, wrapped: Sequence[tuple[str, Wrapped]]) -> None:
    for name, module in reversed(wrapped):  # from the inside out
        if not module.adapters:
            _replace(model, name, module.original())


def eject(model: nn.Module, active: Iterable[str] = ()) -> nn.Module:
    """Puts the original modules back, or the `modules_to_save` copies of `active` adapters."""
    for name, module in reversed(list(wrapped_modules(model))):
        _replace(model, name, module.original(active))
    return model


_ORDER: tuple[Any, ...] = (
    ModulesToSaveWrapper,
    LoraParameter,
    (TrainedTokens, TiedModule),
    (LoraTiedEmbedding, LoraTiedHead),
    LoraLayer,
)
"""Wrappers of one module, from the outermost: what rows have it in place of the whole module, of
a parameter, of rows of it, and what is added to it.
"""


def _chain(module: nn.Module) -> list[Any]:
    """A module's wrappers from the outermost, and the model's own module as the last."""
    chain = [module]
    while isinstance(chain[-1], Wrapped):
        chain.append(_inner(chain[-1]))
    return chain


def _inner(module: Any) -> Any:
    saved = isinstance(module, ModulesToSaveWrapper)
    return module.original_module if saved else module.base_layer


def _rank(module: nn.Module) -> int:
    return next((i for i, kinds in enumerate(_ORDER) if isinstance(module, kinds)), len(_ORDER))


def _wrap(model: nn.Module, path: str, rank: int, make: Callable[[Any], Any]) -> Any:
    """The wrapper of `_ORDER[rank]` around the module at `path`, which is made if there is none."""
    chain = _chain(model.get_submodule(path))
    at = next(i for i, module in enumerate(chain) if _rank(module) >= rank)
    if _rank(chain[at]) == rank:
        return chain[at]
    return _insert(model, path, at, make(chain[at]))


def _insert(model: nn.Module, path: str, at: int, wrapper: Any) -> Any:
    """Puts a wrapper into the `at`th place of the chain at `path`."""
    if at:
        around = _chain(model.get_submodule(path))[at - 1]
        setattr(around, _attribute(around), wrapper)
    else:
        parent, _, last = path.rpartition(".")
        setattr(unwrapped(model.get_submodule(parent)), last, wrapper)
    return wrapper


def _attribute(module: nn.Module) -> str:
    return "original_module" if isinstance(module, ModulesToSaveWrapper) else "base_layer"


def _wrap_layer(model: nn.Module, path: str, routing: Routing) -> LoraLayer:
    chain = _chain(model.get_submodule(path))
    if len(chain) > 1 and _rank(chain[-2]) == 4:
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

    return _wrap(model, path, 4, make)


def _wrap_as(model: nn.Module, part: AdapterPart, routing: Routing) -> Wrapped:
    """The wrapper for a part of an adapter, which is made if there is none."""
    path, kind = part.path, part.kind
    if part.parameter:
        return _wrap_parameter(model, path, part.parameter, routing)
    if kind is ModulesToSaveWrapper:
        return _wrap_whole(model, path, routing)
    if kind is TrainedTokens:
        return _wrap_tokens(model, path, routing)
    if not part.tied_to:
        return _wrap_layer(model, path, routing)
    embedding = _wrap_layer(model, part.tied_to, routing)
    return _wrap(model, path, 3, partial(kind, embedding=embedding))


def _wrap_tied(model: nn.Module, path: str, name: str, config: LoraConfig) -> None:
    """Gives the modules that are tied to a wrapped embedding its adapter `name` too."""
    embedding = _chain(model.get_submodule(path))[-2]
    if not isinstance(embedding, LoraEmbedding):
        return
    for tied_path in tied_modules(model, path):
        own = unwrapped(model.get_submodule(tied_path))
        kind = LoraTiedEmbedding if isinstance(own, nn.Embedding) else LoraTiedHead
        tied = _wrap(model, tied_path, 3, partial(kind, embedding=embedding))
        tied.add_adapter(name, config, path)


def _wrap_parameter(model: nn.Module, path: str, parameter: str, routing: Routing) -> LoraLayer:
    if not path:
        raise InputError(f"target_parameters: {parameter} is the model's own: put it in a module")
    chain = _chain(model.get_submodule(path))
    for wrapper in chain:
        if isinstance(wrapper, LoraParameter) and wrapper.parameter_name == parameter:
            return wrapper
        # Others adapt this linear layer, whose weight is all that it has.
        if isinstance(wrapper, LoraLinear) and isinstance(chain[-1], nn.Linear):
            return wrapper
    at = next(i for i, module in enumerate(chain) if _rank(module) >= 1)
    return _insert(model, path, at, LoraParameter(chain[at], parameter, routing))


def _wrap_tokens(model: nn.Module, path: str, routing: Routing) -> TrainedTokens:
    tied = tied_modules(model, path)
    embedding = _wrap(model, path, 2, lambda module: TrainedTokens(module, routing))
    for one in tied:
        own = unwrapped(model.get_submodule(one))
        _wrap(model, one, 2, partial(embedding.tie, own=own))
    return embedding


def _wrap_saved(
    model: nn.Module, path: str, name: str, config: LoraConfig, routing: Routing
) -> None:
    tied = tied_modules(model, path) if config.ensure_weight_tying else []
    tied_to = None
    for one in (path, *tied):
        wrapper = _wrap_whole(model, one, routing)
        if name not in wrapper.adapters:
            wrapper.add_adapter(name, tied_to)
        tied_to = tied_to or wrapper.modules_to_save[name]


def _wrap_whole(model: nn.Module, path: str, routing: Routing) -> ModulesToSaveWrapper:
    own = unwrapped(model.get_submodule(path))
    return _wrap(model, path, 0, partial(ModulesToSaveWrapper, routing=routing, own=own))


def _require_apart(
    model: nn.Module, saved: list[str], targets: list[str], tokens: Iterable[str]
) -> None:
    """Raises InputError when a module to save would hold another wrapped module, or be in one."""
    for name in tokens:
        if name in saved or name in targets:
            raise InputError(f"trainable_token_indices: {name} is adapted as a whole already")
    wrapped = {path for path, _ in wrapped_places(model)}
    for name in saved:
        for other in {*saved, *targets, *wrapped} - {name}:
            if other.startswith(f"{name}.") or name.startswith(f"{other}."):
                raise InputError(f"modules_to_save: {name} and {other} cannot both be adapted")


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
