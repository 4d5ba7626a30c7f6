"""A new adapter in a model, beside the modules that its configuration targets."""

from functools import partial

from torch import nn

from lorakit.errors import InputError
from lorakit.lora.config import LoraConfig
from lorakit.lora.layers import LoraEmbedding, LoraTiedEmbedding, LoraTiedHead, unwrapped
from lorakit.lora.presets import fused_targets, is_preset
from lorakit.lora.routing import Routing
from lorakit.lora.targets import (
    resolve_modules_to_save,
    resolve_parameters,
    resolve_targets,
    resolve_tokens,
    task_heads,
    tied_embedding,
    tied_modules,
    warn_of_ties,
    warn_of_unused,
    written_targets,
)
from lorakit.lora.wrapping import (
    chain_of,
    check_adapter_name,
    remove,
    require_apart,
    wrap,
    wrap_layer,
    wrap_parameter,
    wrap_tokens,
    wrap_whole,
)

_MANY = 20  # target names, as of an adapter that lists whole paths, are shortened to endings


def inject(
    model: nn.Module,
    config: LoraConfig,
    adapter_name: str,
    routing: Routing,
    autocast: bool = True,
    initialize: bool = True,
) -> None:
    """Adds adapter `adapter_name` to every module that `config` targets, wrapping it if need be.

    `config` says afterwards what was found, for readers that know no presets and no model. An
    error leaves the model as it was.

    Args:
        autocast, initialize: as in `LoraLayer.add_adapter`.
    """
    if heads := task_heads(model, config):
        own = config.modules_to_save or []
        config.modules_to_save = [*own, *(head for head in heads if head not in own)]
    if isinstance(config.target_modules, list):
        config.target_modules = fused_targets(model, config.target_modules)
    check_adapter_name(adapter_name)
    targets = resolve_targets(model, config)
    parameters = resolve_parameters(model, config)
    tokens = resolve_tokens(model, config)
    saved = resolve_modules_to_save(model, config)
    require_apart(model, saved, targets, tokens)
    warn_of_ties(model, config, [*targets, *saved])
    warn_of_unused(config, [*targets, *(".".join(pair) for pair in parameters)])
    try:
        for target in targets:
            path = tied_embedding(model, target) if config.ensure_weight_tying else target
            layer = wrap_layer(model, path, routing)
            if adapter_name in layer.adapters:
                continue  # as tied to an earlier one
            layer.add_adapter(adapter_name, config, path, autocast, initialize)
            if config.ensure_weight_tying:
                _wrap_tied(model, path, adapter_name, config)
        for path, parameter in parameters:
            wrapper = wrap_parameter(model, path, parameter, routing)
            if adapter_name in wrapper.adapters:
                raise InputError(f"target_parameters: {path} is adapted as a layer already")
            wrapper.add_adapter(adapter_name, config, f"{path}.{parameter}", autocast, initialize)
        for path, numbers in tokens.items():
            wrap_tokens(model, path, routing).add_adapter(adapter_name, numbers, autocast)
        for path in saved:
            _wrap_saved(model, path, adapter_name, config, routing)
    except InputError:
        remove(model, adapter_name)
        raise
    names = config.target_modules
    if names is None or is_preset(names) or (isinstance(names, list) and len(names) >= _MANY):
        config.target_modules = written_targets(targets, model)
    if config.base_model_name_or_path is None:
        name = getattr(getattr(model, "config", None), "_name_or_path", None)
        config.base_model_name_or_path = name or None


def _wrap_tied(model: nn.Module, path: str, name: str, config: LoraConfig) -> None:
    """Gives the modules that are tied to a wrapped embedding its adapter `name` too."""
    embedding = chain_of(model.get_submodule(path))[-2]
    if not isinstance(embedding, LoraEmbedding):
        return
    for tied_path in tied_modules(model, path):
        own = unwrapped(model.get_submodule(tied_path))
        kind = LoraTiedEmbedding if isinstance(own, nn.Embedding) else LoraTiedHead
        tied = wrap(model, tied_path, kind.nesting, partial(kind, embedding=embedding))
        tied.add_adapter(name, config, path)


def _wrap_saved(
    model: nn.Module, path: str, name: str, config: LoraConfig, routing: Routing
) -> None:
    tied = tied_modules(model, path) if config.ensure_weight_tying else []
    tied_to = None
    for one in (path, *tied):
        wrapper = wrap_whole(model, one, routing)
        if name not in wrapper.adapters:
            wrapper.add_adapter(name, tied_to)
        tied_to = tied_to or wrapper.modules_to_save[name]
