"""An adapter as parts, which one model gives away and another of the same structure takes over.

Nothing is looked for or initialised, and values are not copied, so that it is quick.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from lorakit.lora.layers import (
    LoraParameter,
    LoraTiedEmbedding,
    LoraTiedHead,
    ModulesToSaveWrapper,
    TiedModule,
    TrainedTokens,
    WrappedModule,
)
from lorakit.lora.routing import Routing
from lorakit.lora.wrapping import (
    check_adapter_name,
    require_apart,
    wrap,
    wrap_layer,
    wrap_parameter,
    wrap_tokens,
    wrap_whole,
    wrapped_places,
)


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


def join(model: nn.Module, name: str, parts: Sequence[AdapterPart], routing: Routing) -> None:
    """Adds an adapter as `name` that a model of the same structure has, with the same values.

    Raises:
        InputError: a module that it trains whole is, or holds, one that another adapts.
    """
    check_adapter_name(name)
    saved = [part.path for part in parts if part.kind is ModulesToSaveWrapper]
    require_apart(model, saved, [part.path for part in parts])
    for part in parts:
        wrapper = _wrap_as(model, part, routing)
        for attribute, value in part.values.items():
            getattr(wrapper, attribute)[name] = value


def _wrap_as(model: nn.Module, part: AdapterPart, routing: Routing) -> WrappedModule:
    """The wrapper for a part of an adapter, which is made if there is none."""
    path, kind = part.path, part.kind
    if part.parameter:
        return wrap_parameter(model, path, part.parameter, routing)
    if kind is ModulesToSaveWrapper:
        return wrap_whole(model, path, routing)
    if kind is TrainedTokens:
        return wrap_tokens(model, path, routing)
    if not part.tied_to:
        return wrap_layer(model, path, routing)
    embedding = wrap_layer(model, part.tied_to, routing)
    return wrap(model, path, LoraTiedHead.nesting, partial(kind, embedding=embedding))
