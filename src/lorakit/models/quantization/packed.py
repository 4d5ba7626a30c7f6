"""The contract of backends for checkpoints that are published packed: GPTQ, AWQ, FP8, ….

Such a checkpoint holds several tensors in place of a weight. A backend says what they are called
and what they stand for; `packed_loading.py` loads a model of them, in which the weights of linear
layers stay packed. They are unpacked by plain tensor operations, so that neither kernels nor
packages of the format are needed, on any device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from lorakit.errors import InputError
from lorakit.models.quantization.backend import Backend, backends

if TYPE_CHECKING:
    import torch

    from lorakit.models.shards import StoredTensor


Roles = Mapping[str, str | tuple[str, ...]]
"""The ends of tensors' names by what the tensors are."""


@dataclass(frozen=True)
class Packing:
    """How one weight lies in the files.

    Attributes:
        parts: its tensors, by their roles.
        shape: of the unpacked weight.
        details: what else a backend needs to unpack it.
    """

    backend: PackedBackend
    parts: Mapping[str, StoredTensor]
    shape: tuple[int, ...]
    details: Mapping[str, Any]

    @property
    def bytes(self) -> int:
        """What it takes in the files."""
        return sum(part.size for part in self.parts.values())


class PackedBackend(Backend):
    """A form of published checkpoints.

    Attributes:
        roles: the ends of the names of a weight's tensors, after the part that they share; several
            where a role has other names in other variants.
        main: the role of the tensor that holds the packed numbers.
        anchor: the role by which a packed weight is recognised.
        required: the roles without which a weight cannot be unpacked.
        whole: the end of the unpacked weight's name.
        unread: ends of the names of tensors that say nothing about weights, such as the scales of
            inputs, which are not rounded here.
    """

    roles: ClassVar[Roles]
    main: ClassVar[str] = "q"
    anchor: ClassVar[str] = "q"
    required: ClassVar[tuple[str, ...]]
    whole: ClassVar[str] = ".weight"
    unread: ClassVar[tuple[str, ...]] = ()

    def find(
        self, tensors: Mapping[str, StoredTensor], settings: Mapping[str, Any]
    ) -> tuple[dict[str, Packing], set[str]]:
        """The packed weights among `tensors` by their unpacked names, and all names that are used.

        Args:
            tensors: all that the files hold, by name.
            settings: the `quantization_config` of the model's `config.json`.

        Raises:
            InputError: tensors are missing or do not fit each other, or the form is not known.
        """
        self.check(settings)
        found: dict[str, Packing] = {}
        used = {name for name in tensors if name.endswith(self.unread)} if self.unread else set()
        ends = {role: (own,) if isinstance(own, str) else own for role, own in self.roles.items()}
        (end,) = ends[self.anchor]
        for name in tensors:
            if not name.endswith(end) or name in used:
                continue
            stem = name.removesuffix(end)
            names = {
                role: stem + own
                for role, several in ends.items()
                for own in reversed(several)
                if stem + own in tensors
            }
            parts = {role: tensors[own] for role, own in names.items()}
            if lacking := [stem + ends[role][0] for role in self.required if role not in parts]:
                raise InputError(
                    f"model: {tensors[name].path} has {name}, and no {lacking[0]}, without which "
                    f"{self.name} cannot be unpacked: copy or fetch the model again"
                )
            try:
                shape, details = self.layout(stem, parts, settings)
            except (ValueError, IndexError, ZeroDivisionError) as error:
                shapes = ", ".join(f"{own} {parts[role].shape}" for role, own in names.items())
                raise InputError(
                    f"model: {tensors[name].path}: the shapes of {self.name} do not fit each "
                    f"other or config.json ({shapes})"
                ) from error
            found[stem + self.whole] = Packing(self, parts, shape, details)
            used.update(names.values())
        return found, used

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raises InputError for a variant of the form that cannot be unpacked."""

    def layout(
        self, stem: str, parts: Mapping[str, StoredTensor], settings: Mapping[str, Any]
    ) -> tuple[tuple[int, ...], dict[str, Any]]:
        """The shape of the unpacked weight, and `Packing.details`.

        Raises ValueError where the shapes of `parts` do not fit each other.
        """
        raise NotImplementedError

    def values(
        self, parts: Mapping[str, torch.Tensor], packing: Packing, dtype: torch.dtype
    ) -> torch.Tensor:
        """The unpacked weight, of `packing.shape`, computed in `dtype`: float32 or wider."""
        raise NotImplementedError

    def recognises(self, weight: object) -> bool:
        packing = getattr(weight, "packing", None)
        return isinstance(packing, Packing) and packing.backend is self

    def dequantize(self, weight: Any, layer: Any, dtype: torch.dtype | None) -> torch.Tensor:
        import torch

        wide = torch.float64 if dtype == torch.float64 else torch.float32
        W = self.values({**weight.parts, self.main: weight.data}, weight.packing, wide)
        return W if dtype is None else W.to(dtype)

    def numel(self, weight: Any) -> int:
        return prod(weight.packing.shape)

    def unpack(self, model: Any) -> Any:
        from lorakit.models.quantization.packed_linear import plain_linears

        return plain_linears(super().unpack(model))


def packed_settings(config: Any) -> tuple[PackedBackend, dict[str, Any]] | None:
    """The backend that reads the weights of a model with this configuration, and its settings.

    None where they are not packed, or by a method that transformers unpacks.
    """
    from lorakit.models.skeleton import stored_quantization

    settings = stored_quantization(config)
    method = settings.get("quant_method")
    for known in backends():
        if isinstance(known, PackedBackend) and known.name == method:
            return known, settings
    return None


def divided(size: int, by: int) -> int:
    """`size / by`; ValueError where it is not whole."""
    if size % by:
        raise ValueError
    return size // by
