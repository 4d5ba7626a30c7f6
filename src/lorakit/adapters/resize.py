"""An adapter with other ranks: every module's update cut to its best approximation.

Which directions a module keeps is decided by its singular values alone; what that does to answers
is measured by those who have rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from lorakit.adapters.derived import KindRanks, Truncations, origin, write_joined
from lorakit.adapters.lineage import require_complete
from lorakit.adapters.manifest import Derivation
from lorakit.adapters.spectrum import spectrum
from lorakit.adapters.stacked_updates import stacked, with_matrices
from lorakit.adapters.updates import COPY, read_updates
from lorakit.errors import InputError
from lorakit.folder_lock import reserves
from lorakit.lora.combination import truncate
from lorakit.progress import track


@dataclass(frozen=True)
class ResizeReport:
    """A resized adapter.

    `kinds` has ranks and errors by kind of module; `error` is ‖ΔW - ΔW'‖ / ‖ΔW‖ over all modules.
    `before` and `after` count parameters.
    """

    output: str
    modules: int
    before: int
    after: int
    error: float
    kinds: list[KindRanks]
    notices: list[str]


@reserves("output")
def resize(
    adapter: str | Path, output: str | Path, *, rank: int | None = None, energy: float | None = None
) -> ResizeReport:
    """Writes the adapter with other ranks to the new folder `output`.

    Args:
        rank: at most this rank a module.
        energy: the share of each module's ‖ΔW‖² to keep, in (0, 1]; each gets the least rank
            that does. A module that changes nothing gets rank 1.

    Raises:
        InputError: the adapter cannot be resized, or not exactly one of `rank` and `energy` is
            given, or it is out of range.
        LorakitError: the folder cannot be written.
    """
    check_size(rank, energy)
    require_complete(adapter, verb="resized")
    file = read_updates(adapter)
    known = origin(file.folder, file.config)
    (file,) = with_matrices([file], known.base_model)
    file.require_updates()
    if not file.updates:
        raise InputError(
            f"{adapter} has no LoRA factors (lora_A, lora_B): there is nothing to resize"
        )
    possible = {path: min(*map(len, _sides(u.factors()))) for path, u in file.updates.items()}
    if rank is not None and rank > max(possible.values()):
        raise InputError(
            f"--rank {rank} is more than any module has: the largest is {max(possible.values())}"
        )
    notices = []
    if rank is not None and (fewer := sum(1 for most in possible.values() if most < rank)):
        notices.append(f"{fewer} of {len(possible)} modules have fewer than {rank} directions")
    if file.has_magnitudes:
        notices.append(
            "this is a DoRA adapter: its magnitudes stay as they are, and errors are those of B A, "
            "before magnitudes are applied"
        )
    tensors: dict[str, torch.Tensor] = dict(file.others)
    cut = Truncations()
    for path, update in track(file.updates.items(), "resizing modules"):
        A, B = update.factors()
        wanted = rank if rank is not None else max(1, spectrum(update).directions(energy or 1.0))
        found = truncate(update.scaling * B, A, wanted)
        bias = None if update.bias is None else update.scaling * update.bias
        tensors |= update.tensors(found.A, found.B, bias)
        cut.add(path, found)
    tensors, ranks = stacked(tensors, cut.ranks, file.updates.values())
    derivation = Derivation(
        made_by="resize",
        options={"rank": rank} if rank is not None else {"energy": energy},
        figures={"error": cut.error},
        base_model=known.base_model,
        base_fingerprint=known.base_fingerprint,
        labels=known.labels,
        notices=notices,
    )
    config = file.config.with_ranks(ranks, init_lora_weights=True, inference_mode=True)
    write_joined(output, [file.folder], config, tensors, derivation)
    return ResizeReport(
        str(output),
        len(cut.ranks),
        sum(tensor.numel() for tensor in file.trained()),
        sum(tensor.numel() for key, tensor in tensors.items() if not key.endswith(COPY)),
        cut.error,
        cut.kinds(),
        notices,
    )


def check_size(rank: int | None, energy: float | None) -> None:
    """Raises InputError unless exactly one of the two is given, and in range."""
    if (rank is None) == (energy is None):
        raise InputError("give either --rank or --energy")
    if rank is not None and rank < 1:
        raise InputError(f"--rank must be at least 1, not {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise InputError(f"--energy must be a share in (0, 1], not {energy:g}")


def _sides(factors: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Tensors whose lengths bound the rank of the product: n, d_in and d_out."""
    A, B = factors
    return A, A.T, B
