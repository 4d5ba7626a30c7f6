"""First values of an adapter that come from data, stored where the layers find them.

`start_from_data` serves every initialisation with a `collect`; the other functions are PEFT's. The
methods themselves are in `init/`.
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
from lorakit.lora.architecture import is_conv1d
from lorakit.lora.config import LoraConfig
from lorakit.lora.init import PREPARED, ChosenInit, DataPass, InitSite
from lorakit.lora.init.decompose import at_least_float32
from lorakit.lora.init.eva import eva
from lorakit.lora.layers import LoraLayer, LoraLinear
from lorakit.lora.model import LoraModel
from lorakit.lora.parameters import set_trainable
from lorakit.lora.targets import resolve_targets, written_targets
from lorakit.lora.wrapping import put_back_unused, wrapped_modules


def start_from_data(
    model: nn.Module, config: LoraConfig, batches: Iterable[Any], run: Callable[[Any], Any]
) -> LoraConfig:
    """Makes the factors of an adapter with `config` whose initialisation takes data.

    They are stored beside the targeted linear layers, for the next adapter.

    Args:
        model: without adapters.
        batches: dictionaries as the model takes them; unused by other initialisations.
        run: runs the model on a batch, and returns its loss.

    Returns: `config`, with other ranks where the initialisation redistributes them.

    Raises:
        InputError: no target is linear, or the data gives no factors.
    """
    init = config.init
    if init.kind.collect is None:
        return config
    modules = _linear_targets(model, config)
    ranks = {path: config.rank_for(path) for path in modules}
    data = init.kind.collect(DataPass(modules, batches, run, ranks, init.settings, model))
    factors = _factors(config, init, modules, data)
    found = {path: len(factors[f"{path}.A"]) for path in modules}
    if found != ranks:
        config = _redistributed(config, found, resolve_targets(model, config), model)
    _store({path: module for path, module in modules.items() if found[path]}, factors)
    return config


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
    init = dataclasses.replace(lora_config, init_lora_weights="corda").init
    files = init.settings.covariance_file, init.settings.cache_file
    _preprocess(model, lora_config, init, run_model, hooked_model or model, *files)


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
    init = dataclasses.replace(lora_config, init_lora_weights="lora_ga").init
    _preprocess(model, lora_config, init, train_step, model, cache_file)


def _preprocess(
    model: nn.Module,
    config: LoraConfig,
    init: ChosenInit,
    run: Callable[[], Any] | None,
    hooked: nn.Module,
    data_file: str | None,
    factors_file: str | None = None,
) -> None:
    """Stores the factors of `init` beside the layers, from data or from files (safetensors)."""
    modules = _linear_targets(model, config)

    def data() -> dict[str, torch.Tensor]:
        if run is None:
            raise InputError(f"{init.value} needs a function that runs the model over data")
        seen = {path: hooked.get_submodule(path) for path in modules}
        assert init.kind.collect is not None
        inputs = DataPass(seen, [None], lambda _: run(), {}, init.settings, hooked)
        return init.kind.collect(inputs)

    def factors() -> dict[str, torch.Tensor]:
        return _factors(config, init, modules, _cached(data_file, data))

    _store(modules, _cached(factors_file, factors))


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
    if isinstance(model, LoraModel):
        config = model.peft_config[adapter_name]
        modules: Mapping[str, nn.Module] = _linear_layers(model, adapter_name)
    elif peft_config is None:
        raise InputError("get_eva_state_dict needs peft_config for a model without adapters")
    else:
        config, modules = peft_config, _linear_targets(model, peft_config)

    def run(batch: Any) -> Any:
        with model.disable_adapter() if isinstance(model, LoraModel) else nullcontext():
            return model(**batch) if forward_fn is None else forward_fn(model, batch)

    ranks = {path: config.rank_for(path) for path in modules}
    settings = dataclasses.replace(config, init_lora_weights="eva").init.settings
    return eva(modules, dataloader, run, ranks, settings, model=model)


def initialize_lora_eva_weights(
    model: LoraModel,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, torch.Tensor] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    *,
    adapter_name: str = "default",
    show_progress_bar: bool = False,
) -> None:
    """Starts an adapter with `init_lora_weights="eva"` from data, and redistributes its ranks.

    The configuration gets the new `rank_pattern`, `alpha_pattern` and `target_modules`; a layer of
    rank 0 loses its adapter.

    Args:
        eva_state_dict: from `get_eva_state_dict`; None makes it from `dataloader`.

    Raises:
        InputError: the adapter is not configured for EVA, or there is neither data nor state.
    """
    if not isinstance(model, LoraModel):
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
        raise InputError(f"eva_state_dict names layers that this model lacks: {listed(unknown)}")
    base = model.get_base_model()
    adapted = [
        path
        for path, layer in wrapped_modules(base)
        if isinstance(layer, LoraLayer) and adapter_name in layer.adapters
    ]
    ranks = {path: len(A) for path, A in eva_state_dict.items()}
    new = _redistributed(config, ranks, adapted, base)
    for path, A in eva_state_dict.items():
        layers[path].delete_adapter(adapter_name)
        if len(A):
            layers[path].add_adapter(adapter_name, new, path)
            with torch.no_grad():
                layers[path].matrices(adapter_name)[0].copy_(A)
    put_back_unused(base)
    model.peft_config[adapter_name] = new
    trainable = adapter_name in model.active_adapters
    set_trainable(model.adapter_tensors(adapter_name).values(), trainable)


def _redistributed(
    config: LoraConfig, ranks: Mapping[str, int], targets: Iterable[str], model: nn.Module
) -> LoraConfig:
    """`config` for `targets`, some of them with other ranks, where 0 is no adapter.

    Alpha changes with the rank, unless the initialisation's settings say otherwise.
    """
    scales = getattr(config.init.settings, "adjust_scaling_factors", True)
    left = [path for path in targets if ranks.get(path) != 0]
    new = {path: ranks.get(path, config.rank_for(path)) for path in left}
    factors = {path: r / config.rank_for(path) if scales else 1 for path, r in new.items()}
    return config.with_ranks(
        new,
        {path: config.alpha_for(path) * factor for path, factor in factors.items()},
        r=config.r,
        lora_alpha=config.lora_alpha,
        target_modules=written_targets(left, model),
    )


def _linear_layers(model: LoraModel, adapter_name: str) -> dict[str, LoraLinear]:
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
        raise InputError(
            "target_modules has no linear layer, and only linear layers start from data"
        )
    return linear


def _factors(
    config: LoraConfig,
    init: ChosenInit,
    modules: Mapping[str, nn.Module],
    data: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Each module's factors, as `{path}.A` (r, d_in) and `{path}.B` (d_out, r)."""
    made: dict[str, torch.Tensor] = {}
    for path, module in modules.items():
        weight: Any = module.weight
        W = (weight.T if is_conv1d(module) else weight).detach()
        r = config.rank_for(path)
        A = torch.empty(r, W.shape[1], dtype=at_least_float32(W[:0]).dtype, device=W.device)
        B = A.new_empty(W.shape[0], r)
        site = InitSite(A, B, W, config.scaling_for(path), init.value, init.settings, data[path])
        with torch.no_grad():
            found = init.kind.make(site)
        made |= {f"{path}.A": found.A, f"{path}.B": found.B}
    return made


def _store(modules: Mapping[str, nn.Module], factors: Mapping[str, torch.Tensor]) -> None:
    """Stores `A` and `B` beside each layer, where its next adapter finds them."""
    for path, module in modules.items():
        if f"{path}.A" not in factors:
            raise InputError(f"the cache has no factors for {path}: it is another model's")
        vars(module)[PREPARED] = factors[f"{path}.A"], factors[f"{path}.B"]


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
