"""An adapter's folder as the updates that it makes: one `scaling * B A` a module, without a model.

This is where keys and shapes of the file are turned into matrices, and where what is not a product
of two matrices is named. What is done with the updates is left to the verbs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lorakit.errors import InputError
from lorakit.lora.checkpoint import PREFIX, read_adapter, read_initial
from lorakit.lora.config import LoraConfig
from lorakit.lora.init.decompose import at_least_float32

# A factor's ending in PEFT's files, and that of its partner.
_PAIRS = {"lora_A.weight": "lora_B.weight", "lora_embedding_A": "lora_embedding_B"}
_PARTNERS = set(_PAIRS.values())
MAGNITUDES = ".lora_magnitude_vector"
COPY = ".base_layer.weight"


@dataclass(frozen=True)
class ModuleUpdate:
    """One module's update `scaling * B A`, as the file has it.

    Attributes:
        path: of the module in the base model.
        A: (r, d_in), of a convolution (r, d_in, *kernel).
        B: (d_out, r), of a convolution (d_out, r, 1, …). An embedding's update is stored
            transposed: d_in counts its tokens.
        scaling: what `B A` is multiplied by.
        bias: of `B` (d_out,), multiplied by `scaling` too.
        initial: factors like A and B whose product is taken off (PiSSA, OLoRA).
    """

    path: str
    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    ending: str = "lora_A.weight"
    bias: torch.Tensor | None = None
    initial: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def r(self) -> int:
        """The rank that the module was given."""
        return self.A.shape[0]

    @property
    def is_matrix(self) -> bool:
        """Whether the base's weight is a matrix, and not a convolution's kernels."""
        return self.A.dim() == 2

    @property
    def is_embedding(self) -> bool:
        """Whether the module is an embedding, whose update is stored transposed."""
        return self.ending == "lora_embedding_A"

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A (n, d_in) and B (d_out, n) in at least float32, of which the update is `scaling B A`.

        n is r, or 2 r where the start is taken off again; kernels are flattened into d_in.
        """
        A, B = at_least_float32(self.A.flatten(1)), at_least_float32(self.B.flatten(1))
        if self.initial is None:
            return A, B
        A0, B0 = (factor.flatten(1).to(A) for factor in self.initial)
        return torch.cat([A, A0]), torch.cat([B, -B0], dim=1)

    def without_start(self) -> ModuleUpdate:
        """The same update as one pair, of 2 r where a start is taken off again."""
        if self.initial is None:
            return self
        A0, B0 = self.initial
        A, B = torch.cat([self.A, A0.to(self.A)]), torch.cat([self.B, -B0.to(self.B)], dim=1)
        return replace(self, A=A, B=B, initial=None)

    def folded(self, scaling: float = 1.0) -> torch.Tensor:
        """`B` for an update that is written with another scaling: (d_out, r).

        It stays in its dtype where nothing is lost by that, and is float32 otherwise.
        """
        wide = self.B.float() * (self.scaling / scaling)
        narrow = wide.to(self.B.dtype)
        return narrow if torch.equal(narrow.float(), wide) else wide

    def tensors(
        self, A: torch.Tensor, B: torch.Tensor, bias: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Other factors A (n, d_in), B (d_out, n) for this module, under PEFT's keys."""
        key = f"{PREFIX}{self.path}."
        found = {
            key + self.ending: A.reshape(-1, *self.A.shape[1:]).contiguous(),
            key + _PAIRS[self.ending]: B.reshape(*B.shape, *self.B.shape[2:]).contiguous(),
        }
        return found if bias is None else {**found, f"{key}lora_B.bias": bias}


@dataclass(frozen=True)
class Skipped:
    """A part of the adapter that has no update of this form, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class AdapterUpdates:
    """An adapter's folder, read.

    `updates` are by module's path, layer 9 before layer 10; `others` are all tensors that are not
    factors, by key; `skipped` are factors that make no update of this form.
    """

    folder: Path
    config: LoraConfig
    updates: dict[str, ModuleUpdate]
    others: dict[str, torch.Tensor]
    skipped: list[Skipped]

    @property
    def has_magnitudes(self) -> bool:
        """Whether it is a DoRA adapter, whose whole update needs the base's weights."""
        return self.config.use_dora or any(key.endswith(MAGNITUDES) for key in self.others)

    def trained(self) -> list[torch.Tensor]:
        """All tensors but copies of the base's weights, of factors those that make an update."""
        factors = [t for u in self.updates.values() for t in (u.A, u.B, u.bias) if t is not None]
        return factors + [t for key, t in self.others.items() if not key.endswith(COPY)]

    def require_updates(self) -> None:
        """Raises InputError unless every low-rank part is an update of a known size."""
        for part in self.skipped:
            raise InputError(f"{self.folder}: {part.path}: {part.reason}")
        if self.config.init.kind.changes_base:
            raise InputError(
                f"{self.folder} is an adapter for the base as LoftQ quantised it, which no other "
                "configuration can say: merge it with lorakit merge instead"
            )
        for key, tensor in self.others.items():
            if not key.startswith(PREFIX):
                raise InputError(f"{self.folder} holds {key}, which is not part of an adapter")
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise InputError(f"{self.folder}: {key} holds NaN or Inf")


def read_updates(folder: str | Path) -> AdapterUpdates:
    """The adapter in `folder`. Its tensors stay in the file until they are used.

    Raises:
        InputError: it is no adapter's folder, or it is damaged.
    """
    config, tensors = read_adapter(folder)
    found, others, skipped = split(config, tensors, read_initial(folder))
    updates = {update.path: update for update in found}
    return AdapterUpdates(Path(folder), config, updates, others, skipped)


def split(
    config: LoraConfig,
    tensors: Mapping[str, torch.Tensor],
    initial: Mapping[str, torch.Tensor] | None = None,
) -> tuple[list[ModuleUpdate], dict[str, torch.Tensor], list[Skipped]]:
    """An adapter's tensors as updates, the tensors that are not factors, and unusable factors.

    Arguments are what `lorakit.lora.checkpoint.read_adapter` and `read_initial` return.
    """
    initial = initial or {}
    found: list[ModuleUpdate] = []
    others: dict[str, torch.Tensor] = {}
    skipped: list[Skipped] = []
    for key in sorted(tensors, key=by_number):
        ending = next((end for end in (*_PAIRS, *_PARTNERS) if key.endswith(f".{end}")), None)
        stem = key.removesuffix(str(ending))
        if ending is None:
            if not key.endswith(".lora_B.bias"):
                others[key] = tensors[key]
            continue
        stored = stem.removeprefix(PREFIX).removesuffix(".")
        path = stored.replace("base_layer.", "").removesuffix(".base_layer")
        if ending in _PARTNERS:
            if not any(stem + A in tensors for A, B in _PAIRS.items() if ending == B):
                skipped.append(Skipped(path, "its factor A is missing"))
            continue
        A, B = tensors[key], tensors.get(stem + _PAIRS[ending])
        start = initial.get(f"{stored}.A"), initial.get(f"{stored}.B")
        if B is None or (reason := _obstacle(config, path, A, B, start[0] is not None)):
            skipped.append(Skipped(path, "its factor B is missing" if B is None else reason))
            continue
        found.append(
            ModuleUpdate(
                path,
                A,
                B,
                config.scaling_for(path),
                ending,
                tensors.get(f"{stem}lora_B.bias"),
                (start[0], start[1]) if start[0] is not None and start[1] is not None else None,
            )
        )
    return found, others, skipped


def by_number(key: str) -> list[tuple[int, str]]:
    """The order of a model's modules; a file's is that of the alphabet."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in key.split(".")]


def layer_of(path: str) -> int | None:
    """The number of the layer that a module stands in: the first number in its path."""
    match = re.search(r"\.(\d+)\.", path)
    return int(match[1]) if match else None


def _obstacle(
    config: LoraConfig, path: str, A: torch.Tensor, B: torch.Tensor, has_start: bool
) -> str:
    """Why this module's update is not `scaling` times the product of two matrices; or empty."""
    if A.dim() < 2 or B.dim() < 2:
        return "its factors are not matrices"
    if A.shape[0] != B.shape[1]:
        if A.dim() > 2 and A.shape[0] % B.shape[1] == 0:
            return "a grouped convolution, whose update is not a product of two matrices"
        return f"its factors do not fit: A has rank {A.shape[0]}, B {B.shape[1]}"
    if A.shape[0] != (r := config.rank_for(path)):
        if config.target_parameters and A.shape[0] % r == 0:
            return f"a stack of {A.shape[0] // r} matrices (experts), each with its own update"
        return f"has rank {A.shape[0]} in the file and {r} in the configuration"
    if config.init.kind.subtracted and not has_start:
        how = config.init_lora_weights
        return (
            f"started from {how} factors that are not in the folder, so its change is unknown: "
            "save it with path_initial_model_for_weight_conversion where it was trained"
        )
    if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
        return "holds NaN or Inf"
    return ""
