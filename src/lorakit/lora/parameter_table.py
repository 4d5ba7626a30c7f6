"""Where an adapter's parameters are: a line for each kind of module that it has a part in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lorakit.lora.injection import wrapped_modules
from lorakit.lora.layers import LoraLayer
from lorakit.lora.model import LoraModel
from lorakit.lora.parameters import numbers_in


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


def parameter_table(model: LoraModel, adapter_name: str | None = None) -> list[ModuleKind]:
    """The kinds of modules in the order in which the model holds them.

    Args:
        adapter_name: the active adapter when left out.
    """
    adapter = adapter_name or model.active_adapter
    groups: dict[tuple[str, int | None, int | None, int | None], list[tuple[int, int]]] = {}
    for kind, sizes in _parts(model, adapter):
        groups.setdefault(kind, []).append(sizes)
    return [
        ModuleKind(
            name=name,
            d_in=d_in,
            d_out=d_out,
            count=len(sizes),
            r=r,
            trained=sum(trained for trained, _ in sizes),
            frozen=sum(frozen for _, frozen in sizes),
        )
        for (name, d_in, d_out, r), sizes in groups.items()
    ]


def _parts(
    model: LoraModel, adapter: str
) -> Iterator[tuple[tuple[str, int | None, int | None, int | None], tuple[int, int]]]:
    """The kind of every module with a part in `adapter`, and its trained and frozen parameters."""
    for path, module in wrapped_modules(model.get_base_model()):
        if adapter not in module.adapters:
            continue
        trained = sum(tensor.numel() for tensor in module.adapter_tensors(adapter).values())
        name = path.rpartition(".")[2]
        if isinstance(module, LoraLayer):
            shape = (module.in_features, module.out_features)
            yield (name, *shape, module.r[adapter]), (trained, numbers_in(module.base_weight))
        else:
            frozen = sum(map(numbers_in, module.parameters())) - trained
            yield (name, None, None, None), (trained, frozen)
