"""A model's adapters as folders: where each is written, and in which form.

One folder's two files are `checkpoint.py`'s.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import ModelCard
from torch import nn

from lorakit import atomic
from lorakit.errors import InputError
from lorakit.lora.checkpoint import PREFIX, initial_factors, whole, write_adapter
from lorakit.lora.config import LoraConfig
from lorakit.lora.layers import LoraLayer
from lorakit.lora.wrapping import adapter_modules

_CARD = """---
library_name: peft
---

A LoRA adapter. Load it with `lorakit` or `peft`:

```python
from lorakit import PeftModel

model = PeftModel.from_pretrained(base_model, "this folder")
```
"""


class WithAdapters(Protocol):
    """A `LoraModel`, as far as its adapters are written."""

    peft_config: dict[str, LoraConfig]

    def get_base_model(self) -> nn.Module: ...
    def adapter_tensors(self, name: str) -> dict[str, torch.Tensor]: ...


def save_adapters(
    bank: WithAdapters,
    directory: str | Path,
    names: Sequence[str],
    plain: bool,
    write: bool,
    values: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
) -> None:
    """Writes `default` into the directory itself and other adapters into subfolders, as PEFT does.

    Where tensors are spread over processes (FSDP2), all of those must call this.

    Args:
        plain: write adapters that train against the rest of the weight (PiSSA, OLoRA) as ordinary
            ones, of twice the rank, which need nothing but the base's own weights.
        write: False only helps to gather.
        values: the adapters' tensors, by adapter and key, in place of the model's own.
    """
    for name in names:
        folder = Path(directory) if name == "default" else Path(directory) / name
        save_adapter(bank, folder, name, plain, write, values.get(name) if values else None)
    if write:
        write_card(directory, bank.get_base_model())


def save_adapter(
    bank: WithAdapters,
    folder: Path,
    name: str,
    plain: bool = False,
    write: bool = True,
    values: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Writes one adapter into a folder, whatever its name; arguments as for `save_adapters`."""
    config, tensors = bank.peft_config[name], dict(values or bank.adapter_tensors(name))
    initial = initial_factors(bank.get_base_model(), name)
    if initial and plain:
        if values:
            raise InputError(
                "path_initial_model_for_weight_conversion takes the adapter's own values: leave "
                "state_dict and save_embedding_layers out"
            )
        config, tensors, initial = as_plain(bank, name), plain_tensors(bank, name), {}
    tensors = {key: whole(tensor) for key, tensor in tensors.items()}
    if write:
        write_adapter(folder, config, tensors, initial)


def write_card(directory: str | Path, base: nn.Module) -> None:
    """Writes `README.md`, by which the hub knows an adapter and its base; what is there stays.

    Args:
        base: the wrapped model, whose configuration, if it has one, names it.
    """
    path = Path(directory) / "README.md"
    card = ModelCard(path.read_text(encoding="utf-8") if path.is_file() else _CARD)
    config: Any = getattr(base, "config", None)
    if config is not None:
        card.data["base_model"] = getattr(config, "_name_or_path", "")
    card.data["library_name"] = "peft"  # the library whose files these are
    card.data["tags"] = [*dict.fromkeys([*(card.data.get("tags") or []), "lora", "lorakit"])]
    atomic.write_file(path, str(card))


def as_plain(bank: WithAdapters, name: str) -> LoraConfig:
    """The configuration of adapter `name` when its initial factors are part of it: rank 2 r."""
    config = bank.peft_config[name]
    # alpha grows as the scaling's denominator does, so that the scaling stays.
    grown = 2**0.5 if config.use_rslora else 2
    patterns = {key: rank * 2 for key, rank in config.rank_pattern.items()}
    return dataclasses.replace(
        config,
        r=2 * config.r,
        lora_alpha=config.lora_alpha * grown,
        rank_pattern=patterns,
        alpha_pattern={key: alpha * grown for key, alpha in config.alpha_pattern.items()},
        init_lora_weights=True,
    )


def plain_tensors(bank: WithAdapters, name: str) -> dict[str, torch.Tensor]:
    """The tensors of adapter `name` with its initial factors in `A` and `B`."""
    tensors = bank.adapter_tensors(name)
    for path, layer in adapter_modules(bank.get_base_model(), name):
        if isinstance(layer, LoraLayer) and name in layer.lora_initial:
            A, B = layer.factors(name)
            tensors[f"{PREFIX}{path}.lora_A.weight"] = A
            tensors[f"{PREFIX}{path}.lora_B.weight"] = B
    return tensors
