"""A copy of an adapter in the form that vLLM serves: one rank, scaling 1, one list of targets.

vLLM reads `r`, `lora_alpha` and `use_rslora` from the configuration and neither pattern
(`vllm/lora/peft_helper.py`), so ranks and alphas of single modules would silently be wrong there.
Its ranks are those of `vllm/config/lora.py`.
"""

from __future__ import annotations

import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import pad

from lorakit import atomic
from lorakit.adapters.derived import TEMPLATE_NAME
from lorakit.adapters.export.plain import Pair, found_at, read_plain
from lorakit.errors import InputError
from lorakit.lora.checkpoint import PREFIX, write_adapter
from lorakit.lora.config import LoraConfig

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_EMBEDDINGS = ("embed_tokens", "lm_head")  # what vLLM's models name as adaptable


@dataclass(frozen=True)
class VllmExport:
    """What was written, and the command that serves it."""

    output: str
    r: int
    modules: int
    command: str
    notices: tuple[str, ...] = ()


def export_vllm(adapter: str | Path, output: str | Path, *, base: str | None = None) -> VllmExport:
    """Writes `output`, an adapter with the same ΔW in every module, as vLLM reads it.

    The largest rank is rounded up to one of `RANKS` and smaller ones are filled with zeros;
    every module's scaling goes into its `B`.

    Raises:
        InputError: vLLM cannot serve the adapter, or `output` exists.
    """
    atomic.require_free(output)
    plain = read_plain(adapter, "vLLM", base)
    served = found_at(plain.base_model)
    for path, pair in plain.pairs.items():
        if pair.is_embedding and not path.endswith(_EMBEDDINGS):
            raise InputError(
                f"{adapter} adapts the embedding {path}, and vLLM takes only "
                f"{' and '.join(_EMBEDDINGS)}: lorakit merge {adapter} -o MODEL"
            )
    largest = max(pair.r for pair in plain.pairs.values())
    r = next((rank for rank in RANKS if rank >= largest), None)
    if r is None:
        raise InputError(
            f"{adapter} has rank {largest}, and vLLM serves at most {RANKS[-1]}: "
            f"lorakit merge {adapter} -o MODEL"
        )
    config = LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=_targets(plain.config, list(plain.pairs)),
        base_model_name_or_path=plain.config.base_model_name_or_path,
        revision=plain.config.revision,
        task_type=plain.config.task_type,
    )
    tensors = {key: t for path, pair in plain.pairs.items() for key, t in _padded(path, pair, r)}
    with atomic.new_folder(output) as folder:
        write_adapter(folder, config, tensors)
        template = Path(adapter) / TEMPLATE_NAME
        if template.is_file():
            shutil.copyfile(template, folder / TEMPLATE_NAME)
    name = f"{Path(output).name}={output}"
    command = (
        f"vllm serve {shlex.quote(served)} --enable-lora "
        f"--lora-modules {shlex.quote(name)} --max-lora-rank {r}"
    )
    return VllmExport(str(output), r, len(plain.pairs), command, plain.notices)


def _padded(path: str, pair: Pair, r: int) -> list[tuple[str, torch.Tensor]]:
    """The pair's two tensors under PEFT's keys: A (r, d_in), B (d_out, r), the scaling in B."""
    missing = r - pair.r
    endings = (
        ("lora_embedding_A", "lora_embedding_B")
        if pair.is_embedding
        else ("lora_A.weight", "lora_B.weight")
    )
    A, B = pad(pair.A, (0, 0, 0, missing)), pad(pair.folded(), (0, missing))
    return [(f"{PREFIX}{path}.{endings[0]}", A), (f"{PREFIX}{path}.{endings[1]}", B)]


def _targets(config: LoraConfig, paths: list[str]) -> list[str]:
    """Names that mean the modules at `paths` and, as far as the folder tells, no others."""
    named = config.target_modules
    restricted = config.layers_to_transform is not None or config.exclude_modules
    if isinstance(named, list) and not restricted:
        return [n for n in named if any(p == n or p.endswith(f".{n}") for p in paths)]
    return sorted(paths)
