"""The initialisations that `LoraConfig.init_lora_weights` may name, each registered once.

A new adapter changes nothing until it is trained: one of its factors is zero, or what both
factors make is subtracted again (`InitialFactors`). A new initialisation is one file that calls
`register`, and one line in this package's `__init__.py`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from lorakit.errors import InputError, listed

PREPARED = "lora_prepared"
"""The attribute of a base layer under which factors from data wait for its next adapter."""

Settings = TypeVar("Settings")


class InitialFactors(nn.Module):
    """The factors that an adapter started from, where they are not zero: `A` and `B`, frozen.

    PiSSA and OLoRA start from a part of `W` and train against the rest of it. Here `W` stays, and
    the layer computes `W + s (B A - B0 A0)`, so that other adapters, unloading and merging see the
    base's own weight.
    """

    def __init__(self, A: torch.Tensor, B: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("A", A.detach().clone())
        self.register_buffer("B", B.detach().clone())


class Factors(NamedTuple):
    """First values `A` (r, d_in) and `B` (d_out, r), of any floating dtype.

    `base` (d_out, d_in) replaces the weight, where an initialisation changes it.
    """

    A: torch.Tensor
    B: torch.Tensor
    base: torch.Tensor | None = None


@dataclass(frozen=True)
class InitSite:
    """One layer whose factors an initialisation makes.

    Attributes:
        A, B: the adapter's parameters (r, d_in, …) and (d_out, r, …), without values yet.
        W: the frozen weight (d_out, d_in); of an embedding (dim, num_embeddings).
        scaling: the factor before `B A`.
        value: `init_lora_weights`.
        settings: an instance of `Initialization.settings`, if it has one.
        data: what `Initialization.collect` found for this layer; None without data.
    """

    A: torch.Tensor
    B: torch.Tensor
    W: torch.Tensor
    scaling: float
    value: bool | str
    settings: Any = None
    data: torch.Tensor | None = None

    @property
    def r(self) -> int:
        """The adapter's rank."""
        return self.A.shape[0]


@dataclass(frozen=True)
class DataPass:
    """Batches of data, and the model to run over them.

    Attributes:
        modules: the linear modules to adapt, by path.
        batches: dictionaries as the model takes them.
        run: runs the model on a batch and returns its loss, a scalar (or calls its backward).
        ranks: each module's rank.
        model: put into training or evaluation mode meanwhile; None leaves the mode alone.
    """

    modules: Mapping[str, nn.Module]
    batches: Iterable[Any]
    run: Callable[[Any], Any]
    ranks: Mapping[str, int]
    settings: Any = None
    model: nn.Module | None = None


@torch.no_grad()
def normal_embedding(site: InitSite) -> Factors:
    """loralib's values for an embedding: zero `A` (r, num_embeddings), normal `B` (dim, r)."""
    return Factors(torch.zeros_like(site.A), nn.init.normal_(torch.empty_like(site.B)))


@dataclass(frozen=True, kw_only=True)
class Initialization:
    """One initialisation, under one value of `init_lora_weights`.

    Attributes:
        value: of `init_lora_weights`, in lower case.
        make: the factors of one layer; raises InputError where there are none.
        family: a regular expression for further values.
        embedding: the factors of an embedding.
        bias: fills the bias of `B` (`lora_bias`) in place.
        settings, field: the class of its settings and the field of `LoraConfig` that has them.
        collect: a tensor from data for each module's path, which `make` finds as `InitSite.data`.
            Factors may have another rank than the configuration, which then gets theirs.
        subtracted: `B A` is not zero, and is subtracted again.
        repeatable: `W` alone gives the same factors each time.
        changes_base: `make` gives a weight in place of the base's own.
        trains_B: whether `B` is trained, and not only `A`.
        any_shape: convolutions and parameters can have it too.
    """

    value: bool | str
    make: Callable[[InitSite], Factors]
    family: str = ""
    embedding: Callable[[InitSite], Factors] = normal_embedding
    bias: Callable[[torch.Tensor], torch.Tensor] = nn.init.zeros_
    settings: type | None = None
    field: str = ""
    collect: Callable[[DataPass], dict[str, torch.Tensor]] | None = None
    subtracted: bool = False
    repeatable: bool = False
    changes_base: bool = False
    trains_B: bool = True  # noqa: N815 (the paper's letter)
    any_shape: bool = False


@dataclass(frozen=True)
class ChosenInit:
    """The initialisation that a `LoraConfig` has chosen, with its settings."""

    kind: Initialization
    value: bool | str
    settings: Any = None

    @torch.no_grad()
    def fill(
        self,
        A: torch.Tensor,
        B: torch.Tensor,
        W: torch.Tensor,
        scaling: float,
        prepared: tuple[torch.Tensor, torch.Tensor] | None = None,
        *,
        embedding: bool = False,
    ) -> tuple[InitialFactors | None, torch.Tensor | None]:
        """Fills an adapter's factors in place; the arguments are `InitSite`'s.

        Args:
            prepared: factors that were made from data.

        Returns: what is subtracted again, and the weight that replaces the base's, if any.
        """
        make = self.kind.embedding if embedding else self.kind.make
        site = InitSite(A, B, W, scaling, self.value, self.settings)
        made = Factors(*prepared) if prepared and self.kind.collect else make(site)
        A.copy_(made.A)
        B.copy_(made.B)
        subtracted = self.kind.subtracted and not embedding
        return InitialFactors(A, B) if subtracted else None, made.base


_KNOWN: dict[bool | str, Initialization] = {}


def register(*initializations: Initialization) -> None:
    """Makes initialisations known under their values; a later one replaces an earlier one."""
    _KNOWN.update({one.value: one for one in initializations})


def registered() -> list[Initialization]:
    """All initialisations, in the order in which they were registered."""
    return list(_KNOWN.values())


def find(value: object) -> Initialization:
    """The initialisation of this name.

    Raises:
        InputError: there is none.
    """
    if isinstance(value, (bool, str)):
        if (own := _KNOWN.get(value)) is not None:
            return own
        for one in _KNOWN.values():
            if one.family and re.fullmatch(one.family, str(value)):
                return one
    names = sorted(name for name in _KNOWN if isinstance(name, str))
    raise InputError(
        f"init_lora_weights={value!r} is not supported: use true, {', '.join(names)} or false"
    )


def as_settings(kind: type[Settings], field: str, values: Any) -> Settings:
    """The field of a `LoraConfig`, a dictionary or an object, as an instance of `kind`.

    Raises:
        InputError: there is no such setting.
    """
    if values is not None and not isinstance(values, dict):
        values = dataclasses.asdict(values)
    known = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name in values or {}:
        if name not in known:
            raise InputError(f"{field} has no {name}; it has {listed(known)}")
    return kind(**(values or {}))
