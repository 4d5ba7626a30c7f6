"""A new adapter out of several that a model has: `LoraModel.add_weighted_adapter`.

How updates are combined is in `combination.py`; here they are taken from a model's layers, and what
comes out gets a configuration and keys, as if it had been read from an adapter's folder.
"""

import copy
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from lorakit.errors import InputError, listed
from lorakit.lora.checkpoint import PREFIX, adapter_parameters
from lorakit.lora.combination import CombineSettings, Update, check_settings, combine
from lorakit.lora.config import LoraConfig
from lorakit.lora.layers import LoraEmbedding, LoraLayer, LoraParameter
from lorakit.lora.targets import written_targets
from lorakit.lora.wrapping import wrapped_modules


class Combination(NamedTuple):
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
    with_bias = any(configs[name].lora_bias for name in weights)
    for path, layer in wrapped_modules(model):
        names = [name for name in weights if name in layer.adapters]
        if not names:
            continue
        found = layer.adapter_tensors(names[0])
        if isinstance(layer, LoraLayer):
            updates = [
                Update(*layer.factors(n), layer.scaling[n], weights[n], layer.dora_update(n))
                for n in names
            ]
            combined = combine(updates, settings)
            A, B = combined.A, combined.B
            energy, lost = energy + combined.energy, lost + combined.lost
            ranks[path] = len(A)
            (key_A, like_A), (key_B, like_B), *_ = found.items()
            found = {
                key_A: A.view(len(A), *like_A.shape[1:]),
                key_B: B.view(*B.shape, *like_B.shape[2:]),
            }
            if with_bias:
                biases = [(weights[n], layer.bias_update(n)) for n in names]
                found["lora_B.bias"] = sum(
                    (weight * bias for weight, bias in biases if bias is not None),
                    B.new_zeros(len(B)),
                )
        tensors |= {f"{PREFIX}{path}.{ending}": tensor for ending, tensor in found.items()}
    used = [configs[name] for name in weights]
    saved = [name for config in used for name in config.modules_to_save or []]
    config = LoraConfig(
        target_modules=written_targets(list(ranks), model),
        modules_to_save=list(dict.fromkeys(saved)) or None,
        lora_bias=with_bias,
        task_type=used[0].task_type,
        base_model_name_or_path=used[0].base_model_name_or_path,
    ).with_ranks(ranks)
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
