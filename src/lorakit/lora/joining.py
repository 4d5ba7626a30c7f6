"""An adapter as parts, which one model gives away and another of the same structure takes over.

Nothing is looked for or initialised, and values are not copied, so that it is quick. A `LoraModel`
that serves many adapters takes them so; `packed.py` then lays out their factors.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeGuard

from torch import nn

from lorakit.lora.base_changes import require_beside
from lorakit.lora.config import LoraConfig
from lorakit.lora.layers import (
    LoraLayer,
    LoraLinear,
    LoraParameter,
    LoraQuantizedLinear,
    LoraTiedEmbedding,
    LoraTiedHead,
    ModulesToSaveWrapper,
    TiedModule,
    TrainedTokens,
    WrappedModule,
)
from lorakit.lora.packed import PackedFactors
from lorakit.lora.routing import Routing
from lorakit.lora.wrapping import (
    check_adapter_name,
    remove,
    require_apart,
    wrap,
    wrap_layer,
    wrap_parameter,
    wrap_tokens,
    wrap_whole,
    wrapped_modules,
    wrapped_places,
)

_PACKED = (LoraLinear, LoraQuantizedLinear)
"""The kinds of layers, and none made of them, whose products are those of packed factors."""


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
            tied_to, _ = places[id(module.embedding)]
        parts.append(AdapterPart(path, type(module), parameter, tied_to, values))
    return sorted(parts, key=lambda part: bool(part.tied_to))


def join(
    model: nn.Module,
    name: str,
    parts: Sequence[AdapterPart],
    routing: Routing,
    known: Mapping[str, WrappedModule],
) -> list[WrappedModule]:
    """Adds an adapter as `name` that a model of the same structure has, with the same values.

    Args:
        known: wrappers of layers by path; those that have an adapter are in the model.

    Returns: the wrapper of each part.

    Raises:
        InputError: a module that it trains whole is, or holds, one that another adapts.
    """
    check_adapter_name(name)
    saved = [part.path for part in parts if part.kind is ModulesToSaveWrapper]
    require_apart(model, saved, [part.path for part in parts])
    wrappers = []
    for part in parts:
        wrapper = known.get(part.path)
        if wrapper is None or type(wrapper) is not part.kind or not wrapper.adapters:
            wrapper = _wrap_as(model, part, routing)
        for attribute, value in part.values.items():
            getattr(wrapper, attribute)[name] = value
        wrappers.append(wrapper)
    return wrappers


def _wrap_as(model: nn.Module, part: AdapterPart, routing: Routing) -> WrappedModule:
    """The wrapper for a part of an adapter, which is made if there is none."""
    path, kind = part.path, part.kind
    if part.parameter:
        return wrap_parameter(model, path, part.parameter, routing)
    if kind is ModulesToSaveWrapper:
        return wrap_whole(model, path, routing)
    if issubclass(kind, TrainedTokens):
        return wrap_tokens(model, path, routing)
    if not part.tied_to:
        return wrap_layer(model, path, routing)
    embedding = wrap_layer(model, part.tied_to, routing)
    return wrap(model, path, LoraTiedHead.nesting, partial(kind, embedding=embedding))


def pack(
    self: Any, families: Iterable[Sequence[str]] = (), alone: bool = False, room: int = 0
) -> None:
    """Prepares a `LoraModel` for inference with many adapters.

    Where their values change, what follows of them is forgotten by `unpack_adapter`.

    Args:
        families: the paths of layers that get the same input (`packed.same_inputs`).
        alone: no more than one adapter will be packed.
        room: the sum of the ranks that will be packed, where it is known.
    """
    self.routing.frozen = True
    self.packed = PackedFactors(self.get_base_model(), families, alone, room)


def unpack(self: Any) -> None:
    """Takes back what `pack` did to a `LoraModel`, which may be trained then."""
    if self.packed is not None:
        for name in self.adapters:
            unpack_adapter(self, name)
        self.packed.release()
        self.packed, self.routing.frozen = None, False


def add_packed(
    self: Any, adapter_name: str, config: LoraConfig, parts: Sequence[AdapterPart]
) -> None:
    """Adds an adapter to a packed `LoraModel`, whose other adapters may be in use meanwhile.

    Args:
        config: as the model has it that the parts are of.
        parts: all that it has (`parts_of`), frozen; they are not copied.

    An error, of whatever kind, leaves the model as it was.
    """
    require_beside(adapter_name, config, self.peft_config)
    model, packed = self.get_base_model(), self.packed
    try:
        wrappers = join(model, adapter_name, parts, self.routing, packed.layers)
        if all(map(_is_packable, wrappers)) and not _adapts_parameters(self):
            layers = dict(zip((part.path for part in parts), wrappers, strict=True))
            packed.put(adapter_name, layers)
            packed.joined[adapter_name] = wrappers
        else:
            packed.put(adapter_name, _packable(model))
    except BaseException:
        packed.remove(adapter_name)
        remove(model, adapter_name)
        raise
    self.peft_config[adapter_name] = config


def packed_paths(parts: Iterable[AdapterPart]) -> list[str]:
    """The paths of the layers whose factors `add_packed` packs."""
    return [
        part.path
        for part in parts
        if part.kind in _PACKED
        and "lora_magnitude_vector" not in part.values
        and part.values["lora_B"].bias is None
    ]


def pack_adapter(self: Any, adapter_name: str) -> None:
    """Packs the factors of an adapter of a packed `LoraModel` as they are now."""
    self.packed.put(adapter_name, _packable(self.get_base_model()))


def unpack_adapter(self: Any, adapter_name: str) -> None:
    """Forgets what is packed of an adapter, or follows of its values, as these have changed."""
    if self.packed is not None:
        self.packed.remove(adapter_name)
        for _, layer in wrapped_modules(self.get_base_model()):
            if isinstance(layer, LoraLayer):
                layer.values_changed(adapter_name)


def wrappers_of(self: Any, adapter_name: str) -> list[WrappedModule]:
    """The wrappers of a `LoraModel` that may have this adapter."""
    if self.packed is not None and adapter_name in self.packed.joined:
        return self.packed.joined[adapter_name]
    return [module for _, module in wrapped_modules(self.get_base_model())]


def _adapts_parameters(self: Any) -> bool:
    """Whether layers run with another weight at times, and which do is to be looked for."""
    return any(config.target_parameters for config in self.peft_config.values())


def is_packed(model: nn.Module, adapter_name: str) -> bool:
    """Whether an adapter has something in `model`, and that is packed factors alone."""
    own = [module for _, module in wrapped_modules(model) if adapter_name in module.adapters]
    return bool(own) and all(
        _is_packable(module)
        and module.family is not None
        and adapter_name in module.family.names[module.place]
        for module in own
    )


def _is_packable(module: nn.Module) -> TypeGuard[LoraLinear]:
    return type(module) in _PACKED


def _packable(model: nn.Module) -> dict[str, LoraLinear]:
    """The linear layers whose products may be made of packed factors, by their paths."""
    found: dict[str, LoraLinear] = {}
    changed = set()  # layers that run with another weight at times
    for path, layer in wrapped_places(model):
        if isinstance(layer, LoraParameter):
            changed.add(path)
        elif _is_packable(layer):
            if path in changed:
                layer.family = None
            else:
                found[path] = layer
    return found
