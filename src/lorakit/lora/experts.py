"""An adapter for experts one by one, as one for the stacked weights of newer models.

Mixtures had a list of experts with three linear layers each; transformers 5 has one parameter for
the gates and up-projections of all, and one for the down-projections. The update of every expert
stays what it was: where two layers have become one, its factors stand beside each other.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorakit.errors import InputError
from lorakit.lora.config import LoraConfig
from lorakit.lora.key_names import PREFIX
from lorakit.lora.layers import unwrapped
from lorakit.lora.targets import base_modules

_EXPERT = re.compile(
    re.escape(PREFIX)
    + r"(?P<parent>.+\.experts)\."
    # `experts.3.up_proj`, or `experts.gate_up_projs.3` of gpt-oss with 4-bit layers.
    + r"(?:(?P<number>\d+)\.(?P<layer>\w+)|(?P<whole>gate_up_proj|down_proj)s\.(?P<place>\d+))"
    + r"\.(?P<factor>lora_[AB])\.weight"
)
_LINEAR = re.compile(re.escape(PREFIX) + r"(.+?)\.(?:lora_A\.weight|lora_embedding_A)")
# What the layers are called, in the order of the rows of the stacked parameter.
_STACKED = {
    "gate_up_proj": (("gate_proj", "w1"), ("up_proj", "w3")),
    "down_proj": (("down_proj", "w2"),),
}
_WHOLE = {"gate_up_proj": (("gate_up_proj",),), "down_proj": (("down_proj",),)}

Factors = dict[str, torch.Tensor]


def stack_experts(
    model: nn.Module, config: LoraConfig, tensors: Mapping[str, torch.Tensor], folder: str | Path
) -> tuple[LoraConfig, dict[str, torch.Tensor]] | None:
    """The adapter with `target_parameters` in the place of single experts.

    Returns: None where it has no experts one by one, or the model has no stacked ones.

    Raises:
        InputError: it has, and their update cannot be stacked.
    """
    parents = {name: unwrapped(module) for name, module in base_modules(model)}
    experts: dict[str, dict[tuple[int, str], Factors]] = {}
    rest = {}
    for key, tensor in tensors.items():
        match = _EXPERT.fullmatch(key)
        if match is None or not _is_stacked(parents.get(match["parent"])):
            rest[key] = tensor
            continue
        place = int(match["number"] or match["place"]), match["layer"] or match["whole"]
        experts.setdefault(match["parent"], {}).setdefault(place, {})[match["factor"]] = tensor
    if not experts:
        return None
    if config.use_dora or config.lora_bias:
        raise InputError(
            f"{folder} adapts experts one by one with use_dora or lora_bias, which stacked experts "
            "cannot have: merge it with the version of transformers that it was trained with"
        )
    paths, ranks, alphas = [], dict(config.rank_pattern), dict(config.alpha_pattern)
    for parent, found in experts.items():
        stacked = _stack(parents[parent], parent, found, config, folder)
        for number, (name, (A, B, r, scaling)) in enumerate(stacked.items()):
            inside = "base_layer." * (len(stacked) - 1 - number)  # the first is the innermost
            rest[f"{PREFIX}{parent}.{inside}lora_A.weight"] = A
            rest[f"{PREFIX}{parent}.{inside}lora_B.weight"] = B
            path = f"{parent}.{name}"
            paths.append(path)
            ranks = {f"^{re.escape(path)}": r, **ranks}
            alpha = scaling * (r**0.5 if config.use_rslora else r)
            alphas = {f"^{re.escape(path)}": alpha, **alphas}
    linear = {match[1] for key in rest if (match := _LINEAR.fullmatch(key))}
    return dataclasses.replace(
        config,
        target_modules=sorted(linear - {f"{p}.base_layer" for p in experts} - experts.keys()),
        target_parameters=[*(config.target_parameters or []), *paths],
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        lora_dropout=0.0,
        rank_pattern=ranks,
        alpha_pattern=alphas,
    ), rest


def _is_stacked(module: nn.Module | None) -> bool:
    return all(getattr(getattr(module, name, None), "ndim", 0) == 3 for name in _STACKED)


def _inputs_first(module: Any) -> bool:
    """Whether stacked weights are (experts, in, out), said or not (Llama 4 does not say it)."""
    up, down = module.gate_up_proj.shape, module.down_proj.shape
    plain = up[2] == down[1]  # (…, 2 m, d) and (…, d, m): both are d
    return bool(getattr(module, "is_transposed", False)) or not plain


def _stack(
    module: nn.Module,
    parent: str,
    found: Mapping[tuple[int, str], Factors],
    config: LoraConfig,
    folder: str | Path,
) -> dict[str, tuple[torch.Tensor, torch.Tensor, int, float]]:
    """A, B, rank and scaling of each stacked parameter of `module` that experts adapt."""
    spelt = _WHOLE if any(layer in _WHOLE["gate_up_proj"][0] for _, layer in found) else _STACKED
    known = {layer for rows in spelt.values() for names in rows for layer in names}
    scalings = {config.scaling_for(f"{parent}.{n}.{layer}") for n, layer in found}
    ranks = {factors["lora_A"].shape[0] for factors in found.values() if "lora_A" in factors}
    whole = all(factors.keys() == {"lora_A", "lora_B"} for factors in found.values())
    if not whole or len(scalings) > 1 or len(ranks) > 1 or {n for _, n in found} - known:
        raise InputError(
            f"{folder}: the experts of {parent} are adapted one by one, with different ranks, "
            "scalings or layers, which cannot be stacked: merge it with the version of "
            "transformers that it was trained with"
        )
    (r,), (scaling,) = ranks, scalings
    turned = _inputs_first(module)
    stacked = {}
    for name, rows in spelt.items():
        parts = [part for part in rows if any(layer in part for _, layer in found)]
        if not parts:
            continue
        W = getattr(module, name)
        experts, d_out, d_in = (W.mT if turned else W).shape
        size, R = d_out // len(rows), r * len(parts)
        dtype = next(iter(found.values()))["lora_A"].dtype
        A = torch.zeros(experts, R, d_in, dtype=dtype)
        B = torch.zeros(experts, d_out, R, dtype=dtype)
        for (number, layer), factors in found.items():
            place = next((i for i, part in enumerate(rows) if layer in part), None)
            if place is None:
                continue
            begin = r * parts.index(rows[place])
            shapes = tuple(factors["lora_A"].shape), tuple(factors["lora_B"].shape)
            if number >= experts or shapes != ((r, d_in), (size, r)):
                raise InputError(
                    f"{folder} is an adapter for another base model: {parent}.{number}.{layer} has "
                    f"factors of shapes {shapes[0]} and {shapes[1]}, and this model {experts} "
                    f"experts of {(size, d_in)}"
                )
            A[number, begin : begin + r] = factors["lora_A"]
            own = slice(size * place, size * (place + 1))
            if not getattr(module, "is_concatenated", True):  # gates and ups take turns
                own = slice(place, None, len(rows))
            B[number, own, begin : begin + r] = factors["lora_B"]
        if turned != bool(getattr(module, "is_transposed", False)):
            # PEFT takes the inputs for the outputs here: W'ᵀ = Aᵀ Bᵀ.
            A, B, d_in, d_out = B.mT, A.mT, d_out, d_in
        # As PEFT has them: (experts r, d_in), and (d_out, r experts) with the expert's number last.
        flat = B.permute(1, 2, 0).reshape(d_out, R * experts).contiguous()
        stacked[name] = A.reshape(experts * R, d_in), flat, R, scaling
    return {name: stacked[name] for name, _ in module.named_parameters() if name in stacked}
