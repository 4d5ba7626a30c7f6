"""Two adapters beside each other: how large their updates are, and whether they point alike.

Everything comes from the factors; no update is ever formed. Answers are compared by those who load
a model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from lorakit.adapters.chat_template import adapter_template, template_notice
from lorakit.adapters.derived import origin
from lorakit.adapters.inspect import SHARE
from lorakit.adapters.lineage import standing_on
from lorakit.adapters.updates import AdapterUpdates, ModuleUpdate, Skipped, layer_of, read_updates
from lorakit.errors import InputError, listed
from lorakit.progress import track

# Fields that say how an adapter was used or by what, and not what it is.
_BOOKKEEPING = {"inference_mode", "peft_version", "auto_mapping", "base_model_name_or_path"}


@dataclass(frozen=True)
class ModuleDiff:
    """One module that both adapters change.

    Attributes:
        norms: ‖ΔW‖ of each.
        cosine: of the two updates as vectors, tr(ΔW_1ᵀ ΔW_2) / (‖ΔW_1‖ ‖ΔW_2‖), in [-1, 1].
        output_overlap, input_overlap: of the column and of the row spaces, in [0, 1]; see
            `overlap`.
        chance: what random directions of the same numbers would overlap, by output and input.
        directions: how many directions of each are compared: the largest with `SHARE` of ‖ΔW‖².
    """

    path: str
    norms: tuple[float, float]
    cosine: float
    output_overlap: float
    input_overlap: float
    chance: tuple[float, float]
    directions: tuple[int, int]


@dataclass(frozen=True)
class Summary:
    """Several modules as one: norms and cosine of all entries, the mean of the overlaps."""

    name: str
    modules: int
    norms: tuple[float, float]
    cosine: float
    output_overlap: float
    input_overlap: float
    chance: float


@dataclass(frozen=True)
class Diff:
    """How two adapters differ.

    `only` are the paths of modules that one of them alone changes, `settings` the fields of the
    configurations that differ, and `chat_template` (SHA-256, where both say), `skipped` what has
    no update to compare, of each. `notices` tell where a base has another chat template now.
    """

    adapters: tuple[str, str]
    bases: tuple[str | None, str | None]
    same_weights: bool | None
    settings: dict[str, tuple[Any, Any]]
    modules: list[ModuleDiff]
    only: tuple[list[str], list[str]]
    skipped: tuple[list[Skipped], list[Skipped]]
    identical: bool
    notices: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The comparison as plain JSON types."""
        return asdict(self)

    def by_kind(self) -> list[Summary]:
        """The modules by the last part of their paths."""
        return _grouped((m.path.rpartition(".")[2], m) for m in self.modules)

    def by_layer(self) -> list[Summary]:
        """The modules by the layer that they stand in; those outside all layers by their path."""
        named = []
        for module in self.modules:
            layer = layer_of(module.path)
            named.append((module.path if layer is None else f"layer {layer}", module))
        return _grouped(named)

    def overall(self) -> Summary:
        """All modules as one."""
        (summary,) = _grouped(("all", module) for module in self.modules)
        return summary


def _without_frozen(*folders: str | Path) -> tuple[str, ...]:
    """A notice for each adapter that is added to frozen ones, which are not compared."""
    return tuple(
        f"{folder} is added to the frozen {listed([one.path for one in below])}, which the figures "
        "leave out and answers do not"
        for folder in folders
        if (below := standing_on(folder))
    )


def diff(first: str | Path, second: str | Path) -> Diff:
    """Compares the adapters in two folders.

    Raises:
        InputError: one is no adapter, or they share no module of one shape.
    """
    files = read_updates(first), read_updates(second)
    one, other = files
    shared = [path for path in one.updates if path in other.updates]
    for path in shared:
        sizes = [(u.A.shape[1:], u.B.shape[0]) for u in (one.updates[path], other.updates[path])]
        if sizes[0] != sizes[1]:
            raise InputError(
                f"{first} and {second} are for different base models: {path} has another shape"
            )
    if not shared:
        raise InputError(f"{first} and {second} change no module in common")
    origins = [origin(file.folder, file.config) for file in files]
    prints = [o.base_fingerprint for o in origins]
    return Diff(
        adapters=(str(first), str(second)),
        bases=(origins[0].base_model, origins[1].base_model),
        same_weights=prints[0] == prints[1] if all(prints) else None,
        settings=_settings(*files),
        modules=[
            _compared(one.updates[path], other.updates[path])
            for path in track(shared, "comparing modules")
        ],
        only=(_only(one, other), _only(other, one)),
        skipped=(one.skipped, other.skipped),
        identical=_identical(one, other),
        notices=(
            *_without_frozen(first, second),
            *dict.fromkeys(
                notice
                for file, found in zip(files, origins, strict=True)
                if (notice := template_notice(file.folder, found.base_model))
            ),
        ),
    )


def overlap(U: torch.Tensor, V: torch.Tensor) -> float:
    """How much of the smaller of two subspaces lies in the other, 0 (nothing) to 1 (all of it).

    `‖Uᵀ V‖² / min(i, j)` with orthonormal columns U (d, i) and V (d, j): the similarity on the
    Grassmann manifold of Hu et al. 2021, arXiv:2106.09685, section 7.2 and appendix G. It is the
    mean squared cosine of the principal angles.
    """
    return (U.T @ V).square().sum().item() / min(U.shape[1], V.shape[1])


def inner_product(one: ModuleUpdate, other: ModuleUpdate) -> float:
    """tr(ΔW_1ᵀ ΔW_2), from the factors: the sum of (B_1ᵀ B_2) ∘ (A_1 A_2ᵀ), times the scalings."""
    (A1, B1), (A2, B2) = ((A.double(), B.double()) for A, B in (one.factors(), other.factors()))
    return one.scaling * other.scaling * ((B1.T @ B2) * (A1 @ A2.T)).sum().item()


def _compared(one: ModuleUpdate, other: ModuleUpdate) -> ModuleDiff:
    U1, V1, norm1 = _directions(one)
    U2, V2, norm2 = _directions(other)
    product = norm1 * norm2
    most = max(U1.shape[1], U2.shape[1])
    return ModuleDiff(
        one.path,
        (norm1, norm2),
        max(-1.0, min(1.0, inner_product(one, other) / product)) if product else 0.0,
        overlap(U1, U2) if product else 0.0,
        overlap(V1, V2) if product else 0.0,
        (most / len(U1), most / len(V1)),
        (U1.shape[1], U2.shape[1]),
    )


def _directions(update: ModuleUpdate) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The largest output directions (d_out, k) and input directions (d_in, k), and ‖ΔW‖."""
    A, B = update.factors()
    left, small_left = torch.linalg.qr(B.double())
    right, small_right = torch.linalg.qr(A.double().T)
    U, S, Vh = torch.linalg.svd(small_left @ small_right.T, full_matrices=False)
    squares = S.square()
    total = squares.sum()
    k = int((squares.cumsum(0) < SHARE * total).sum()) + 1 if total > 0 else 0
    norm = abs(update.scaling) * total.sqrt().item()
    return left @ U[:, :k], right @ Vh[:k].T, norm


def _settings(one: AdapterUpdates, other: AdapterUpdates) -> dict[str, tuple[Any, Any]]:
    mine, theirs = one.config.to_dict(), other.config.to_dict()
    fields = sorted(mine.keys() | theirs.keys())
    found = {
        field: (mine.get(field), theirs.get(field))
        for field in fields
        if field not in _BOOKKEEPING and mine.get(field) != theirs.get(field)
    }
    templates = adapter_template(one.folder).digest, adapter_template(other.folder).digest
    if None not in templates and len(set(templates)) > 1:
        found["chat_template"] = templates
    return found


def _only(one: AdapterUpdates, other: AdapterUpdates) -> list[str]:
    """The modules that `one` changes and `other` does not, those trained whole among them."""
    updates = [path for path in one.updates if path not in other.updates]
    return updates + [key for key in one.others if key not in other.others]


def _identical(one: AdapterUpdates, other: AdapterUpdates) -> bool:
    if one.updates.keys() != other.updates.keys() or one.others.keys() != other.others.keys():
        return False
    pairs = [(one.others[key], other.others[key]) for key in one.others]
    for path, update in one.updates.items():
        theirs = other.updates[path]
        if update.scaling != theirs.scaling:
            return False
        pairs += [(update.A, theirs.A), (update.B, theirs.B)]
    return all(torch.equal(a, b) for a, b in pairs)


def _grouped(named: Iterable[tuple[str, ModuleDiff]]) -> list[Summary]:
    groups: dict[str, list[ModuleDiff]] = {}
    for name, module in named:
        groups.setdefault(name, []).append(module)
    return [_summary(name, group) for name, group in groups.items()]


def _summary(name: str, group: list[ModuleDiff]) -> Summary:
    norms = math.hypot(*(m.norms[0] for m in group)), math.hypot(*(m.norms[1] for m in group))
    inner = math.fsum(m.cosine * m.norms[0] * m.norms[1] for m in group)
    product = norms[0] * norms[1]
    return Summary(
        name,
        len(group),
        norms,
        inner / product if product else 0.0,
        fmean(m.output_overlap for m in group),
        fmean(m.input_overlap for m in group),
        fmean(fmean(m.chance) for m in group),
    )
