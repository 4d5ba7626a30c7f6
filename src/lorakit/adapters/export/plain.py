"""An adapter as nothing but pairs of matrices, which is all that other programs' formats hold.

What is more than that (DoRA, trained biases, whole modules, tokens, convolutions, experts) is
refused here with its name, as leaving it out would silently give another model.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lorakit.adapters.derived import base_of
from lorakit.adapters.updates import COPY, AdapterUpdates, ModuleUpdate, read_updates
from lorakit.commands import quoted
from lorakit.errors import InputError, listed
from lorakit.lora.architecture import is_conv1d
from lorakit.lora.checkpoint import PREFIX
from lorakit.lora.config import LoraConfig
from lorakit.lora.fitting import renamed_modules
from lorakit.models.layouts import foreign_layout
from lorakit.models.names import ALIASES, resolve
from lorakit.models.skeleton import skeleton


@dataclass(frozen=True)
class PlainAdapter:
    """An adapter's pairs by the path of their module, its configuration, and its base's name."""

    config: LoraConfig
    pairs: dict[str, ModuleUpdate]
    base_model: str
    notices: tuple[str, ...] = ()


def read_plain(folder: str | Path, target: str, base: str | None = None) -> PlainAdapter:
    """The adapter in `folder`, if pairs of matrices are all that it is.

    Adapters whose start is taken off again (PiSSA, OLoRA) become pairs of twice the rank.

    Args:
        target: what cannot hold more, for the message: "vLLM".

    Raises:
        InputError: it is more than pairs, damaged, or does not say what it is for.
    """
    file = read_updates(folder)
    name = base_of(folder, file.config, base)
    _require_plain(file, target)
    notices = tuple(
        f"left out {key.removeprefix(PREFIX)}: a copy of the base's own weight"
        for key in file.others
    )
    if not file.updates:
        raise InputError(f"{folder} holds no pair of matrices A and B")
    pairs = {path: update.without_start() for path, update in file.updates.items()}
    return PlainAdapter(file.config, pairs, name, notices)


def found_at(base_model: str) -> str:
    """The base model's name as other programs find it: an alias is lorakit's own word.

    Raises:
        InputError: they cannot read it with the names that the adapter has.
    """
    if base_model in ALIASES:
        return str(resolve(base_model).path)
    if layout := foreign_layout(base_model):
        raise InputError(
            f"model: {base_model} is in {layout.title}, whose modules have other names: "
            f"lorakit convert {quoted(base_model)} -o DIR, and give --base DIR"
        )
    return base_model


def fitted_plain(folder: str | Path, plain: PlainAdapter) -> PlainAdapter:
    """The adapter in `folder` under the names that its base has, of which no weight is read.

    Raises:
        InputError: a pair is for a module that the base has not, or for one of another shape.
    """
    model = skeleton(resolve(plain.base_model).path)
    plain = renamed_plain(plain, model)
    modules: dict[str, Any] = dict(model.named_modules())
    for path, pair in plain.pairs.items():
        d_out, d_in = pair.B.shape[0], pair.A.shape[1]
        if path not in modules:
            raise InputError(
                f"{folder} adapts {path}, which {plain.base_model} does not have: "
                "it is an adapter for another base model"
            )
        shape = tuple(modules[path].weight.shape)
        turned = pair.is_embedding or is_conv1d(modules[path])
        if shape != ((d_in, d_out) if turned else (d_out, d_in)):
            raise InputError(
                f"{folder} has an update of {d_out} x {d_in} for {path}, whose weight in "
                f"{plain.base_model} is {shape}: it is an adapter for another base model"
            )
    return plain


def renamed_plain(plain: PlainAdapter, model: nn.Module) -> PlainAdapter:
    """The adapter under the names that `model` has; itself where these are its own.

    A language model has other names alone than in one for pictures.
    """
    renamed = renamed_modules(model, plain.pairs)
    if not renamed:
        return plain
    pairs = {
        (name := renamed.get(path, path)): dataclasses.replace(pair, path=name)
        for path, pair in plain.pairs.items()
    }
    config = dataclasses.replace(
        plain.config,
        target_modules=sorted(pairs),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
    )
    one, other = next(iter(renamed.items()))
    notice = f"{len(renamed)} modules have other names in {plain.base_model} ({one} is {other})"
    return dataclasses.replace(plain, pairs=pairs, config=config, notices=(*plain.notices, notice))


def _require_plain(file: AdapterUpdates, target: str) -> None:
    """Raises InputError with the name of what is more than a pair of matrices, or damaged."""
    config = file.config
    more = [
        (config.use_dora, "DoRA (use_dora)"),
        (bool(config.modules_to_save), f"modules trained whole ({config.modules_to_save})"),
        (config.bias != "none", f"trained biases (bias={config.bias})"),
        (config.lora_bias, "a bias of B (lora_bias)"),
        (bool(config.trainable_token_indices), "trained tokens (trainable_token_indices)"),
        (bool(config.target_parameters), "adapted parameters (target_parameters), such as experts"),
        (bool(config.layer_replication), "replicated layers (layer_replication)"),
    ]
    more += [(not k.endswith(COPY), f"the tensor {k.removeprefix(PREFIX)}") for k in file.others]
    for path, update in file.updates.items():
        more += [
            (update.bias is not None, f"a bias of B ({path})"),
            (not update.is_matrix, f"a convolution ({path})"),
        ]
    found = [what for present, what in more if present]
    if found:
        raise InputError(
            f"{file.folder} has {listed(found, 2)}, which an adapter for {target} cannot hold: "
            f"lorakit merge {quoted(file.folder)} -o MODEL makes a plain model that it can use"
        )
    for part in file.skipped:
        raise InputError(f"{file.folder}: {part.path}: {part.reason}")
