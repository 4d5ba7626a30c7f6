"""The singular values of every update of an adapter, and how many directions it really uses.

They come from the adapter's own files, without the base model: `scaling * B A` has at most r
singular values that are not zero, and a QR of each factor leaves an r × r matrix to decompose.
What is drawn from the numbers is left to those who show them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lorakit.adapters.updates import COPY, MAGNITUDES, ModuleUpdate, Skipped, split
from lorakit.lora.checkpoint import PREFIX
from lorakit.lora.config import LoraConfig
from lorakit.progress import track


@dataclass(frozen=True)
class Spectrum:
    """One module's update `scaling * B A`, by its singular values.

    Attributes:
        shape: (d_out, d_in). An embedding's update is stored transposed, which changes neither
            norm nor singular values.
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


def spectra(
    config: LoraConfig,
    tensors: Mapping[str, torch.Tensor],
    initial: Mapping[str, torch.Tensor] | None = None,
) -> tuple[list[Spectrum], list[Skipped]]:
    """The spectrum of every module's update, layer 9 before layer 10.

    With DoRA it is that of `scaling * B A`, the change of direction before magnitudes are applied,
    which needs no base weight. A bias of `B` is not part of it.

    Arguments are those of `updates.split`.

    Returns: the spectra, and what has none with the reason.
    """
    updates, others, skipped = split(config, tensors, initial)
    found = []
    for update in track(updates, "decomposing modules"):
        if update.is_matrix:
            found.append(spectrum(update))
        else:
            skipped.append(Skipped(update.path, "a convolution: its update is not a matrix"))
    for key in others:
        if not key.endswith(MAGNITUDES):
            copied = key.endswith(COPY)
            reason = "a copy of the base's weight" if copied else "trained whole, not as B A"
            skipped.append(Skipped(key.removeprefix(PREFIX), reason))
    return found, skipped


def spectrum(update: ModuleUpdate) -> Spectrum:
    """The spectrum of one module's update; a convolution's kernels are flattened into d_in."""
    A, B = update.factors()
    left = torch.linalg.qr(B.double(), mode="r").R
    right = torch.linalg.qr(A.double().T, mode="r").R
    values = (abs(update.scaling) * torch.linalg.svdvals(left @ right.T)).tolist()
    shape = B.shape[0], A.shape[1]
    return Spectrum(update.path, update.r, shape, update.scaling, tuple(values))
