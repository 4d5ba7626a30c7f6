"""Adapted parameters, such as stacks of experts, as updates of single matrices, and back.

An adapter's files name the module of such a parameter and not the parameter (`experts.lora_A`,
`experts.base_layer.lora_A`), so that the base model says what is what. What is done with the
updates (`combine.py`, `resize.py`) is the same as with those of layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from lorakit.adapters.updates import AdapterUpdates, ModuleUpdate
from lorakit.errors import InputError
from lorakit.lora.checkpoint import PREFIX, read_adapter
from lorakit.lora.layers.parameter import by_matrix
from lorakit.lora.targets import resolve_parameters
from lorakit.models.names import resolve
from lorakit.models.skeleton import skeleton


@dataclass(frozen=True)
class MatrixUpdate(ModuleUpdate):
    """One matrix of an adapted parameter: an expert's, or the whole of a parameter (d_out, d_in).

    `path` is unique and leads to nothing in the model.

    Attributes:
        owner: the path of the module that has the parameter.
        parameter: its name there.
        place: of the parameter among those of the module: the first one's wrapper is the innermost.
    """

    owner: str = ""
    parameter: str = ""
    place: int = 0


def with_matrices(files: Sequence[AdapterUpdates], base: str | None) -> list[AdapterUpdates]:
    """`files` with a `MatrixUpdate` for every matrix of the parameters that they adapt.

    Args:
        base: the base model of all of them; it is read where a file adapts parameters.

    Raises:
        InputError: the base is not known or not there, or an adapter does not fit it.
    """
    if not any(file.config.target_parameters for file in files):
        return list(files)
    if base is None:
        raise InputError(
            f"{files[0].folder} adapts parameters (target_parameters), which the base model names, "
            "and no adapter says which base that is: give it"
        )
    model = skeleton(resolve(base).path)
    return [_with_matrices(f, model) if f.config.target_parameters else f for f in files]


def _with_matrices(file: AdapterUpdates, model: nn.Module) -> AdapterUpdates:
    config, tensors = read_adapter(file.folder)
    names: dict[str, list[str]] = {}
    for owner, name in resolve_parameters(model, config):  # in the module's own order
        names.setdefault(owner, []).append(name)
    updates = {path: update for path, update in file.updates.items() if path not in names}
    for owner, own in names.items():
        for depth, name in enumerate(reversed(own)):  # the last is the outermost
            stem = f"{PREFIX}{owner}." + "base_layer." * depth
            A, B = (tensors.get(f"{stem}lora_{factor}.weight") for factor in "AB")
            module = model.get_submodule(owner)
            place = [key for key, _ in module.named_parameters(recurse=False)].index(name)
            path, W = f"{owner}.{name}", getattr(module, name)
            count = W.shape[0] if W.dim() == 3 else 1
            rows = count * config.rank_for(path)
            if A is None or B is None or A.shape[0] != rows or B.shape[1] != rows:
                raise InputError(
                    f"{file.folder} has no factors of {path} of rank {config.rank_for(path)} for "
                    f"{count} matrices: it is an adapter for another base model, or damaged"
                )
            for number, (a, b) in enumerate(zip(*by_matrix(A, B, count), strict=True)):
                one = f"{owner}.{number}.{name}" if W.dim() == 3 else path
                updates[one] = MatrixUpdate(
                    one, a, b, config.scaling_for(path), owner=owner, parameter=name, place=place
                )
    skipped = [part for part in file.skipped if part.path not in names]
    return replace(file, updates=updates, skipped=skipped)


def stacked(
    tensors: Mapping[str, torch.Tensor],
    ranks: Mapping[str, int],
    updates: Iterable[ModuleUpdate],
) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """An adapter's tensors and ranks by path, with the matrices of a parameter as PEFT has them.

    A parameter's matrices get the largest rank among them; smaller ones are filled up with zeros.

    Args:
        tensors, ranks: of all updates, those of matrices under their own paths.
        updates: of every path.

    Returns: the tensors under PEFT's keys, and the ranks by the paths of layers and parameters.
    """
    left, found = dict(tensors), dict(ranks)
    parts: dict[str, dict[tuple[int, str], list[tuple[torch.Tensor, torch.Tensor]]]] = {}
    for update in updates:
        if isinstance(update, MatrixUpdate) and update.path in found:
            stem = f"{PREFIX}{update.path}.lora_"
            pair = left.pop(f"{stem}A.weight"), left.pop(f"{stem}B.weight")
            which = update.place, update.parameter
            parts.setdefault(update.owner, {}).setdefault(which, []).append(pair)
            del found[update.path]
    for owner, parameters in parts.items():
        outermost_first = sorted(parameters.items(), reverse=True)
        for depth, ((_, name), pairs) in enumerate(outermost_first):
            r = found[f"{owner}.{name}"] = max(len(A) for A, _ in pairs)
            A = torch.stack([_filled(A, r) for A, _ in pairs])  # (matrices, r, d_in)
            B = torch.stack([_filled(B.T, r).T for _, B in pairs], dim=-1)  # (d_out, r, matrices)
            stem = f"{PREFIX}{owner}." + "base_layer." * depth
            left[f"{stem}lora_A.weight"] = A.flatten(0, 1).contiguous()
            left[f"{stem}lora_B.weight"] = B.flatten(1).contiguous()
    return left, found


def _filled(rows: torch.Tensor, count: int) -> torch.Tensor:
    return torch.cat([rows, rows.new_zeros(count - len(rows), rows.shape[1])])
