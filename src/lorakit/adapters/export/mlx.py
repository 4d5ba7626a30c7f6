"""An adapter in the form of mlx-lm: `adapters.safetensors`, and a configuration of its own.

mlx-lm has one rank and one scale for all modules, its factors are transposed, and it wraps what is
named in `keys` in the last `num_layers` layers (`mlx_lm/tuner/utils.py`).
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save
from torch.nn.functional import pad

from lorakit import atomic
from lorakit.adapters.chat_template import exported_template
from lorakit.adapters.export.export_formats import Exported
from lorakit.adapters.export.plain import PlainAdapter, fitted_plain, found_at, read_plain
from lorakit.adapters.updates import ModuleUpdate
from lorakit.commands import quoted
from lorakit.errors import InputError, listed
from lorakit.folder_lock import reserves
from lorakit.models.names import resolve
from lorakit.models.skeleton import read_base_config
from lorakit.models.template_files import TEMPLATE_NAME, write_templates

WEIGHTS_NAME = "adapters.safetensors"
CONFIG_NAME = "adapter_config.json"

_SAME_NAMES = ("gemma", "gemma2", "glm4", "llama", "mistral", "phi3", "qwen2", "qwen3")
_LAYERS = "model.layers."


@reserves("output")
def export_mlx(adapter: str | Path, output: str | Path, *, base: str | None = None) -> Exported:
    """Writes the folder `output`, which mlx-lm takes as `--adapter-path`.

    Where ranks or scalings differ, smaller ranks are filled with zeros and scalings go into
    `lora_b`, so that ΔW is the same.

    Raises:
        InputError: the adapter is more than mlx-lm can hold, its base is not known to have the
            same names there, or `output` exists.
    """
    plain = read_plain(adapter, "mlx-lm", base)
    config = read_base_config(resolve(plain.base_model).path)
    if config.model_type not in _SAME_NAMES:
        raise InputError(
            f"{plain.base_model} is a {config.model_type} model, whose modules mlx-lm may name "
            f"otherwise: lorakit exports adapters of {listed(_SAME_NAMES)}"
        )
    plain = fitted_plain(adapter, plain)
    ends = [path for path in plain.pairs if not path.startswith(_LAYERS)]
    if ends and config.tie_word_embeddings:
        raise InputError(
            f"the adapter changes {listed(ends)}, and {plain.base_model} uses one weight as "
            "embedding and as head, which mlx-lm cannot adapt apart"
        )
    scalings = {pair.scaling for pair in plain.pairs.values()}
    r = max(pair.r for pair in plain.pairs.values())
    scale = scalings.pop() if len(scalings) == 1 else 1.0
    tensors: dict[str, torch.Tensor] = {}
    for path, pair in plain.pairs.items():
        tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"] = _factors(pair, r, scale)
    values = {
        "fine_tune_type": "lora",
        "model": plain.base_model,
        "num_layers": _layers(plain, config.num_hidden_layers),
        "lora_parameters": {
            "rank": r,
            "scale": scale,
            "dropout": plain.config.lora_dropout,
            "keys": _keys(plain),
        },
    }
    hint = (
        "mlx-lm takes the chat template from the model's folder: copy "
        f"{Path(output) / TEMPLATE_NAME} there, or use a merged model (lorakit merge)"
    )
    template = exported_template(adapter, plain.base_model, hint)
    with atomic.new_folder(output) as folder:
        atomic.write_file(folder / WEIGHTS_NAME, save(tensors, metadata={"format": "mlx"}))
        atomic.write_file(folder / CONFIG_NAME, json.dumps(values, indent=2) + "\n")
        if template.own is not None:
            write_templates(folder, template.own)
    command = (
        f"mlx_lm.generate --model {quoted(found_at(plain.base_model))} "
        f"--adapter-path {quoted(output)} --prompt …"
    )
    notices = (*plain.notices, *template.notices)
    summary = f"for mlx-lm: {output} ({len(plain.pairs)} modules, rank {r}, scale {scale:g})"
    return Exported(str(output), summary, command, notices, {"r": r})


def _factors(pair: ModuleUpdate, r: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """mlx-lm's `lora_a` (d_in, r) and `lora_b` (r, d_out); an embedding's d_in are its tokens."""
    missing = r - pair.r
    A, B = pad(pair.A, (0, 0, 0, missing)), pad(pair.folded(scale), (0, missing))
    return A.T.contiguous(), B.T.contiguous()


def _keys(plain: PlainAdapter) -> list[str]:
    """Modules by their path inside a layer, or their whole path where they are in none."""
    inside = (
        path.removeprefix(_LAYERS).partition(".")[2] if path.startswith(_LAYERS) else path
        for path in plain.pairs
    )
    return sorted(set(inside))


def _layers(plain: PlainAdapter, total: int) -> int:
    """How many of the last layers hold all that is adapted."""
    numbers = [
        int(path.removeprefix(_LAYERS).partition(".")[0])
        for path in plain.pairs
        if path.startswith(_LAYERS)
    ]
    if numbers and max(numbers) >= total:
        raise InputError(
            f"the adapter has a layer {max(numbers)}, and {plain.base_model} only {total}: "
            "it is for another base model"
        )
    return total - min(numbers, default=total - 1)
