"""From an adapter's folder to a model that runs it: the base is found by what is written there."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorakit.adapters.adapter_files import AdapterFiles, read_files
from lorakit.adapters.adapter_tokenizer import own_tokenizer
from lorakit.adapters.added_tokens import add_rows
from lorakit.adapters.chat_template import use_template
from lorakit.adapters.derived import other_weights
from lorakit.adapters.lineage import frozen_below
from lorakit.adapters.manifest import Manifest, read_manifest
from lorakit.errors import InputError
from lorakit.lora import LoraModel
from lorakit.lora.routing import FROZEN
from lorakit.lora.vocabulary import vocabulary_size
from lorakit.models.fingerprint import fingerprint
from lorakit.models.load import load_for_task, torch_dtype
from lorakit.models.picture_reader import pass_reader
from lorakit.models.quantization.prepare import dequantized_model
from lorakit.models.quantization.settings import UNQUANTIZED, Quantization, as_quantization
from lorakit.models.rounding import stored_as

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class OpenAdapter:
    """An adapter on its base model, ready to run.

    `base_model` is the base's name or path, `manifest` is None when lorakit did not train it.
    `task_type` is PEFT's word, one of `models.forms.FORMS`; `labels` are a classifier's classes.
    `added_tokens` is how many tokens the base got for the adapter: the last ones.
    """

    model: LoraModel
    tokenizer: PreTrainedTokenizerBase
    base_model: str
    manifest: Manifest | None
    task_type: str = "CAUSAL_LM"
    labels: tuple[str, ...] = ()
    added_tokens: int = 0


def open_adapter(
    folder: str | Path,
    *,
    base: str | None = None,
    dtype: str | torch.dtype | None = None,
    quantization: str | Mapping[str, Any] | Quantization | None = None,
    dequantize: bool = False,
    alone: bool = False,
    weights: str | None = None,
    tell: Callable[[str], None] | None = None,
) -> OpenAdapter:
    """Loads the adapter in `folder` and the base model that it was trained on.

    Args:
        base: the base model to use in place of the recorded one.
        dtype: as in `load_model`.
        quantization: as in `load_model`; `none` is a base that is not quantised, and None the base
            as the adapter was trained on it.
        dequantize: a quantised base is unpacked into plain weights of this dtype.
        weights: `int8` or `int4` rounds the base's to 8 or 4 bits, for inference on a CPU.
        alone: leave out the frozen adapters that it is added to.
        tell: receives the notices on base and adapter; None makes warnings of them.

    Raises:
        InputError: there is no usable adapter or base, or the two do not fit.
    """
    files = read_files(folder, base)  # a damaged adapter is reported before a model is loaded
    manifest, name = files.manifest, files.base_model
    loaded = load_for_task(
        files.task_type,
        name,
        dtype,
        labels=files.labels,
        seed=manifest.seed if manifest else 0,
        quantization=chosen_quantization([folder], quantization),
    )
    model, tokenizer = loaded.model, loaded.tokenizer
    own = fingerprint(model, without=loaded.new_modules)
    notices: list[str] = []
    if dequantize:
        model = dequantized_model(model, torch_dtype(dtype, str(model.device)))
    model = stored_as(model, weights)
    if files.record and own and files.record.base_fingerprint not in (None, own):
        notices.append(other_weights(folder, name))
    tokenizer, added, other_template = fit_base(model, tokenizer, files)
    if other_template and files.task_type == "CAUSAL_LM":
        notices.append(other_template)
    for notice in notices:
        warnings.warn(notice, stacklevel=2) if tell is None else tell(notice)
    put_on = LoraModel.from_pretrained if alone else with_frozen
    adapted = put_on(model, files.folder).eval()
    return OpenAdapter(adapted, tokenizer, name, manifest, files.task_type, files.labels, added)


def with_frozen(model: Any, folder: Path) -> LoraModel:
    """`model` with the adapter in `folder`, and with the frozen ones that it is added to.

    Raises:
        InputError: one of them does not fit, is missing, or has changed.
    """
    below = frozen_below(folder)
    if not below:
        return LoraModel.from_pretrained(model, folder)
    # The lowest first: where it brings rows of new tokens, these are the base's of all.
    names = [f"{FROZEN}{i}" for i in range(len(below))]
    adapted = LoraModel.from_pretrained(model, below[-1], names[-1])
    for name, other in [*zip(names, below, strict=True)][-2::-1]:
        adapted.load_adapter(other, name)
    adapted.load_adapter(folder, "default")
    adapted.set_adapter(["default", *names], inference_mode=True)
    return adapted


def fit_base(model: Any, tokenizer: Any, files: AdapterFiles) -> tuple[Any, int, str]:
    """Gives a base model the tokens that an adapter is for, and takes over its chat template.

    Args:
        model, tokenizer: the base's own; the model is not wrapped yet.

    Returns: the tokenizer that the adapter is asked with, how many tokens are new, and a notice
        where its chat template is not the base's, or "".
    """
    added, present = add_rows(model, files), tokenizer.chat_template
    if own := own_tokenizer(files.folder, tokenizer, vocabulary_size(model)):
        pass_reader(tokenizer, own)
        tokenizer = own
    return tokenizer, added, use_template(tokenizer, files.folder, files.base_model, present)


def chosen_quantization(
    adapters: Iterable[str | Path], wish: str | Mapping[str, Any] | Quantization | None
) -> Quantization | None:
    """How the base of `adapters` is quantised while it is loaded.

    Args:
        adapters: their folders.
        wish: as in `load_model`, `none` for not at all, and None for what they were trained on.

    Raises:
        InputError: they were trained on different ones, and nothing says which is meant.
    """
    if wish is not None:
        return as_quantization(wish)
    trained: dict[str, tuple[str | Path, Quantization | None]] = {}
    for folder in adapters:
        stored = trained_quantization(folder)
        trained[str(stored or UNQUANTIZED)] = folder, stored
    if len(trained) > 1:
        beside = ", ".join(f"{folder} beside {how}" for how, (folder, _) in trained.items())
        raise InputError(
            f"the adapters were trained on a base that was quantised in different ways ({beside}): "
            f"say which is meant, as with --quantization {UNQUANTIZED}"
        )
    return next(iter(trained.values()))[1] if trained else None


def trained_quantization(folder: str | Path) -> Quantization | None:
    """How the base was quantised beside which the adapter in `folder` was trained."""
    manifest = read_manifest(folder)
    return as_quantization(manifest.recipe.get("quantization")) if manifest else None
