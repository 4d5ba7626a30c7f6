"""A copy of an adapter under the module names of a layout's own code, as ChatGLM's.

That code may have one layer where transformers' model has several (`query_key_value`). Updates of
these become one of the summed rank: their A one below the other, their B along the diagonal, which
is the very same sum. All other layers are one to one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorakit import atomic
from lorakit.adapters.chat_template import exported_template
from lorakit.adapters.export.export_formats import Exported
from lorakit.adapters.export.plain import read_plain
from lorakit.adapters.updates import ModuleUpdate
from lorakit.errors import InputError
from lorakit.folder_lock import reserves
from lorakit.lora.checkpoint import write_adapter
from lorakit.lora.config import LoraConfig
from lorakit.models.layouts.chatglm.weights import NAMES
from lorakit.models.layouts.module_names import ModuleNames
from lorakit.models.names import resolve
from lorakit.models.skeleton import skeleton


@reserves("output")
def export_chatglm(adapter: str | Path, output: str | Path, *, base: str | None = None) -> Exported:
    """Writes `output`, an adapter with the same ΔW for the layout's own code with PEFT.

    Args:
        base: in the original layout or converted.

    Raises:
        InputError: the base is another model, the adapter is more than pairs of matrices or does
            not fit it, or `output` exists.
    """
    names = NAMES
    plain = read_plain(adapter, names.code, base)
    model = skeleton(resolve(plain.base_model).path)
    if type(model.config).__name__ != names.config:
        raise InputError(
            f"{adapter} is for {plain.base_model}, a model of the kind {model.config.model_type}: "
            f"only adapters for {names.models} can be written for {names.code}"
        )
    scaling = Counter(pair.scaling for pair in plain.pairs.values()).most_common(1)[0][0]
    found = _renamed(adapter, plain.pairs, scaling, names, model)
    with atomic.new_folder(output) as folder:
        write_adapter(
            folder,
            _config(found, scaling, model.config.num_hidden_layers, plain.config),
            {k: t for pair in found.values() for k, t in pair.tensors(pair.A, pair.B).items()},
        )
    ranks = dict(sorted(Counter(pair.r for pair in found.values()).items()))
    command = names.command.format(base=plain.base_model, adapter=str(output))
    template = exported_template(adapter, plain.base_model, f"{names.code} {names.templates}")
    notices = (*plain.notices, *template.notices)
    counted = ", ".join(f"{count} of rank {r}" for r, count in ranks.items())
    summary = f"for {names.code}: {output} ({len(found)} modules: {counted})"
    figures = {"modules": len(found), "ranks": ranks}
    return Exported(str(output), summary, command, notices, figures)


def _renamed(
    adapter: str | Path,
    pairs: Mapping[str, ModuleUpdate],
    scaling: float,
    names: ModuleNames,
    model: nn.Module,
) -> dict[str, ModuleUpdate]:
    """The pairs by the original path of their module, all with one scaling."""
    alone: dict[str, ModuleUpdate] = {}
    joined: dict[str, dict[str, ModuleUpdate]] = {}
    for path, pair in pairs.items():
        try:
            name, part = names.original_module(path)
        except KeyError as error:
            kind = names.config.removesuffix("Config").upper()
            raise InputError(
                f"{adapter}: {kind} has no module {path}: it is for another base model"
            ) from error
        own = replace(pair, path=name, B=pair.folded(scaling), scaling=scaling)
        if part is None:
            alone[name] = own
        else:
            joined.setdefault(name, {})[path] = own
    return {
        **alone,
        **{n: _joined(adapter, names.native_modules(n)[1], p, model) for n, p in joined.items()},
    }


def _joined(
    adapter: str | Path,
    natives: Sequence[str],
    parts: Mapping[str, ModuleUpdate],
    model: nn.Module,
) -> ModuleUpdate:
    """One update of a fused module that changes the rows of `natives` as each of `parts` does."""
    modules: dict[str, Any] = {path: model.get_submodule(path) for path in natives}
    shapes = {path: tuple(module.weight.shape) for path, module in modules.items()}
    for path, pair in parts.items():
        found = (pair.B.shape[0], pair.A.shape[1])
        if found != shapes[path]:
            raise InputError(
                f"{adapter}: {'.'.join(path.split('.')[-2:])} has an update of shape {found}, and "
                f"the base a weight of {shapes[path]}: give its own --base"
            )
    there = [parts[path] for path in natives if path in parts]
    dtype = torch.promote_types(there[0].B.dtype, there[-1].B.dtype)
    rows = sum(shape[0] for shape in shapes.values())
    B = torch.zeros(rows, sum(pair.r for pair in there), dtype=dtype)
    row = column = 0
    for path in natives:
        end = row + shapes[path][0]
        if path in parts:
            pair = parts[path]
            B[row:end, column : column + pair.r] = pair.B
            column += pair.r
        row = end
    return replace(there[0], A=torch.cat([pair.A for pair in there]), B=B)


def _config(
    pairs: Mapping[str, ModuleUpdate], scaling: float, layers: int, trained: LoraConfig
) -> LoraConfig:
    r = Counter(pair.r for pair in pairs.values()).most_common(1)[0][0]
    ranks = _patterns({path: pair.r for path, pair in pairs.items()}, r)
    return LoraConfig(
        r=r,
        lora_alpha=_alpha(scaling, r),
        rank_pattern=ranks,
        alpha_pattern={name: _alpha(scaling, rank) for name, rank in ranks.items()},
        target_modules=_targets(pairs, layers),
        base_model_name_or_path=trained.base_model_name_or_path,
        task_type=trained.task_type,
    )


def _alpha(scaling: float, r: int) -> float:
    alpha = scaling * r
    return int(alpha) if alpha.is_integer() else alpha


def _kind(path: str) -> str:
    return path.rpartition(".")[2]


def _patterns(ranks: Mapping[str, int], usual: int) -> dict[str, int]:
    """The ranks other than `usual`, by kind of module where a kind has one rank, else by path."""
    of_kind: dict[str, set[int]] = {}
    for path, r in ranks.items():
        of_kind.setdefault(_kind(path), set()).add(r)
    return {
        _kind(path) if len(of_kind[_kind(path)]) == 1 else re.escape(path): r
        for path, r in ranks.items()
        if r != usual
    }


def _targets(pairs: Mapping[str, ModuleUpdate], layers: int) -> list[str]:
    """Names of kinds where every layer is adapted, else paths."""
    counts = Counter(_kind(path) for path in pairs)
    return list(
        dict.fromkeys(
            _kind(path) if counts[_kind(path)] == layers or ".layers." not in path else path
            for path in pairs
        )
    )
