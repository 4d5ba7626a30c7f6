"""Methods of `LoraModel` that save adapters and load them, with PEFT's names and arguments.

Where an adapter lies is `locate.py`'s, in which form it is written `saving.py`'s, what its files
hold `checkpoint.py`'s. Each function's first parameter is the `LoraModel`, or its class.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from lorakit.errors import InputError, listed
from lorakit.lora.checkpoint import (
    PREFIX,
    LoadResult,
    load_initial,
    load_tensors,
    read_adapter,
    read_initial,
)
from lorakit.lora.config import LoraConfig
from lorakit.lora.fitting import Tensors, fitted
from lorakit.lora.key_names import renamed, values_in
from lorakit.lora.locate import SAVING, hub_arguments, locate, refuse_offload, require_known, upload
from lorakit.lora.saving import save_adapters
from lorakit.lora.vocabulary import (
    frozen_embeddings,
    of_same_shape,
    put_frozen,
    require_vocabulary,
    split_frozen,
)


def save_pretrained(
    self: Any,
    save_directory: str | Path,
    safe_serialization: bool = True,
    selected_adapters: Sequence[str] | None = None,
    save_embedding_layers: str | bool = "auto",
    is_main_process: bool = True,
    path_initial_model_for_weight_conversion: str | None = None,
    *,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    **others: Any,
) -> None:
    """Writes each adapter as PEFT does: `default` into the folder, others into subfolders.

    Args:
        safe_serialization: False warns that it has no effect: pickles are never written.
        selected_adapters: the names of those to write; None is all.
        save_embedding_layers: write the base's embedding and head too; `"auto"` where it got
            tokens since it was loaded.
        is_main_process: other processes write nothing; under FSDP2 they must call this too.
        path_initial_model_for_weight_conversion: set, to whatever value, it writes adapters
            that started from the weight itself (PiSSA, OLoRA) as ordinary ones of twice the
            rank. PEFT needs a path here; lorakit has the initial factors in the model.
        state_dict: take the values from here, as `state_dict()` of the model gives them.
        others: of transformers' `save_pretrained`; they mean whole models, and do nothing.

    Raises:
        InputError: there is no such adapter, or values are missing in `state_dict`.
        TypeError: an argument is unknown.
    """
    require_known(self.save_pretrained, others, SAVING)
    if not safe_serialization:
        message = "safe_serialization=False has no effect: lorakit writes no pickles, and PEFT "
        warnings.warn(f"{message}reads safetensors too", stacklevel=2)
    names = list(selected_adapters or self.adapters)
    for name in names:
        self.require(name)
    values = {}
    for name in names:
        own = self.adapter_tensors(name)
        base = frozen_embeddings(self.get_base_model(), own, save_embedding_layers)
        own |= base
        if state_dict is not None:
            own = values_in(self, own, state_dict)
        if base or state_dict is not None:
            values[name] = own
    plain = path_initial_model_for_weight_conversion is not None
    with self.biases.using(True):
        save_adapters(self, save_directory, names, plain, is_main_process, values)


def push_to_hub(
    self: Any,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Uploads the adapters, as `save_pretrained` writes them, to the hub; the base stays here.

    Args:
        revision: a branch, which must be there; None for the repository's own.
        create_pr: as a pull request.

    Returns: the address of the commit.
    """
    with TemporaryDirectory() as folder:
        self.save_pretrained(folder)
        return upload(
            folder,
            repo_id,
            private,
            token,
            commit_message=commit_message or "Upload adapter",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


def from_pretrained(
    cls: Any,
    model: nn.Module,
    model_id: str | Path,
    adapter_name: str = "default",
    is_trainable: bool = False,
    config: LoraConfig | None = None,
    autocast_adapter_dtype: bool = True,
    ephemeral_gpu_offload: bool = False,
    low_cpu_mem_usage: bool = False,
    key_mapping: Mapping[str, str] | None = None,
    *,
    subfolder: str | None = None,
    ignore_mismatched_sizes: bool = False,
    torch_device: str | None = None,
    **hub: Any,
) -> Any:
    """`model` with the adapter in the folder, or of the hub's id, `model_id`.

    Args:
        is_trainable: whether to continue its training; otherwise everything is frozen.
        config: takes the place of the folder's own, and is the adapter's from here on.
        autocast_adapter_dtype: as in `LoraModel`.
        ephemeral_gpu_offload: True is refused.
        low_cpu_mem_usage: has no effect: values are never made up before they are loaded.
        key_mapping: replacements by expression for keys of the file, without PEFT's prefix.
        ignore_mismatched_sizes: what has another shape keeps its first value, with a warning.
        torch_device: has no effect: values go where the base layers are.
        hub: `revision`, `token`, … for an adapter on the hub, and what PEFT does nothing with
            (`locate.py`).

    Raises:
        InputError: the folder holds no adapter, a damaged one, or one for another model.
        TypeError: an argument is unknown.
    """
    refuse_offload(ephemeral_gpu_offload)
    folder = locate(model_id, subfolder, **hub_arguments(cls.from_pretrained, hub))
    config, tensors, initial = _read(model, folder, key_mapping, config)
    wrapped = cls(
        model,
        config,
        adapter_name,
        autocast_adapter_dtype=autocast_adapter_dtype,
        initialize=ignore_mismatched_sizes,
    )
    try:
        _fill(wrapped, adapter_name, tensors, initial, folder, ignore_mismatched_sizes)
    except InputError:
        wrapped.unload()
        raise
    wrapped.peft_config[adapter_name].inference_mode = not is_trainable
    wrapped.set_adapter(adapter_name, inference_mode=not is_trainable)
    return wrapped.eval() if not is_trainable else wrapped


def load_adapter(
    self: Any,
    model_id: str | Path,
    adapter_name: str,
    is_trainable: bool = False,
    torch_device: str | None = None,
    autocast_adapter_dtype: bool = True,
    ephemeral_gpu_offload: bool = False,
    low_cpu_mem_usage: bool = False,
    key_mapping: Mapping[str, str] | None = None,
    *,
    config: LoraConfig | None = None,
    subfolder: str | None = None,
    ignore_mismatched_sizes: bool = False,
    **hub: Any,
) -> LoadResult:
    """Adds the adapter in the folder `model_id` beside the others, without activating it.

    Arguments and errors are those of `from_pretrained`.

    Returns: no missing and no unexpected keys, as either is an error here.
    """
    refuse_offload(ephemeral_gpu_offload)
    folder = locate(model_id, subfolder, **hub_arguments(self.load_adapter, hub))
    config, tensors, initial = _read(self.get_base_model(), folder, key_mapping, config)
    self._add(adapter_name, config, autocast_adapter_dtype, ignore_mismatched_sizes)
    try:
        _fill(self, adapter_name, tensors, initial, folder, ignore_mismatched_sizes)
    except InputError:
        self.delete_adapter(adapter_name)
        raise
    self.biases.use(bool(self.active_adapters))
    if is_trainable:
        self.set_requires_grad(adapter_name)
    return LoadResult([], [])


def _read(
    model: nn.Module,
    folder: Path,
    key_mapping: Mapping[str, str] | None,
    config: LoraConfig | None = None,
) -> tuple[LoraConfig, Tensors, Tensors]:
    """The adapter in `folder` under the names of `model`: configuration, tensors, initial factors.

    Args:
        config: takes the place of the folder's own.
    """
    own, tensors = read_adapter(folder)
    tensors = renamed(tensors, key_mapping, PREFIX)
    initial = renamed(read_initial(folder), key_mapping, "")
    return fitted(model, config or own, tensors, initial, folder)


def _fill(
    wrapped: Any,
    name: str,
    tensors: Tensors,
    initial: Tensors,
    folder: Path,
    ignore_mismatched: bool,
) -> None:
    """Gives adapter `name` of a `LoraModel` the values that were read."""
    base = wrapped.get_base_model()
    if not ignore_mismatched:
        require_vocabulary(base, tensors, folder)
    own = wrapped.adapter_tensors(name)
    tensors, frozen = split_frozen(base, tensors, own)
    other_shape = {k for k, t in tensors.items() if k in own and own[k].shape != t.shape}
    kept = of_same_shape(base, frozen) if ignore_mismatched else frozen
    left_out = sorted([*other_shape, *(path for path, _ in frozen.keys() - kept.keys())])
    if left_out and ignore_mismatched:
        message = f"{folder}: {listed(left_out, 3)} have another shape: left out"
        warnings.warn(message, stacklevel=3)
        own = {key: tensor for key, tensor in own.items() if key not in other_shape}
        tensors = {key: tensor for key, tensor in tensors.items() if key not in other_shape}
    load_tensors(own, tensors, folder)
    put_frozen(base, kept, folder, alone=wrapped.adapters == [name])
    load_initial(base, name, initial, wrapped.peft_config[name], folder)
