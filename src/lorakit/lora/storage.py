"""Saving the adapters of a model, and loading them: `AdapterBank` with folders and the hub.

Where and in which form an adapter is written is `folders.py`'s, what its files hold
`checkpoint.py`'s.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
from torch import nn

from lorakit.errors import InputError, listed
from lorakit.lora.bank import AdapterBank
from lorakit.lora.checkpoint import (
    LoadResult,
    load_initial,
    load_tensors,
    read_adapter,
    read_initial,
)
from lorakit.lora.config import LoraConfig
from lorakit.lora.folders import locate, save_adapters, upload
from lorakit.lora.vocabulary import put_frozen, require_vocabulary, split_frozen


class StoredBank(AdapterBank):
    """The adapters of a model, with the folders that they are saved to and loaded from."""

    def save_pretrained(
        self,
        save_directory: str | Path,
        selected_adapters: Sequence[str] | None = None,
        path_initial_model_for_weight_conversion: str | None = None,
        is_main_process: bool = True,
        **_ignored_by_peft_too: Any,
    ) -> None:
        """Writes each adapter as PEFT does: `default` into the folder, others into subfolders.

        Args:
            selected_adapters: the names of those to write; None is all.
            path_initial_model_for_weight_conversion: set, to whatever value, it writes adapters
                that started from the weight itself (PiSSA, OLoRA) as ordinary ones of twice the
                rank. PEFT needs a path here; lorakit has the initial factors in the model.
            is_main_process: other processes write nothing; under FSDP2 they must call this too.
        """
        names = list(selected_adapters or self.adapters)
        for name in names:
            self.require(name)
        plain = path_initial_model_for_weight_conversion is not None
        with self._biases_in_force(True):
            save_adapters(self, save_directory, names, plain, is_main_process)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload adapter",
    ) -> str:
        """Uploads the adapters, as `save_pretrained` writes them, to the hub; the base stays here.

        Returns: the address of the commit.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return upload(folder, repo_id, private, token, commit_message)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: LoraConfig | None = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = True,
        subfolder: str | None = None,
        ignore_mismatched_sizes: bool = False,
        torch_device: str | None = None,
        **hub: Any,
    ) -> Self:
        """`model` with the adapter in the folder, or of the hub's id, `model_id`.

        Args:
            is_trainable: whether to go on training it; otherwise everything is frozen.
            config: takes the place of the folder's own, and is the adapter's from here on.
            autocast_adapter_dtype: as in `AdapterBank`.
            low_cpu_mem_usage: as in PEFT's function; values are never made up before they are
                loaded.
            ignore_mismatched_sizes: what has another shape keeps its first value, with a warning.
            torch_device: as in PEFT's function; values go where the base layers are.
            hub: `revision`, `token`, … for an adapter on the hub.

        Raises:
            InputError: the folder holds no adapter, a damaged one, or one for another model.
        """
        folder = locate(model_id, subfolder, **hub)
        own_config, tensors = read_adapter(folder)
        wrapped = cls(
            model,
            config or own_config,
            adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            initialize=ignore_mismatched_sizes,
        )
        try:
            wrapped._fill(adapter_name, tensors, folder, ignore_mismatched_sizes)
        except InputError:
            wrapped.unload()
            raise
        wrapped.peft_config[adapter_name].inference_mode = not is_trainable
        wrapped.set_adapter(adapter_name, inference_mode=not is_trainable)
        return wrapped.eval() if not is_trainable else wrapped

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = True,
        subfolder: str | None = None,
        ignore_mismatched_sizes: bool = False,
        torch_device: str | None = None,
        **hub: Any,
    ) -> LoadResult:
        """Adds the adapter in the folder `model_id` beside the others, without activating it.

        Arguments and errors are those of `from_pretrained`.

        Returns: no missing and no unexpected keys, as either is an error here.
        """
        folder = locate(model_id, subfolder, **hub)
        config, tensors = read_adapter(folder)
        self._add(adapter_name, config, autocast_adapter_dtype, ignore_mismatched_sizes)
        try:
            self._fill(adapter_name, tensors, folder, ignore_mismatched_sizes)
        except InputError:
            self.delete_adapter(adapter_name)
            raise
        if self.biases:
            self.biases.use(bool(self.active_adapters))
        if is_trainable:
            self.set_requires_grad(adapter_name)
        return LoadResult([], [])

    def _fill(
        self, name: str, tensors: dict[str, torch.Tensor], folder: Path, ignore_mismatched: bool
    ) -> None:
        base = self.get_base_model()
        if not ignore_mismatched:
            require_vocabulary(base, tensors, folder)
        own = self.adapter_tensors(name)
        tensors, frozen = split_frozen(base, tensors, own)
        other_shape = {k for k, t in tensors.items() if k in own and own[k].shape != t.shape}
        if other_shape and ignore_mismatched:
            message = f"{folder}: {listed(sorted(other_shape), 3)} have another shape: left out"
            warnings.warn(message, stacklevel=3)
            own = {key: tensor for key, tensor in own.items() if key not in other_shape}
            tensors = {key: tensor for key, tensor in tensors.items() if key not in other_shape}
        load_tensors(own, tensors, folder)
        put_frozen(base, frozen, folder, alone=self.adapters == [name])
        load_initial(base, name, read_initial(folder), self.peft_config[name], folder)
