"""An engine from names: the base that the adapters are for, loaded, and the adapters in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.adapters.adapter_files import read_files
from lorakit.adapters.open import chosen_quantization, open_adapter
from lorakit.engine.adapter_reader import AloneError, require_text, why_not_beside
from lorakit.engine.engine import POOL_BYTES, Engine
from lorakit.engine.prefix_cache import PREFIX_BYTES
from lorakit.engine.speculation import NgramSpeculation
from lorakit.errors import InputError, listed
from lorakit.lora.checkpoint import read_config
from lorakit.models.classifier_form import ClassifierForm
from lorakit.models.load import (
    gives_embeddings,
    is_classifier,
    load_classifier,
    load_embedder,
    load_model,
)
from lorakit.models.names import resolve
from lorakit.models.rounding import stored_as
from lorakit.models.sentence_pooling import MEAN, read_pooling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNLIMITED = 1e9
"""transformers has larger numbers for tokenizers that do not say how long a text may be."""


def open_engine(
    model: str | None,
    adapters: Mapping[str, Path],
    *,
    dtype: str | None = None,
    quantization: str | None = None,
    max_rows: int | None = 16,
    context_length: int | None = None,
    merged: bool = False,
    weights: str | None = None,
    pool_bytes: int = POOL_BYTES,
    prefix_bytes: int = PREFIX_BYTES,
    embeds: bool = False,
    speculation: NgramSpeculation | None = None,
) -> Engine:
    """Loads the base model and registers the adapters, by the names that they are served under.

    Args:
        model: the base; None is what the adapters were trained on.
        quantization: of the base, as in `open_adapter`.
        merged: fold the one adapter into the base, for full speed; its name is the model's then.
        weights: `int8` or `int4` rounds the base's to 8 or 4 bits, which a CPU reads faster.
        embeds: whether a model will do that writes nothing, and gives numbers alone.
        speculation: as of `Engine`.

    Raises:
        InputError: there is no usable base or adapter, or the adapters are for several bases.
    """
    options: dict[str, Any] = {
        "max_rows": max_rows,
        "context_length": context_length,
        "pool_bytes": pool_bytes,
        "prefix_bytes": prefix_bytes,
        "speculation": speculation,
    }
    if merged:
        if len(adapters) != 1:
            raise InputError(f"merged serves one adapter, not {len(adapters)}")
        ((name, folder),) = adapters.items()
        loading = {"base": model, "dtype": dtype, "quantization": quantization}
        return _merged(name, folder, loading, weights, options)
    base = model or _base_of(adapters)
    stored = chosen_quantization(adapters.values(), quantization)
    classifies = embeds and is_classifier(base)
    gives_numbers = classifies or (embeds and gives_embeddings(base))
    load = load_classifier if classifies else load_embedder if gives_numbers else load_model
    loaded, tokenizer = load(base, dtype, quantization=stored)
    path = resolve(base).path
    if gives_numbers:
        options["form"] = ClassifierForm(path, int(tokenizer.pad_token_id), classifies)
    options["pooling"] = replace(MEAN, longest=_most(tokenizer))
    if not classifies:
        options["pooling"] = read_pooling(path)
    engine = Engine(stored_as(loaded, weights), tokenizer, base, **options)
    if stored and quantization is None:
        engine.notices.append(
            f"the base is quantised to {stored}, as it was for training: --quantization none is "
            "faster, and takes more memory"
        )
    try:
        for name, folder in adapters.items():
            info = engine.pool.register(name, folder)
            if info.notice:
                engine.notices.append(info.notice)
    except BaseException:
        engine.close()
        raise
    return engine


def open_beside(
    model: str | None, adapters: Mapping[str, Path], **options: Any
) -> tuple[Engine, dict[str, str]]:
    """An engine with those adapters that can stand beside each other.

    Args:
        options: as in `open_engine`.

    Returns: it, and why each of the others cannot, by its name; a notice says so too.

    Raises:
        InputError: as `open_engine`.
    """
    alone = {name: why for name, path in adapters.items() if (why := _why_alone(path))}
    while True:
        beside = {name: path for name, path in adapters.items() if name not in alone}
        try:
            engine = open_engine(model or _base_of(adapters), beside, **options)
        except AloneError as error:
            alone |= {name: error.reason for name, path in beside.items() if path == error.folder}
            continue
        for name, why in alone.items():
            engine.notices.append(f"{name} {why}, so it is merged into a base of its own")
        return engine, alone


def _why_alone(folder: Path) -> str:
    config = read_config(folder)
    require_text(folder, config)
    return why_not_beside(config)


def open_with(
    model: str | None,
    name: str,
    folder: Path,
    *,
    dtype: str | None = None,
    quantization: str | None = None,
    max_rows: int | None = 16,
    weights: str | None = None,
    speculation: NgramSpeculation | None = None,
) -> Engine:
    """The engine for one adapter: beside its base, or merged into it where only that is possible.

    Raises:
        InputError: as `open_engine`.
    """
    options: dict[str, Any] = {
        "dtype": dtype,
        "quantization": quantization,
        "max_rows": max_rows,
        "weights": weights,
        "speculation": speculation,
    }
    config = read_config(folder)
    require_text(folder, config)
    reason = why_not_beside(config)
    if not reason:
        try:
            return open_engine(model, {name: folder}, **options)
        except AloneError as error:
            reason = error.reason
    engine = open_engine(model, {name: folder}, merged=True, **options)
    engine.notices.append(
        f"{folder} {reason}, so it is merged into the base, which cannot answer without it"
    )
    return engine


def _merged(
    name: str, folder: Path, loading: dict[str, Any], weights: str | None, options: dict[str, Any]
) -> Engine:
    require_text(folder, read_config(folder))
    opened = open_adapter(folder, **loading, dequantize=True)
    plain = opened.model.merge_and_unload()
    engine = Engine(stored_as(plain, weights), opened.tokenizer, name, **options)
    engine.pool.closed_because = (
        f"{name} is merged into the model, which serves nothing else: start without --merged"
    )
    return engine


def _most(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The most tokens that a classifier's tokenizer was made for, if it says so."""
    own = tokenizer.model_max_length
    return int(own) if 2 < own < _UNLIMITED else None


def _base_of(adapters: Mapping[str, Path]) -> str:
    bases = {name: read_files(folder).base_model for name, folder in adapters.items()}
    if not bases:
        raise InputError("there is nothing to serve: give --model, an adapter, or both")
    if len(set(bases.values())) > 1:
        told = [f"{name} for {base}" for name, base in bases.items()]
        raise InputError(
            f"the adapters are for different bases ({listed(told)}): serve each base on its own, "
            "or say with --model which one is meant"
        )
    return next(iter(bases.values()))
