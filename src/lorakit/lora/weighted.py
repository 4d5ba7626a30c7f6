"""A new adapter out of several that a model has: `LoraModel.add_weighted_adapter`.

How updates are combined is in `combination.py`; here they are taken from a model's layers, and what
comes out gets a configuration and keys, as if it had been read from an adapter's folder.
"""

import copy
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lorakit.errors import InputError, listed
from lorakit.lora.checkpoint import PREFIX, adapter_parameters
from lorakit.lora.combination import CombineSettings, Update, check_settings, combine
from lorakit.lora.config import LoraConfig
from lorakit.lora.layers import LoraEmbedding, LoraLayer, LoraParameter
from lorakit.lora.targets import written_targets
from lorakit.lora.wrapping import wrapped_modules


@dataclass(frozen=True)
class Combination:
    """A combined adapter: its configuration and its tensors under PEFT's keys.

    `lost_energy` is the share of the updates' energy, ‖ΔW‖² over all layers, that was cut off.
    """

    config: LoraConfig
    tensors: dict[str, torch.Tensor]
    lost_energy: float = 0.0


@torch.no_grad()
def combination(
    model: nn.Module,
    configs: Mapping[str, LoraConfig],
    weights: Mapping[str, float],
    settings: CombineSettings,
) -> Combination:
    """The adapters of `weights` combined, each with its weight.

    One adapter with weight 1 is copied as it is, whatever the method.

    Args:
        model: the wrapped model itself.
        configs: the configurations of the model's adapters, by name.

    Raises:
        InputError: the method does not exist or cannot combine these adapters.
    """
    check_settings(settings)
    if list(weights.values()) == [1]:
        (name,) = weights
        own = adapter_parameters(model, name, configs[name].bias)
        return Combination(copy.deepcopy(configs[name]), own)
    _require_combinable(model, configs, weights)
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    energy = lost = 0.0
    with_bias = any(configs[name].lora_bias for name in weights)  # of one layer, then of all
    for path, layer in wrapped_modules(model):
        names = [name for name in weights if name in layer.adapters]
        if not names:
            continue
        if isinstance(layer, LoraLayer):
            combined = combine([_update(layer, name, weights[name]) for name in names], settings)
            energy, lost = energy + combined.energy, lost + combined.lost
            ranks[path] = combined.A.shape[0]
            found = _as_parameters(layer, names, combined.A, combined.B)
            if with_bias:
                bias = _bias(layer, {name: weights[name] for name in names}, combined.B)
                found["lora_B.bias"] = bias
        else:
            found = layer.adapter_tensors(names[0])
        tensors |= {f"{PREFIX}{path}.{ending}": tensor for ending, tensor in found.items()}
    config = _config(model, [configs[name] for name in weights], ranks)
    return Combination(config, tensors, lost / energy if energy else 0.0)


def _require_combinable(
    model: nn.Module, configs: Mapping[str, LoraConfig], weights: Mapping[str, float]
) -> None:
    for name in weights:
        if configs[name].bias != "none":
            raise InputError(f"'{name}' trains biases of the base itself, so it cannot be combined")
    with_bias = [name for name in weights if configs[name].lora_bias]
    for path, module in wrapped_modules(model):
        own = [name for name in weights if name in module.adapters]
        if not isinstance(module, LoraLayer) and len(own) > 1:
            raise InputError(f"{listed(own)} each have their own {path}, and these do not add up")
        if own and isinstance(module, LoraParameter):
            raise InputError(
                f"{path}: add_weighted_adapter does not support targeting nn.Parameter "
                "(target_parameters)"
            )
        if own and with_bias and isinstance(module, LoraEmbedding):
            raise InputError(
                f"{path} is an embedding, which has no lora_bias, and {listed(with_bias)} has one "
                "elsewhere: PEFT's files cannot hold both in one adapter"
            )
        if own and getattr(getattr(module, "base_layer", None), "groups", 1) != 1:
            raise InputError(f"{path} is a grouped convolution, whose adapters cannot be combined")


def _update(layer: LoraLayer, name: str, weight: float) -> Update:
    A, B = layer.factors(name)
    return Update(A, B, layer.scaling[name], weight, layer.dora_update(name))


def _as_parameters(
    layer: LoraLayer, names: Sequence[str], A: torch.Tensor, B: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The combined matrices in the shape of the layer's parameters, under their keys' ends."""
    (key_A, like_A), (key_B, like_B), *_ = layer.adapter_tensors(names[0]).items()
    return {
        key_A: A.view(A.shape[0], *like_A.shape[1:]),
        key_B: B.view(*B.shape, *like_B.shape[2:]),
    }


def _bias(layer: LoraLayer, weights: Mapping[str, float], B: torch.Tensor) -> torch.Tensor:
    """The sum of the adapters' own biases of B (d_out, r); zero where none of them has one."""
    biases = [(w, layer.bias_update(name)) for name, w in weights.items()]
    return sum((w * b for w, b in biases if b is not None), B.new_zeros(B.shape[0]))


def _config(
    model: nn.Module, configs: Sequence[LoraConfig], ranks: Mapping[str, int]
) -> LoraConfig:
    """The configuration of layers of these ranks, by path, and of a scaling of 1."""
    usual = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {re.escape(path): r for path, r in ranks.items() if r != usual}
    saved = [name for config in configs for name in config.modules_to_save or []]
    return LoraConfig(
        r=usual,
        lora_alpha=usual,
        rank_pattern=pattern,
        alpha_pattern={path: float(r) for path, r in pattern.items()},
        target_modules=written_targets(list(ranks), model),
        modules_to_save=list(dict.fromkeys(saved)) or None,
        lora_bias=any(config.lora_bias for config in configs),
        task_type=configs[0].task_type,
        base_model_name_or_path=configs[0].base_model_name_or_path,
    )
