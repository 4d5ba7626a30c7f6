"""Which adapters can be combined: the same base, the same shapes, and nothing that does not add up.

How they are combined is `combine.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lorakit.adapters.derived import origin
from lorakit.adapters.updates import AdapterFile
from lorakit.errors import InputError, listed


def require_combinable(files: Sequence[AdapterFile]) -> None:
    """Raises InputError for an adapter that is no sum of updates, or that fits no other one."""
    for file in files:
        if file.has_lengths:
            raise InputError(
                f"{file.folder} is a DoRA adapter: its update needs the base's weights, and "
                "lengths do not add up. Merge it with lorakit merge, or combine in Python with "
                "LoraModel.add_weighted_adapter(combination_type='svd')"
            )
        if file.config.bias != "none":
            raise InputError(
                f"{file.folder} trains biases of the base itself (bias={file.config.bias}), "
                "which do not add up"
            )
        if file.config.target_parameters:
            raise InputError(
                f"{file.folder} adapts parameters themselves (target_parameters), which is not "
                "combined yet: merge it with lorakit merge"
            )
        file.require_updates()
    first = files[0]
    for file in files[1:]:
        for field in ("task_type", "trainable_token_indices", "layer_replication"):
            ours, theirs = getattr(first.config, field), getattr(file.config, field)
            if ours != theirs and (field == "layer_replication" or None not in (ours, theirs)):
                raise InputError(
                    f"{first.folder} has {field} {ours} and {file.folder} has {theirs}: these do "
                    "not go together"
                )
    if biased := [file for file in files if file.config.lora_bias]:
        for file in files:
            if embedding := next((p for p, u in file.updates.items() if u.is_embedding), None):
                raise InputError(
                    f"{biased[0].folder} has lora_bias, which embeddings cannot have, and "
                    f"{file.folder} adapts {embedding}: no one adapter can hold both"
                )
    known: dict[str, tuple[AdapterFile, tuple[torch.Size, torch.Size]]] = {}
    for file in files:
        for path, update in file.updates.items():
            shape = update.A.shape[1:], update.B.shape[:1]
            other, before = known.setdefault(path, (file, shape))
            if before != shape:
                sizes = [f"{out[0]} × {inside.numel()}" for inside, out in (before, shape)]
                raise InputError(
                    f"{other.folder} and {file.folder} are for different base models: {path} is "
                    f"{sizes[0]} in one and {sizes[1]} in the other"
                )


def common_base(files: Sequence[AdapterFile], base: str | None) -> tuple[str | None, str | None]:
    """The base that all adapters are for, and its fingerprint if one of them knows it.

    Raises:
        InputError: they are for different ones.
    """
    origins = [origin(file.folder, file.config) for file in files]
    prints = {o.base_fingerprint: f for o, f in zip(origins, files, strict=True)}
    prints.pop(None, None)
    if len(prints) > 1:
        one, other, *_ = (file.folder for file in prints.values())
        raise InputError(
            f"{one} and {other} were trained on different weights (by fingerprint), "
            "so their updates do not belong together"
        )
    names = dict.fromkeys(o.base_model for o in origins if o.base_model)
    same_weights = all(o.base_fingerprint for o in origins)
    if len(names) > 1 and not same_weights and base is None:
        raise InputError(
            f"the adapters are for different base models ({listed(names)}): if these are the same, "
            "say which one with --base"
        )
    return base or next(iter(names), None), next(iter(prints), None)


def whole_tensors(files: Sequence[AdapterFile], notices: list[str]) -> dict[str, torch.Tensor]:
    """The tensors that are no factor, which are carried along where only one adapter has them.

    Raises:
        InputError: two adapters have different ones for the same place.
    """
    found: dict[str, torch.Tensor] = {}
    owner: dict[str, AdapterFile] = {}
    adapted = {path for file in files for path in file.updates}
    for file in files:
        for key, tensor in file.others.items():
            if key in found and not torch.equal(found[key], tensor):
                raise InputError(
                    f"{owner[key].folder} and {file.folder} each have their own {key} "
                    "(modules_to_save or trained tokens), and these do not add up: train one "
                    "without it"
                )
            for path in adapted:
                if f".{path}." in f".{key}" and not key.endswith(".base_layer.weight"):
                    raise InputError(
                        f"{file.folder} trains {path} whole, and another adapter by B A: "
                        "these do not add up"
                    )
            found[key], owner[key] = tensor, file
    for file in files if len(files) > 1 else ():
        own = [key for key in file.others if owner[key] is file]
        if own:
            notices.append(
                f"{len(own)} tensors that {file.folder} trained whole are carried along as they "
                "are, without its weight"
            )
    return found
