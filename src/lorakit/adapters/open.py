"""From an adapter's folder to a model that runs it: the base is found by what is written there."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.adapters.manifest import Manifest, read_manifest
from lorakit.errors import InputError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from lorakit.lora import LoraModel

TEMPLATE_NAME = "chat_template.jinja"


@dataclass(frozen=True)
class OpenAdapter:
    """An adapter on its base model, ready to run.

    `base_model` is the base's name or path, `manifest` is None when lorakit did not train it.
    """

    model: LoraModel
    tokenizer: PreTrainedTokenizerBase
    base_model: str
    manifest: Manifest | None


def open_adapter(
    folder: str | Path, *, base: str | None = None, dtype: str | torch.dtype | None = None
) -> OpenAdapter:
    """Loads the adapter in `folder` and the base model that it was trained on.

    Args:
        base: the base model to use in place of the recorded one.
        dtype: as in `load_model`.

    Raises:
        InputError: there is no usable adapter or base, or the two do not fit.
    """
    from lorakit.lora import LoraModel
    from lorakit.lora.checkpoint import read_adapter
    from lorakit.models import load_model
    from lorakit.models.fingerprint import fingerprint

    config, _ = read_adapter(folder)  # a damaged adapter is said before a model is loaded
    manifest = read_manifest(folder)
    name = base or (manifest.base_model if manifest else config.base_model_name_or_path)
    if not name:
        raise InputError(f"{folder} does not say which base model it is for: give --base")
    model, tokenizer = load_model(name, dtype)
    if manifest and manifest.base_fingerprint not in (None, fingerprint(model)):
        warnings.warn(
            f"{folder} was trained on other weights than those of {name}: "
            "its answers may be worse than when it was trained",
            stacklevel=2,
        )
    template = Path(folder) / TEMPLATE_NAME
    if template.is_file():
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    return OpenAdapter(LoraModel.from_pretrained(model, folder).eval(), tokenizer, name, manifest)
