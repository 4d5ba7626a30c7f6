"""Adapters merged into a loaded model: `merge_and_unload`, and the dtypes of the base's files.

For models that cannot be merged file by file: quantised ones, GGUF, those whose files hold the
weights in another form than the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lorakit.adapters.added_tokens import added_tokens_notice
from lorakit.adapters.job import MergedFiles, MergeJob, add_others, copy_others, exact_dtype
from lorakit.adapters.open import OpenAdapter, open_adapter
from lorakit.adapters.verify import Survival, sum_of_squares
from lorakit.errors import InputError, LorakitError
from lorakit.lora import LoraModel
from lorakit.lora.layers import LoraTiedEmbedding, LoraTiedHead, Mergeable
from lorakit.lora.layers.weight_updates import row_blocks
from lorakit.lora.vocabulary import vocabulary_size
from lorakit.models.layouts import layout_of
from lorakit.models.load import stored_dtype
from lorakit.models.quantization.settings import UNQUANTIZED
from lorakit.models.shards import all_tensors
from lorakit.models.skeleton import file_names


def open_all(
    job: MergeJob, tell: Callable[[str], None] | None = None
) -> tuple[OpenAdapter, list[str]]:
    """The base with all adapters on it, unquantised, in the dtype in which sums are made.

    Args:
        tell: as in `open_adapter`.

    Returns: it, and the adapters' names in it; what they change is multiplied by their weights.
    """
    layout = layout_of(job.path)
    stored = {} if layout.packing else all_tensors(layout.shards())
    exact = exact_dtype(job, stored)
    opened = open_adapter(
        job.first.folder,
        base=job.base,
        dtype=exact,
        quantization=job.quantization or UNQUANTIZED,
        dequantize=True,
        alone=True,
        tell=tell,
    )
    names = add_others(opened.model, job.adapters, job.weights, opened.added_tokens)
    return opened, list(names)


def merge_in_memory(
    job: MergeJob, opened: OpenAdapter, names: Sequence[str], folder: Path
) -> MergedFiles:
    """Merges the model that `open_all` gave, and writes it into `folder` as transformers does."""
    base: Any = opened.model.get_base_model()
    default = job.dtype or stored_dtype(opened.base_model)
    dtypes: dict[str, torch.dtype] = {}
    if job.dtype is None and not job.packed:
        tensors = all_tensors(layout_of(job.path).shards())
        stored = file_names(base, tensors).stored
        dtypes = {key: tensors[name].dtype for key, name in stored.items()}
    merged, survival, modules = merge_loaded(opened.model, names, dtypes, default)
    if any(adapter.config.layer_replication for adapter in job.adapters):
        _separate(merged)
    merged.save_pretrained(folder)
    merged.config.dtype = default
    merged.config.save_pretrained(folder)
    rows = vocabulary_size(merged)
    if job.path.is_file() or copy_others(job, folder, rows) is not None:
        opened.tokenizer.save_pretrained(folder)
    added = opened.added_tokens
    notices = [added_tokens_notice(added, job.first)] if added else []
    return MergedFiles(type(merged), default, modules, survival, notices)


@torch.no_grad()
def merge_loaded(
    model: LoraModel, names: Sequence[str], dtypes: dict[str, torch.dtype], default: torch.dtype
) -> tuple[Any, Survival, int]:
    """The plain model with `names` in its weights, rounded.

    Args:
        dtypes: of single parameters, by name in the plain model; the others get `default`.

    Returns: the model, what of the updates survived the rounding, and the number of layers that
    merged adapters into themselves.

    Raises:
        InputError: the base holds NaN or Inf.
        LorakitError: merged values are NaN or Inf.
    """
    survival, modules = Survival(), 0
    layers = [
        (path.replace(".base_layer", ""), module)
        for path, module in model.get_base_model().named_modules()
        if isinstance(module, Mergeable)
    ]
    for path, layer in layers:
        here = [name for name in names if name in layer.adapters]
        changed = layer.changed_parameters(here) if here else []
        base = layer.get_base_layer()
        before = {one: getattr(base, one).detach() for one in changed}
        layer.merge(here, keep_backup=False)
        modules += bool(changed) and not isinstance(layer, (LoraTiedHead, LoraTiedEmbedding))
        for one, old in before.items():
            new = getattr(base, one).detach()
            written = dtypes.get(f"{path}.{one}", default)
            for rows in row_blocks(old.shape):
                total = new[rows].clone()
                delta = sum_of_squares(total - old[rows])
                if not torch.isfinite(old[rows]).all():
                    raise InputError(f"the base's {path}.{one} holds NaN or Inf")
                if not survival.add(path, delta, sum_of_squares(total.sub_(total.to(written)))):
                    raise LorakitError(
                        f"the merged model is not base + adapter: {path}.{one} has NaN or Inf, or "
                        "values beyond the dtype. Nothing was written; try --dtype float32"
                    )
    merged: Any = model.merge_and_unload(adapter_names=names)
    for key, parameter in merged.named_parameters():
        parameter.data = parameter.data.to(dtypes.get(key, default))
    for key, buffer in merged.named_buffers():
        if buffer.is_floating_point() and key in dtypes:
            buffer.data = buffer.data.to(dtypes[key])
    _require_finite(merged)
    return merged, survival, modules


def _require_finite(model: Any) -> None:
    """Raises InputError for NaN or Inf in the base's parameters where no adapter changes them.

    Buffers may have them: limits that do not limit (Gemma 4) are infinite.
    """
    for key, stored in model.named_parameters():
        tensor = torch.atleast_1d(stored)
        if tensor.is_floating_point() and not all(
            tensor[rows].isfinite().all() for rows in row_blocks(tensor.shape)
        ):
            raise InputError(f"the base's {key} holds NaN or Inf")


def _separate(model: Any) -> None:
    """Gives layers that are copies of others parameters of their own, as files need."""
    embedding = model.get_input_embeddings().weight  # which the head may still share
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen and parameter is not embedding:
                copied = torch.nn.Parameter(parameter.detach().clone(), requires_grad=False)
                setattr(module, name, copied)
            seen.add(id(parameter))
