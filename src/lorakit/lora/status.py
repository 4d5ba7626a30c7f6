"""The state of a model with adapters, by layer and as a whole, and its parameters by module."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from lorakit.lora.layers import LoraLayer
from lorakit.lora.parameters import numbers_in
from lorakit.lora.wrapping import wrapped_modules

Irregular = Literal["irregular"]


@dataclass(frozen=True)
class TunerLayerStatus:
    """One wrapped layer's state; `requires_grad` and `devices` are by adapter."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]


@dataclass(frozen=True)
class TunerModelStatus:
    """A whole model's state; where its layers differ, the value is `irregular`."""

    base_model_type: str
    adapter_model_type: str
    peft_types: Mapping[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]


def layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The state of every wrapped layer of `model`, which may be any module that holds some."""
    found = []
    for name, module in wrapped_modules(model):
        tensors = {a: module.adapter_tensors(a).values() for a in module.adapters}
        route = module.routing.chosen
        found.append(
            TunerLayerStatus(
                name=name,
                module_type=module._get_name(),
                enabled=module.routing.enabled and bool(route.shared or route.rows),
                active_adapters=list(route.shared),
                merged_adapters=list(getattr(module, "merged_adapters", [])),
                requires_grad={
                    a: _agreed([t.requires_grad for t in own]) for a, own in tensors.items()
                },
                available_adapters=sorted(tensors),
                devices={a: sorted({t.device.type for t in own}) for a, own in tensors.items()},
            )
        )
    return found


def model_status(
    model: nn.Module, base: nn.Module, peft_types: Mapping[str, str], counted: tuple[int, int]
) -> TunerModelStatus:
    """The state of all layers of `base` together; `counted` is trainable and all parameters."""
    layers = layer_status(base)
    adapters = sorted({a for layer in layers for a in layer.available_adapters})

    def gathered(field: str) -> dict[str, list[Any]]:
        values = {a: [getattr(layer, field).get(a) for layer in layers] for a in adapters}
        return {a: [v for v in found if v is not None] for a, found in values.items()}

    def merged_or_active(field: str) -> list[str] | Irregular:
        """The same for all layers that have these adapters at all."""
        names = {a for layer in layers for a in getattr(layer, field)}
        owned = [(set(layer.available_adapters), getattr(layer, field)) for layer in layers]
        agree = all(own.intersection(found) == own & names for own, found in owned)
        return sorted(names) if agree else "irregular"

    return TunerModelStatus(
        base_model_type=type(getattr(base, "model", base)).__name__,
        adapter_model_type=type(model).__name__,
        peft_types=peft_types,
        trainable_params=counted[0],
        total_params=counted[1],
        num_adapter_layers=len(layers),
        enabled=_agreed([layer.enabled for layer in layers]),
        active_adapters=merged_or_active("active_adapters"),
        merged_adapters=merged_or_active("merged_adapters"),
        requires_grad={a: _agreed(values) for a, values in gathered("requires_grad").items()},
        available_adapters=adapters,
        devices={a: sorted({d for ds in v for d in ds}) for a, v in gathered("devices").items()},
    )


def _agreed(values: list[Any]) -> bool | Irregular:
    if all(value is True for value in values):
        return True
    return False if not any(values) else "irregular"


@dataclass(frozen=True)
class ModuleKind:
    """Modules of one name and shape, and the parameters of the adapter beside them.

    Attributes:
        name: the last part of their paths (`q_proj`).
        d_in, d_out: of the frozen weight W (d_out, d_in); None for a module that is no matrix.
        count: how many there are.
        r: the rank; None for a module that is trained whole (`modules_to_save`).
        trained: parameters that are trained, of all of them together.
        frozen: parameters of the frozen weights that these stand beside.
    """

    name: str
    d_in: int | None
    d_out: int | None
    count: int
    r: int | None
    trained: int
    frozen: int

    @property
    def ratio(self) -> float:
        """Trained parameters against frozen ones: r (d + k) / d k for LoRA (Hu et al. 2021)."""
        return self.trained / self.frozen if self.frozen else float("inf")


def parameter_table(model: nn.Module, adapter: str) -> list[ModuleKind]:
    """The kinds of modules that an adapter has parameters for, in the model's order."""
    groups: dict[tuple[Any, ...], list[tuple[int, int]]] = {}
    for path, module in wrapped_modules(model):
        if adapter not in module.adapters:
            continue
        trained = sum(tensor.numel() for tensor in module.adapter_tensors(adapter).values())
        shape: tuple[Any, ...] = None, None, None
        if isinstance(module, LoraLayer):
            shape = module.in_features, module.out_features, module.r[adapter]
            frozen = numbers_in(module.base_weight)
        else:
            frozen = sum(map(numbers_in, module.parameters())) - trained
        kind = path.rpartition(".")[2], *shape
        groups.setdefault(kind, []).append((trained, frozen))
    return [
        ModuleKind(name, d_in, d_out, len(sizes), r, *map(sum, zip(*sizes, strict=True)))
        for (name, d_in, d_out, r), sizes in groups.items()
    ]
