"""A copy of an adapter under the module names of ChatGLM's original code.

That code has one layer `query_key_value` where transformers' GLM has three. Updates of the three
become one of the summed rank: their A one below the other, their B along the diagonal, which is the
very same sum. All other layers are one to one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lorakit import atomic
from lorakit.adapters.chat_template import exported_template
from lorakit.adapters.export.export_formats import Exported
from lorakit.adapters.export.plain import read_plain
from lorakit.adapters.updates import ModuleUpdate
from lorakit.errors import InputError
from lorakit.folder_lock import reserves
from lorakit.lora.checkpoint import write_adapter
from lorakit.lora.config import LoraConfig
from lorakit.models.layouts.chatglm.layout import QKV_PARTS, original_module, qkv_rows
from lorakit.models.names import resolve
from lorakit.models.skeleton import read_base_config

if TYPE_CHECKING:
    from transformers import GlmConfig


@reserves("output")
def export_chatglm(adapter: str | Path, output: str | Path, *, base: str | None = None) -> Exported:
    """Writes `output`, an adapter with the same ΔW for the original code with PEFT.

    Args:
        base: the base model, when it is not the recorded one: in the original layout or converted.

    Raises:
        InputError: the base is no GLM, the adapter is more than pairs of matrices or does not fit
            it, or `output` exists.
    """
    from transformers import GlmConfig

    plain = read_plain(adapter, "ChatGLM's original code", base)
    config = read_base_config(resolve(plain.base_model).path)
    if not isinstance(config, GlmConfig):
        raise InputError(
            f"{adapter} is for {plain.base_model}, a model of the kind {config.model_type}: only "
            "adapters for ChatGLM2, ChatGLM3 and GLM-4 can be written for ChatGLM's original code"
        )
    scaling = Counter(pair.scaling for pair in plain.pairs.values()).most_common(1)[0][0]
    found = _renamed(adapter, plain.pairs, scaling, config)
    with atomic.new_folder(output) as folder:
        write_adapter(
            folder,
            _config(found, scaling, config.num_hidden_layers, plain.config),
            {k: t for pair in found.values() for k, t in pair.tensors(pair.A, pair.B).items()},
        )
    ranks = dict(sorted(Counter(pair.r for pair in found.values()).items()))
    command = (
        f"PeftModel.from_pretrained(AutoModel.from_pretrained({plain.base_model!r}, "
        f"trust_remote_code=True), {str(output)!r})"
    )
    template = exported_template(adapter, plain.base_model)
    notices = [*plain.notices, *template.notices]
    if template.differs:
        notices.append(
            "ChatGLM's original code writes prompts by itself (build_chat_input): it has no place "
            "for the adapter's chat template"
        )
    counted = ", ".join(f"{count} of rank {r}" for r, count in ranks.items())
    summary = f"for ChatGLM's original code: {output} ({len(found)} modules: {counted})"
    figures = {"modules": len(found), "ranks": ranks}
    return Exported(str(output), summary, command, tuple(notices), figures)


def _renamed(
    adapter: str | Path, pairs: Mapping[str, ModuleUpdate], scaling: float, config: GlmConfig
) -> dict[str, ModuleUpdate]:
    """The pairs by the original path of their module, all with one scaling."""
    alone: dict[str, ModuleUpdate] = {}
    joined: dict[str, dict[str, ModuleUpdate]] = {}
    for path, pair in pairs.items():
        try:
            name, part = original_module(path)
        except KeyError as error:
            raise InputError(f"{adapter}: GLM has no module {path}: it is for another") from error
        own = replace(pair, path=name, B=pair.folded(scaling), scaling=scaling)
        if part is None:
            alone[name] = own
        else:
            joined.setdefault(name, {})[part] = own
    return {**alone, **{name: _joined(adapter, p, config) for name, p in joined.items()}}


def _joined(
    adapter: str | Path, parts: Mapping[str, ModuleUpdate], config: GlmConfig
) -> ModuleUpdate:
    """One update of `query_key_value` that changes its parts' rows as each of `parts` does."""
    rows = dict(zip(QKV_PARTS, qkv_rows(config), strict=True))
    for part, pair in parts.items():
        if pair.B.shape[0] != rows[part] or pair.A.shape[1] != config.hidden_size:
            raise InputError(
                f"{adapter}: {part} has an update of shape {(pair.B.shape[0], pair.A.shape[1])}, "
                f"and the base a weight of {(rows[part], config.hidden_size)}: give its own --base"
            )
    there = [parts[part] for part in QKV_PARTS if part in parts]
    dtype = torch.promote_types(there[0].B.dtype, there[-1].B.dtype)
    B = torch.zeros(sum(rows.values()), sum(pair.r for pair in there), dtype=dtype)
    row = column = 0
    for part in QKV_PARTS:
        if part in parts:
            pair = parts[part]
            B[row : row + rows[part], column : column + pair.r] = pair.B
            column += pair.r
        row += rows[part]
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
