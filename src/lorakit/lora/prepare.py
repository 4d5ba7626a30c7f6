"""First values of an adapter that come from data, put where the layers find them.

`preprocess_corda` and `preprocess_loraga` run before an adapter is made and leave factors beside
the layers; `initialize_lora_eva_weights` runs after, as EVA also says which rank each layer gets.
What looks at the data is in `data_driven.py`, what makes factors of it in `decomposition.py`.
The names and arguments are PEFT's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from lorakit import atomic
from lorakit.errors import InputError, listed
from lorakit.lora.bank import AdapterBank
from lorakit.lora.config import LoraConfig
from lorakit.lora.data_driven import eva, input_covariances, weight_gradients
from lorakit.lora.decomposition import corda, lora_ga
from lorakit.lora.initial_settings import CordaConfig, EvaConfig, LoraGAConfig, as_settings
from lorakit.lora.initialize import START
from lorakit.lora.injection import put_back_unused, wrapped_modules
from lorakit.lora.layers import LoraLinear, is_conv1d
from lorakit.lora.parameters import set_trainable
from lorakit.lora.target_names import written_targets
from lorakit.lora.targets import resolve_targets


def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Callable[[], Any] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Makes CorDA's factors for the layers that `lora_config` targets.

    `get_peft_model(model, lora_config)` with `init_lora_weights="corda"` then starts from them.

    Args:
        run_model: runs the model over sample data.
        hooked_model: the model that `run_model` runs; None is `model`.

    Raises:
        InputError: no target is linear, or neither data nor a file is given.
    """
    settings = as_settings(CordaConfig, "corda_config", lora_config.corda_config)
    modules = _linear_targets(model, lora_config)

    def covariances() -> dict[str, torch.Tensor]:
        if run_model is None:
            raise InputError("preprocess_corda needs run_model, which runs the model over data")
        hooked = model if hooked_model is None else hooked_model
        seen = {path: hooked.get_submodule(path) for path in modules}
        return input_covariances(seen, [None], lambda _: run_model(), model=hooked)

    def factors() -> dict[str, torch.Tensor]:
        found = _cached(settings.covariance_file, covariances)
        made: dict[str, torch.Tensor] = {}
        for path, module in modules.items():
            r, scaling = lora_config.rank_for(path), lora_config.scaling_for(path)
            A, B = corda(_matrix(module), found[path], r, scaling, settings.corda_method)
            made |= {f"{path}.A": A, f"{path}.B": B}
        return made

    _leave(modules, _cached(settings.cache_file, factors))


def preprocess_loraga(
    model: nn.Module,
    lora_config: LoraConfig,
    train_step: Callable[[], Any],
    cache_file: str | None = None,
) -> None:
    """Makes LoRA-GA's factors for the layers that `lora_config` targets.

    `get_peft_model(model, lora_config)` with `init_lora_weights="lora_ga"` then starts from them.

    Args:
        train_step: runs the model over data, and either calls `backward` or returns the loss.
        cache_file: the gradients are read from here, or written to it (safetensors).

    Raises:
        InputError: no target is linear, or no gradient reaches one.
    """
    settings = as_settings(LoraGAConfig, "lora_ga_config", lora_config.lora_ga_config)
    modules = _linear_targets(model, lora_config)

    def gradients() -> dict[str, torch.Tensor]:
        return weight_gradients(modules, [None], lambda _: train_step(), model=model)

    found = _cached(cache_file, gradients)
    made: dict[str, torch.Tensor] = {}
    for path, module in modules.items():
        r, scaling = lora_config.rank_for(path), lora_config.scaling_for(path)
        A, B = lora_ga(found[path], _matrix(module), r, scaling, **dataclasses.asdict(settings))
        made |= {f"{path}.A": A, f"{path}.B": B}
    _leave(modules, made)


def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: LoraConfig | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    *,
    adapter_name: str = "default",
    show_progress_bar: bool = False,
) -> dict[str, torch.Tensor]:
    """EVA's `A` (new rank, d_in) by layer, from the inputs that the layers get from the data.

    Args:
        model: with the adapter `adapter_name`, or a plain one, which needs `peft_config`.
        dataloader: batches, dictionaries as the model takes them.
        forward_fn: runs the model on a batch; None is `model(**batch)`.
        show_progress_bar: as in PEFT's function; none is shown.

    Raises:
        InputError: there is no data, or no layer is linear.
    """
    if isinstance(model, AdapterBank):
        config = model.peft_config[adapter_name]
        layers = _linear_layers(model, adapter_name)
        modules = {path: layer.get_base_layer() for path, layer in layers.items()}
    elif peft_config is None:
        raise InputError("get_eva_state_dict needs peft_config for a model without adapters")
    else:
        config, modules = peft_config, _linear_targets(model, peft_config)

    def run(batch: Any) -> Any:
        with model.disable_adapter() if isinstance(model, AdapterBank) else nullcontext():
            return model(**batch) if forward_fn is None else forward_fn(model, batch)

    ranks = {path: config.rank_for(path) for path in modules}
    settings = as_settings(EvaConfig, "eva_config", config.eva_config)
    return eva(modules, dataloader, run, ranks, settings, model=model)


def initialize_lora_eva_weights(
    model: AdapterBank,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, torch.Tensor] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    *,
    adapter_name: str = "default",
    show_progress_bar: bool = False,
) -> None:
    """Starts an adapter with `init_lora_weights="eva"` from data, and deals its ranks out anew.

    The configuration's `rank_pattern`, `alpha_pattern` and `target_modules` say afterwards what
    each layer got; a layer of rank 0 has no adapter any more.

    Args:
        eva_state_dict: from `get_eva_state_dict`; None makes it from `dataloader`.

    Raises:
        InputError: the adapter is not configured for EVA, or there is neither data nor state.
    """
    if not isinstance(model, AdapterBank):
        raise InputError("initialize_lora_eva_weights needs a model from get_peft_model")
    model.require(adapter_name)
    config = model.peft_config[adapter_name]
    if config.init_lora_weights != "eva":
        raise InputError("initialize_lora_eva_weights needs init_lora_weights='eva'")
    if len(model.active_adapters) > 1:
        raise InputError("initialize_lora_eva_weights needs a single active adapter")
    if eva_state_dict is None:
        if dataloader is None:
            raise InputError("initialize_lora_eva_weights needs a dataloader or eva_state_dict")
        eva_state_dict = get_eva_state_dict(
            model, dataloader, None, forward_fn, adapter_name=adapter_name
        )
    layers = _linear_layers(model, adapter_name)
    unknown = [path for path in eva_state_dict if path not in layers]
    if unknown:
        raise InputError(f"eva_state_dict has what this model has not: {listed(unknown)}")
    settings = as_settings(EvaConfig, "eva_config", config.eva_config)
    base = model.get_base_model()
    new = _with_ranks(config, {p: len(A) for p, A in eva_state_dict.items()}, settings)
    for path, A in eva_state_dict.items():
        layers[path].delete_adapter(adapter_name)
        if len(A):
            layers[path].add_adapter(adapter_name, new, path)
            with torch.no_grad():
                layers[path].matrices(adapter_name)[0].copy_(A)
    put_back_unused(base)
    left = {path for path, layer in wrapped_modules(base) if adapter_name in layer.adapters}
    new.target_modules = written_targets([p for p in layers if p in left], base)
    model.peft_config[adapter_name] = new
    trainable = adapter_name in model.active_adapters
    set_trainable(model.adapter_tensors(adapter_name).values(), trainable)


def _with_ranks(config: LoraConfig, ranks: Mapping[str, int], settings: EvaConfig) -> LoraConfig:
    """`config` with these ranks, each layer's path a pattern of its own."""
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    for path in sorted(ranks, key=len, reverse=True):  # a path can be the end of a longer one
        rank, before, alpha = ranks[path], config.rank_for(path), config.alpha_for(path)
        if rank == 0:
            continue
        if config.rank_pattern or rank != config.r:
            rank_pattern[path] = rank
        if settings.adjust_scaling_factors:
            alpha *= rank / before
        if config.alpha_pattern or alpha != config.lora_alpha:
            alpha_pattern[path] = alpha
    return dataclasses.replace(
        config,
        rank_pattern=rank_pattern | config.rank_pattern,
        alpha_pattern=alpha_pattern | config.alpha_pattern,
    )


def _linear_layers(model: AdapterBank, adapter_name: str) -> dict[str, LoraLinear]:
    """The linear layers that have the adapter, by path."""
    return {
        path: layer
        for path, layer in wrapped_modules(model.get_base_model())
        if type(layer) is LoraLinear and adapter_name in layer.adapters
    }


def _linear_targets(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """The linear modules that `config` targets in a model without adapters, by path."""
    paths = resolve_targets(model, config)
    found = {path: model.get_submodule(path) for path in paths}
    linear = {p: m for p, m in found.items() if isinstance(m, nn.Linear) or is_conv1d(m)}
    if not linear:
        raise InputError("target_modules has no linear layer: only these can start from data")
    return linear


def _matrix(module: Any) -> torch.Tensor:
    """A linear module's weight as (d_out, d_in)."""
    return module.weight.T if is_conv1d(module) else module.weight


def _leave(modules: Mapping[str, nn.Module], factors: Mapping[str, torch.Tensor]) -> None:
    """Puts each layer's `A` and `B` where its next adapter looks for them."""
    for path, module in modules.items():
        if f"{path}.A" not in factors:
            raise InputError(f"the cache has no factors for {path}: it is another model's")
        vars(module)[START] = factors[f"{path}.A"], factors[f"{path}.B"]


def _cached(
    path: str | Path | None, make: Callable[[], dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """The tensors in the file at `path`; without a file they are made, and written there."""
    if path is None:
        return make()
    path = Path(path)
    if path.is_file():
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is not a safetensors file: {error}") from error
    tensors = {key: tensor.contiguous() for key, tensor in make().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_file(path, save(tensors))
    return tensors
