"""Several adapters' folders into one, on their updates ΔW, module by module, without a model.

The methods themselves are `lora/combination.py`'s; here is what can be combined, and what the new
adapter's files say.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorakit.adapters.derived import KindRanks, Truncations, origin, write_joined
from lorakit.adapters.lineage import require_complete, standing_on
from lorakit.adapters.manifest import Derivation
from lorakit.adapters.stacked_updates import MatrixUpdate, stacked, with_matrices
from lorakit.adapters.updates import AdapterUpdates, read_updates
from lorakit.errors import InputError, did_you_mean, listed
from lorakit.folder_lock import reserves
from lorakit.lora import combination as methods
from lorakit.lora.config import LoraConfig
from lorakit.progress import track

METHODS = ("linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune", "knots")
_EXACT = ("linear", "cat")
_BY_ENTRIES = ("ties", "dare_linear", "dare_ties", "magnitude_prune")

_LARGE = 1 << 24  # entries of a module's ΔW

# Fields that say which of the modules that match are adapted: lists of targets with the same ones
# can be united.
_SELECTION = ("exclude_modules", "layers_to_transform", "layers_pattern")


@dataclass(frozen=True)
class CombineReport:
    """A written combination.

    `kinds` has ranks and losses by kind of module; `lost` is the share of ‖ΔW‖², over all modules,
    that was cut off to reach the rank, 0 for exact methods.
    """

    output: str
    method: str
    modules: int
    parameters: int
    lost: float
    kinds: list[KindRanks]
    notices: list[str]


@reserves("output")
def combine(
    adapters: Sequence[str | Path],
    output: str | Path,
    *,
    weights: Sequence[float],
    method: str = "linear",
    rank: int | None = None,
    density: float | None = None,
    seed: int | None = None,
    base: str | None = None,
) -> CombineReport:
    """Writes the combination of `adapters` to the new folder `output`.

    Args:
        weights: one an adapter.
        method: one of `METHODS`. `linear` and `cat` are the weighted sum itself, of the ranks'
            sum; all others but `knots` keep the largest rank among the adapters.
        rank: at most this rank a module; the best approximation of it, with what that loses.
        density: the share of entries that are kept, for `ties`, `dare_…`, `magnitude_prune` and
            `knots`.
        seed: of what `dare_…` drops; None is 0.
        base: the base model that the result is for, where the adapters name different ones.

    Raises:
        InputError: something cannot be combined, or a setting has no effect or is out of range.
        LorakitError: the folder cannot be written.
    """
    _check(adapters, weights, method, rank, density, seed)
    for folder in adapters:
        require_complete(folder, adapters, "combined")
    files = [read_updates(folder) for folder in adapters]
    notices: list[str] = []
    named = (origin(file.folder, file.config).base_model for file in files)
    files = with_matrices(files, base or next(filter(None, named), None))
    _require_combinable(files)
    base_model, base_fingerprint = _common_base(files, base)
    whole = _whole_tensors(files, notices)
    paths = list(dict.fromkeys(path for file in files for path in file.updates))
    _check_rank(files, paths, method, rank, notices)

    lora_method = f"{method}_svd" if method in _BY_ENTRIES else method
    if method in _EXACT and rank is not None:
        lora_method = "svd"
    draws = torch.Generator().manual_seed(seed or 0)
    seeds = torch.randint(2**62, (len(paths),), generator=draws).tolist()
    has_bias = any(file.config.lora_bias for file in files)

    def combined(path: str, own_seed: int) -> tuple[methods.Combined, dict[str, torch.Tensor]]:
        """One module's factors, and its tensors; what is drawn depends on nothing else."""
        parts = [
            (file.updates[path], weight)
            for file, weight in zip(files, weights, strict=True)
            if path in file.updates
        ]
        settings = methods.CombineSettings(
            lora_method, rank, density, generator=torch.Generator().manual_seed(own_seed)
        )
        updates = [methods.Update(*u.factors(), u.scaling, weight) for u, weight in parts]
        found = methods.combine(updates, settings)
        if not (torch.isfinite(found.A).all() and torch.isfinite(found.B).all()):
            raise InputError(f"{path}: the combination has NaN or Inf: give smaller weights")
        first = parts[0][0]
        bias = first.B.new_zeros(first.B.shape[0], dtype=found.B.dtype) if has_bias else None
        for update, weight in parts:
            if bias is not None and update.bias is not None:
                bias += weight * update.scaling * update.bias
        return found, first.tensors(found.A, found.B, bias)

    tensors: dict[str, torch.Tensor] = {}
    cut = Truncations()
    largest = max((u.A[0].numel() * len(u.B) for f in files for u in f.updates.values()), default=0)
    with _workers(largest) as pool:
        made = track(pool.map(combined, paths, seeds), "combining modules", len(paths))
        for path, (found, own) in zip(paths, made, strict=True):
            tensors |= own
            cut.add(path, found)
    if not cut.ranks:
        raise InputError(
            f"{listed(map(str, adapters))}: no adapter has LoRA factors (lora_A, lora_B)"
        )
    shared = sum(1 for path in paths if all(path in file.updates for file in files))
    if shared < len(paths):
        notices.append(f"{len(paths) - shared} of {len(paths)} modules are not in all adapters")
    given = {"rank": rank, "density": density, "seed": seed}
    given = {key: value for key, value in given.items() if value is not None}
    derivation = Derivation(
        made_by="combine",
        options={"method": method, "weights": list(weights), **given},
        figures={"lost": cut.lost},
        notices=notices,
        base_model=base_model,
        base_fingerprint=base_fingerprint,
        labels=origin(files[0].folder, files[0].config).labels,
    )
    known = {path: update for file in files for path, update in file.updates.items()}
    tensors, ranks = stacked(tensors, cut.ranks, (known[path] for path in paths))
    tensors |= whole
    config = _config(files, paths, base_model).with_ranks(ranks, inference_mode=True)
    write_joined(output, [file.folder for file in files], config, tensors, derivation)
    return CombineReport(
        str(output),
        method,
        len(paths),
        sum(tensor.numel() for tensor in tensors.values()),
        cut.lost,
        cut.kinds(),
        derivation.notices,
    )


@contextmanager
def _workers(largest: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that each combine a module, in place of threads within each small product.

    The latter wait for one another more than they compute. Where the largest module has very many
    entries there is one worker, so that only one module's updates are in memory.
    """
    threads = torch.get_num_threads()
    if largest > _LARGE:
        with ThreadPoolExecutor(1) as pool:
            yield pool
        return
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def _check(
    adapters: Sequence[str | Path],
    weights: Sequence[float],
    method: str,
    rank: int | None,
    density: float | None,
    seed: int | None,
) -> None:
    """Raises InputError for what needs no file to be wrong."""
    if method not in METHODS:
        raise InputError(
            f"'{method}' is not a way to combine adapters{did_you_mean(method, METHODS)}: "
            f"there are {', '.join(METHODS)}"
        )
    if not adapters:
        raise InputError("give at least one adapter's folder")
    if len(weights) != len(adapters):
        raise InputError(
            f"there are {len(adapters)} adapters and {len(weights)} weights: give a weight for each"
        )
    for weight, folder in zip(weights, adapters, strict=True):
        if not math.isfinite(weight) or weight == 0:
            cure = "leave the adapter out" if weight == 0 else "give a number"
            raise InputError(f"the weight of {folder} is {weight:g}: {cure}")
    places = [os.path.realpath(folder) for folder in adapters]  # circular links fail later
    for i, place in enumerate(places):
        if place in places[:i]:
            raise InputError(f"{adapters[i]} is given twice: give it once, with the weights' sum")
    needs_density = method in (*_BY_ENTRIES, "knots")
    if density is not None and not needs_density:
        raise InputError(f"--density has no effect with {method}, which keeps all entries")
    if seed is not None and not method.startswith("dare"):
        raise InputError(f"--seed has no effect with {method}, which is not random")
    if seed is not None and not 0 <= seed < 2**63:
        raise InputError(f"--seed must be a whole number from 0 to 2**63 - 1, not {seed}")
    methods.check_settings(methods.CombineSettings(method, rank, density))


def _check_rank(
    files: Sequence[AdapterUpdates],
    paths: Sequence[str],
    method: str,
    rank: int | None,
    notices: list[str],
) -> None:
    """Raises InputError when no module can have `rank`; says how many have less."""
    if rank is None:
        return
    possible = []
    for path in paths:
        factors = [file.updates[path].factors() for file in files if path in file.updates]
        A, B = factors[0]
        together = sum(len(a) for a, _ in factors)
        limits = (A.shape[1], B.shape[0]) if method in _BY_ENTRIES else (together, *A.shape[1:])
        possible.append(min(*limits, B.shape[0]))
    if possible and rank > max(possible):
        raise InputError(
            f"--rank {rank} is more than any module can have: the largest is {max(possible)}"
        )
    if fewer := sum(1 for most in possible if most < rank):
        notices.append(f"{fewer} of {len(paths)} modules have fewer than {rank} directions")


def _require_combinable(files: Sequence[AdapterUpdates]) -> None:
    """Raises InputError for an adapter that is not a sum of updates, or does not fit the others."""
    for file in files:
        if file.has_magnitudes:
            raise InputError(
                f"{file.folder} is a DoRA adapter: its update needs the base's weights, and "
                "magnitudes do not add up. Merge it with lorakit merge, or combine in Python with "
                "LoraModel.add_weighted_adapter(combination_type='svd')"
            )
        if file.config.bias != "none":
            raise InputError(
                f"{file.folder} trains biases of the base itself (bias={file.config.bias}), "
                "which do not add up"
            )
        file.require_updates()
    first = files[0]
    stacked = bool(standing_on(first.folder))  # a reward model on a frozen adapter that writes
    fields = ("trainable_token_indices", "layer_replication")
    for file in files[1:]:
        for field in fields if stacked else ("task_type", *fields):
            ours, theirs = getattr(first.config, field), getattr(file.config, field)
            if ours != theirs and (field == "layer_replication" or None not in (ours, theirs)):
                raise InputError(
                    f"{first.folder} has {field} {ours} and {file.folder} has {theirs}: these do "
                    "not go together"
                )
    if biased := [file for file in files if file.config.lora_bias]:
        for file in files:
            if embedding := next((p for p, u in file.updates.items() if u.is_embedding), None):
                raise InputError(
                    f"{biased[0].folder} has lora_bias, which embeddings cannot have, and "
                    f"{file.folder} adapts {embedding}: no one adapter can hold both"
                )
    owners = {u.owner: f for f in files for u in f.updates.values() if isinstance(u, MatrixUpdate)}
    for file in files:
        if both := next((path for path in file.updates if path in owners), None):
            raise InputError(
                f"{file.folder} adapts the layer {both}, and {owners[both].folder} a parameter of "
                "it (target_parameters): no one adapter can hold both"
            )
    known: dict[str, tuple[AdapterUpdates, tuple[torch.Size, torch.Size]]] = {}
    for file in files:
        for path, update in file.updates.items():
            shape = update.A.shape[1:], update.B.shape[:1]
            other, before = known.setdefault(path, (file, shape))
            if before != shape:
                sizes = [f"{out[0]} × {inside.numel()}" for inside, out in (before, shape)]
                raise InputError(
                    f"{other.folder} and {file.folder} are for different base models: {path} is "
                    f"{sizes[0]} in one and {sizes[1]} in the other"
                )


def _common_base(
    files: Sequence[AdapterUpdates], base: str | None
) -> tuple[str | None, str | None]:
    """The base that all adapters are for, and its fingerprint if one of them knows it."""
    origins = [origin(file.folder, file.config) for file in files]
    form = files[0].config.task_type  # another one has another head, and so another fingerprint
    alike = [f.config.task_type in (None, form) for f in files]
    prints = {
        o.base_fingerprint: f for o, f, same in zip(origins, files, alike, strict=True) if same
    }
    prints.pop(None, None)
    if len(prints) > 1:
        one, other, *_ = (file.folder for file in prints.values())
        raise InputError(
            f"{one} and {other} were trained on different weights (by fingerprint), "
            "so their updates do not belong together"
        )
    names = dict.fromkeys(o.base_model for o in origins if o.base_model)
    same_weights = all(o.base_fingerprint for o in origins)
    if len(names) > 1 and not same_weights and base is None:
        raise InputError(
            f"the adapters are for different base models ({listed(names)}): if these are the same, "
            "say which one with --base"
        )
    return base or next(iter(names), None), next(iter(prints), None)


def _whole_tensors(files: Sequence[AdapterUpdates], notices: list[str]) -> dict[str, torch.Tensor]:
    """The tensors that are not factors; several adapters can only bring the same ones."""
    found: dict[str, torch.Tensor] = {}
    owner: dict[str, AdapterUpdates] = {}
    adapted = {path for file in files for path in file.updates}
    for file in files:
        for key, tensor in file.others.items():
            if key in found and not torch.equal(found[key], tensor):
                raise InputError(
                    f"{owner[key].folder} and {file.folder} each have their own {key} "
                    "(modules_to_save or trained tokens), and these do not add up: train one "
                    "without it"
                )
            for path in adapted:
                if f".{path}." in f".{key}" and not key.endswith(".base_layer.weight"):
                    raise InputError(
                        f"{file.folder} trains {path} whole, and another adapter by B A: "
                        "these do not add up"
                    )
            found[key], owner[key] = tensor, file
    for file in files if len(files) > 1 else ():
        own = [key for key in file.others if owner[key] is file]
        if own:
            notices.append(
                f"{len(own)} tensors that {file.folder} trained whole are carried along as they "
                "are, without its weight"
            )
    return found


def _config(files: Sequence[AdapterUpdates], paths: list[str], base: str | None) -> LoraConfig:
    configs = [file.config for file in files]
    first = configs[0]
    saved = [name for config in configs for name in config.modules_to_save or []]
    tokens = [c.trainable_token_indices for c in configs if c.trainable_token_indices]
    parameters = [name for config in configs for name in config.target_parameters or []]
    layers = {p for f in files for p, u in f.updates.items() if not isinstance(u, MatrixUpdate)}
    return LoraConfig(
        **_targets(configs, [path for path in paths if path in layers]),
        target_parameters=list(dict.fromkeys(parameters)) or None,
        fan_in_fan_out=any(config.fan_in_fan_out for config in configs),
        lora_bias=any(config.lora_bias for config in configs),
        modules_to_save=list(dict.fromkeys(saved)) or None,
        trainable_token_indices=tokens[0] if tokens else None,
        ensure_weight_tying=any(config.ensure_weight_tying for config in configs),
        layer_replication=first.layer_replication,
        task_type=next((config.task_type for config in configs if config.task_type), None),
        base_model_name_or_path=base,
        revision=first.revision,
    )


def _targets(configs: Sequence[LoraConfig], paths: list[str]) -> dict[str, Any]:
    """The fields that find the modules at `paths` again, in any reader of PEFT's files.

    Where all adapters select alike their lists of names can be united; otherwise the paths are
    named one by one.
    """
    first = configs[0]
    alike = all(getattr(c, f) == getattr(first, f) for c in configs for f in _SELECTION)
    selection = {field: getattr(first, field) for field in _SELECTION}
    targets = [config.target_modules for config in configs]
    if alike and all(isinstance(target, list) for target in targets):
        names = dict.fromkeys(name for target in targets for name in target or [])
        return {"target_modules": list(names), **selection}
    if alike and all(target == targets[0] for target in targets):
        return {"target_modules": targets[0], **selection}
    return {"target_modules": paths}
