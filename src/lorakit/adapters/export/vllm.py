"""A copy of an adapter in the form that vLLM serves: one rank, scaling 1, one list of targets.

vLLM reads `r`, `lora_alpha` and `use_rslora` from the configuration and neither pattern
(`vllm/lora/peft_helper.py`), so ranks and alphas of single modules would silently be wrong there.
Its ranks are those of `vllm/config/lora.py`. Checked with the pages of 0.26 and 0.27 and main.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn.functional import pad

from lorakit import atomic
from lorakit.adapters.chat_template import AdapterTemplate, exported_template
from lorakit.adapters.export.export_formats import Exported
from lorakit.adapters.export.plain import PlainAdapter, fitted_plain, found_at, read_plain
from lorakit.adapters.lineage import require_complete
from lorakit.adapters.updates import ModuleUpdate
from lorakit.commands import quoted
from lorakit.errors import InputError
from lorakit.folder_lock import reserves
from lorakit.folder_name import folder_name
from lorakit.lora.checkpoint import write_adapter
from lorakit.lora.config import LoraConfig
from lorakit.models.template_files import (
    TEMPLATE_NAME,
    default_of,
    digest,
    read_templates,
    write_templates,
)

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
EMBEDDINGS = ("embed_tokens", "lm_head")
"""What some of vLLM's models name as adaptable beside their linear layers."""


@dataclass(frozen=True)
class Servable:
    """An adapter that vLLM can serve, read and checked.

    `r` is the least `--max-lora-rank` that it needs. `needs_copy` are the reasons why vLLM would
    serve another model from the files as they are; without any it reads them as they are meant.
    """

    folder: Path
    plain: PlainAdapter
    r: int
    needs_copy: tuple[str, ...]


def read_servable(adapter: str | Path, base: str | None = None) -> Servable:
    """Reads the adapter, and no model.

    Raises:
        InputError: vLLM cannot serve the adapter, or it is damaged.
    """
    require_complete(adapter, verb="served by vLLM")
    plain = read_plain(adapter, "vLLM", base)
    if plain.config.task_type not in (None, "CAUSAL_LM"):
        raise InputError(
            f"{adapter} is an adapter for {plain.config.task_type}, and vLLM serves adapters of "
            "causal language models (CAUSAL_LM) only: leave it out"
        )
    for path, pair in plain.pairs.items():
        if pair.is_embedding and not path.endswith(EMBEDDINGS):
            raise InputError(
                f"{adapter} adapts the embedding {path}, and vLLM takes only "
                f"{' and '.join(EMBEDDINGS)}: lorakit merge {quoted(adapter)} -o MODEL"
            )
    largest = max(pair.r for pair in plain.pairs.values())
    r = next((rank for rank in RANKS if rank >= largest), None)
    if r is None:
        raise InputError(
            f"{adapter} has rank {largest}, and vLLM serves at most {RANKS[-1]}: "
            f"lorakit merge {quoted(adapter)} -o MODEL"
        )
    return Servable(Path(adapter), plain, r, _misread(plain))


def write_copy(servable: Servable, output: str | Path) -> None:
    """Writes `output`, an adapter with the same ΔW in every module, as vLLM reads it.

    The largest rank is rounded up to one of `RANKS` and smaller ones are filled with zeros;
    every module's scaling goes into its `B`.
    """
    plain, r = servable.plain, servable.r
    config = LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=_targets(plain.config, list(plain.pairs)),
        base_model_name_or_path=plain.config.base_model_name_or_path,
        revision=plain.config.revision,
        task_type=plain.config.task_type,
    )
    tensors = {k: t for pair in plain.pairs.values() for k, t in _padded(pair, r).items()}
    with atomic.new_folder(output) as folder:
        write_adapter(folder, config, tensors)
        if templates := read_templates(servable.folder):
            write_templates(folder, templates)


@reserves("output")
def export_vllm(adapter: str | Path, output: str | Path, *, base: str | None = None) -> Exported:
    """Writes the adapter for vLLM into the new folder `output`, whether it needs that or not.

    Raises:
        InputError: vLLM cannot serve the adapter, or `output` exists.
    """
    servable = read_servable(adapter, base)
    served = found_at(servable.plain.base_model)
    if Path(served).exists():  # as the name of one that vLLM fetches, it is taken on trust
        servable = replace(servable, plain=fitted_plain(adapter, servable.plain))
    write_copy(servable, output)
    plain, r = servable.plain, servable.r
    notices = list(plain.notices)
    if plain.base_model.endswith(".gguf"):
        notices.append(
            f"{plain.base_model} is a GGUF file: give vLLM the folder or hub id it was made from"
        )
    command = (
        f"vllm serve {quoted(served)} --enable-lora --lora-modules "
        f"{quoted(lora_module(folder_name(output), str(output)))} --max-lora-rank {r}"
    )
    hint = (
        "--chat-template is the one that the adapter was trained with; vLLM has one for all that a "
        "server serves"
    )
    template = exported_template(adapter, plain.base_model, hint)
    notices += template.notices
    if template.differs:
        command += f" --chat-template {quoted(Path(output) / TEMPLATE_NAME)}"
    modules = len(plain.pairs)
    summary = f"for vLLM: {output} ({modules} modules, rank {r}, scaling 1)"
    return Exported(str(output), summary, command, tuple(notices), {"r": r, "modules": modules})


def template_file(trained: AdapterTemplate, workspace: Path) -> Path:
    """The file with the adapter's chat template, for `--chat-template`.

    Args:
        workspace: where it is written if the template lies among a tokenizer's settings.
    """
    path = trained.folder / TEMPLATE_NAME
    if not path.is_file():
        text = default_of(trained.own) or ""
        path = workspace / f"chat-template-{digest(text)[:16]}.jinja"
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_file(path, text)
    return path.absolute()


def lora_module(name: str, path: str, base_model: str | None = None) -> str:
    """A value of `--lora-modules`, as JSON where `NAME=PATH` would be misread.

    vLLM cuts `NAME=PATH` at every `=`, and takes a value with a comma for JSON.
    """
    plain = f"{name}={path}"
    misread = plain.count("=") > 1 or "," in plain or plain.startswith("-")
    if base_model is None and not misread:
        return plain
    parent = {} if base_model is None else {"base_model_name": base_model}
    return json.dumps({"name": name, "path": path, **parent})


def _misread(plain: PlainAdapter) -> tuple[str, ...]:
    """What vLLM would read otherwise than it is meant."""
    config = plain.config
    if config.init.kind.subtracted:
        return (f"it starts from a part of the weight ({config.init_lora_weights})",)
    scaling = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    pairs = plain.pairs.values()
    reasons = [
        (any(pair.r != config.r for pair in pairs), "its ranks differ (rank_pattern)"),
        (any(pair.scaling != scaling for pair in pairs), "its scalings differ between modules"),
        (bool(plain.notices), "it brings copies of the base's own weights"),
    ]
    return tuple(reason for present, reason in reasons if present)


def _padded(pair: ModuleUpdate, r: int) -> dict[str, torch.Tensor]:
    """The pair's two tensors under PEFT's keys: A (r, d_in), B (d_out, r), the scaling in B."""
    missing = r - pair.r
    return pair.tensors(pad(pair.A, (0, 0, 0, missing)), pad(pair.folded(), (0, missing)))


def _targets(config: LoraConfig, paths: list[str]) -> list[str]:
    """Names that mean the modules at `paths` and, as far as the folder tells, no others."""
    named = config.target_modules
    restricted = config.layers_to_transform is not None or config.exclude_modules
    if isinstance(named, list) and not restricted:
        return [n for n in named if any(p == n or p.endswith(f".{n}") for p in paths)]
    return sorted(paths)
