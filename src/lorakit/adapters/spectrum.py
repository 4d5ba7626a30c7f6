"""The singular values of every update of an adapter, and how many directions it really uses.

They come from the adapter's own files, without the base model: `scaling * B A` has at most r
singular values that are not zero, and a QR of each factor leaves an r × r matrix to decompose.
What is drawn from the numbers is left to those who show them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lorakit.lora.checkpoint import PREFIX

if TYPE_CHECKING:
    from lorakit.lora.config import LoraConfig

# A factor's ending in PEFT's files, and that of its partner.
_PAIRS = {"lora_A.weight": "lora_B.weight", "lora_embedding_A": "lora_embedding_B"}
_PARTNERS = set(_PAIRS.values())


@dataclass(frozen=True)
class Spectrum:
    """One module's update `scaling * B A`, by its singular values.

    Attributes:
        path: of the module in the base model.
        r: the rank that it was given.
        shape: (d_out, d_in). An embedding's update is stored transposed, which changes neither
            norm nor singular values.
        scaling: what `B A` is multiplied by.
        singular_values: of `scaling * B A`, the largest first; at most r of them (2 r where the
            start is taken off again).
    """

    path: str
    r: int
    shape: tuple[int, int]
    scaling: float
    singular_values: tuple[float, ...]

    @property
    def norm(self) -> float:
        """The update's Frobenius norm, ‖ΔW‖."""
        return math.hypot(*self.singular_values)

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the normalised singular values (Roy & Vetterli 2007).

        k where k singular values are equal and the others zero, less where they differ; 0 where
        the update is zero.
        """
        total = math.fsum(self.singular_values)
        shares = [value / total for value in self.singular_values if value > 0] if total else []
        return math.exp(-math.fsum(p * math.log(p) for p in shares)) if shares else 0.0

    def directions(self, share: float) -> int:
        """How many of the largest directions hold `share` of the squared norm ‖ΔW‖²."""
        squares = [value * value for value in self.singular_values]
        wanted, held = share * math.fsum(squares), 0.0
        for number, square in enumerate(squares):
            if held >= wanted:
                return number
            held += square
        return len(squares)


@dataclass(frozen=True)
class Skipped:
    """A part of the adapter that has no spectrum here, and why."""

    path: str
    reason: str


def spectra(
    config: LoraConfig,
    tensors: Mapping[str, torch.Tensor],
    initial: Mapping[str, torch.Tensor] | None = None,
) -> tuple[list[Spectrum], list[Skipped]]:
    """The spectrum of every module's update, layer 9 before layer 10.

    With DoRA it is that of `scaling * B A`, the change of direction before lengths are applied,
    which needs no base weight. A bias of `B` is not part of it.

    Args:
        config, tensors: as `lorakit.lora.checkpoint.read_adapter` gives them.
        initial: as `read_initial` gives them: factors whose product is taken off (PiSSA, OLoRA).

    Returns: the spectra, and what has none with the reason.
    """
    initial = initial or {}
    found: list[Spectrum] = []
    skipped: list[Skipped] = []
    for key in sorted(tensors, key=_by_number):
        A = tensors[key]
        ending = next((end for end in (*_PAIRS, *_PARTNERS) if key.endswith(f".{end}")), None)
        if ending is None:
            if not key.endswith((".lora_B.bias", ".lora_magnitude_vector")):
                copied = key.endswith(".base_layer.weight")
                reason = "a copy of the base's weight" if copied else "trained whole, not as B A"
                skipped.append(Skipped(key.removeprefix(PREFIX), reason))
            continue
        if ending in _PARTNERS:
            continue
        stored = key.removeprefix(PREFIX).removesuffix(f".{ending}")
        path = stored.replace("base_layer.", "").removesuffix(".base_layer")
        B = tensors.get(key.removesuffix(ending) + _PAIRS[ending])
        start = initial.get(f"{stored}.A"), initial.get(f"{stored}.B")
        if B is None or (reason := _obstacle(config, path, A, B, start[0] is not None)):
            skipped.append(Skipped(path, "its factor B is missing" if B is None else reason))
            continue
        scaling = config.scaling_for(path)
        shape = B.shape[0], A.shape[1]
        r = A.shape[0]
        if start[0] is not None and start[1] is not None:
            A, B = torch.cat([A, start[0].to(A)]), torch.cat([B, -start[1].to(B)], dim=1)
        found.append(Spectrum(path, r, shape, scaling, _singular_values(A, B, scaling)))
    return found, skipped


def _by_number(key: str) -> list[tuple[int, str]]:
    """The order of a model's modules; a file's is that of the alphabet."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in key.split(".")]


def _obstacle(
    config: LoraConfig, path: str, A: torch.Tensor, B: torch.Tensor, has_start: bool
) -> str:
    """Why this module's update is not `scaling` times the product of two matrices; or empty."""
    if A.dim() != 2 or B.dim() != 2:
        return "a convolution: its update is no matrix"
    if A.shape[0] != B.shape[1]:
        return f"its factors do not fit: A has rank {A.shape[0]}, B {B.shape[1]}"
    if A.shape[0] != (r := config.rank_for(path)):
        if config.target_parameters and A.shape[0] % r == 0:
            return f"a stack of {A.shape[0] // r} matrices (experts), each with its own update"
        return f"has rank {A.shape[0]} in the file and {r} in the configuration"
    if config.takes_start_off and not has_start:
        how = config.init_lora_weights
        return f"started from {how} factors that are not in the folder, so its change is unknown"
    if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
        return "holds values that are not finite"
    return ""


def _singular_values(A: torch.Tensor, B: torch.Tensor, scaling: float) -> tuple[float, ...]:
    """Of `scaling * B A`, largest first; A (r, d_in), B (d_out, r), in float64."""
    left = torch.linalg.qr(B.double(), mode="r").R
    right = torch.linalg.qr(A.double().T, mode="r").R
    return tuple((abs(scaling) * torch.linalg.svdvals(left @ right.T)).tolist())
