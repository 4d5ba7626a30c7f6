"""Adapters merged into a loaded model: `merge_and_unload`, and the dtypes of the base's files.

For models that cannot be merged file by file: quantised ones, GGUF, those whose files hold the
weights in another form than the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorakit.adapters.survival import Survival
from lorakit.errors import LorakitError
from lorakit.lora.layers import LoraTiedEmbedding, LoraTiedHead, Mergeable

if TYPE_CHECKING:
    from lorakit.lora import LoraModel


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
        LorakitError: merged values are not finite.
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
            rounded = new.to(dtypes.get(f"{path}.{one}", default))
            if not survival.add(path, old, new, rounded):
                raise LorakitError(
                    f"the merged model is not base + adapter: {path}.{one} has values that are "
                    "not finite, or beyond the dtype. Nothing was written; try --dtype float32"
                )
    merged: Any = model.merge_and_unload(adapter_names=names)
    for key, parameter in merged.named_parameters():
        parameter.data = parameter.data.to(dtypes.get(key, default))
    for key, buffer in merged.named_buffers():
        if buffer.is_floating_point() and key in dtypes:
            buffer.data = buffer.data.to(dtypes[key])
    return merged, survival, modules


def save_loaded(model: Any, folder: Path, default: torch.dtype) -> None:
    """Writes a merged model as transformers does; the configuration names the usual dtype."""
    model.save_pretrained(folder)
    model.config.dtype = default
    model.config.save_pretrained(folder)
