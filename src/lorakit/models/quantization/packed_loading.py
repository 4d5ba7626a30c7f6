"""Loading a model whose published weights are packed.

Linear layers keep theirs packed: they are unpacked for one product at a time. What transformers
cuts, stacks or turns while it loads (the experts of a layer) is unpacked once, and that is told
with the memory that it takes.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lorakit.errors import InputError, count
from lorakit.lora.architecture import is_conv1d
from lorakit.models.layouts.layout import TensorSource
from lorakit.models.quantization.packed import PackedBackend, Packing
from lorakit.models.quantization.packed_linear import PackedWeight, make_packed
from lorakit.models.shards import NewTensor, ShardReader, all_tensors
from lorakit.models.skeleton import file_names

if TYPE_CHECKING:
    from lorakit.models.layouts.layout import Layout
    from lorakit.models.shards import StoredTensor

METHOD = "lorakit_packed"
"""The name under which transformers finds the quantizer of this module."""


class _Files:
    """The files of a model while it is loaded, and which of their weights stay packed."""

    def __init__(
        self, tensors: Mapping[str, StoredTensor], packed: dict[str, Packing], used: set[str]
    ) -> None:
        self.reader = ShardReader(tensor.path for tensor in tensors.values())
        self.packed = packed
        self.kept: dict[str, Packing] = {}
        self.unpacked: list[Packing] = []
        """Those that the model holds unpacked."""
        self.sources: dict[str, TensorSource] = {
            name: TensorSource(tensor, partial(self.reader.read, tensor))
            for name, tensor in tensors.items()
            if name not in used
        }
        for name, packing in packed.items():
            self.sources[name] = TensorSource(
                NewTensor("F32", packing.shape), partial(self.values, packing)
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> _Files:
        return self  # transformers copies a configuration with all that it holds

    def values(self, packing: Packing, turned: bool = False) -> torch.Tensor:
        """An unpacked weight in float32."""
        self.unpacked.append(packing)
        parts = {role: self.reader.read(part) for role, part in packing.parts.items()}
        W = packing.backend.values(parts, packing, torch.float32)
        return (W.T if turned else W).contiguous()

    def keep(self, model: Any) -> None:
        """Decides which weights of `model` stay packed, and makes room for them."""
        stored = file_names(model, self.sources).stored
        own = {file: name for name, file in stored.items() if file in self.packed}
        tied = getattr(model, "all_tied_weights_keys", {})
        tied = {*tied, *tied.values()}
        for file, name in own.items():
            path, packing = name.rpartition(".")[0], self.packed[file]
            layer = model.get_submodule(path)
            if is_conv1d(layer):
                shape: tuple[int, ...] = packing.shape[::-1]
                read = partial(self.values, packing, turned=True)
                self.sources[file] = TensorSource(NewTensor("F32", shape), read)
            if type(layer) is not nn.Linear or not name.endswith(".weight") or name in tied:
                continue
            if tuple(layer.weight.shape) != packing.shape:
                raise InputError(
                    f"model: {file} is {packing.shape} unpacked, and config.json says "
                    f"{tuple(layer.weight.shape)}: its files and its configuration have other "
                    "shapes"
                )
            self.kept[path] = packing
            del self.sources[file]
            make_packed(layer)

    def fill(self, model: Any, device: torch.device) -> None:
        """Reads the weights that stay packed into `model`."""
        for path, packing in self.kept.items():
            parts = {r: self.reader.read(p).to(device) for r, p in packing.parts.items()}
            model.get_submodule(path).weight = PackedWeight.of(parts, packing)


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """What the quantizer needs: the files, and the settings of `config.json`."""

    def __init__(self, settings: dict[str, Any], files: _Files | None, **_: Any) -> None:
        self.quant_method: Any = METHOD
        self.settings, self.files = settings, files

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.settings)


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """Puts packed linear layers into a model while transformers loads it."""

    quantization_config: PackedConfig

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        tensor: torch.Tensor | NewTensor = getattr(param, "tensor", param)
        return dtype if tensor.dtype.is_floating_point else None

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        assert self.quantization_config.files is not None
        self.quantization_config.files.keep(model)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        config = self.quantization_config
        assert config.files is not None
        device = next(p.device for p in model.parameters() if not p.is_meta)
        config.files.fill(model, device)
        config.files = None
        config.quant_method = config.settings["quant_method"]
        return model


def load_packed(
    layout: Layout, form: str, backend: PackedBackend, settings: dict[str, Any], **options: Any
) -> tuple[Any, dict[str, Any]]:
    """What `form`, one of transformers' classes, loads of the packed weights in `layout`.

    Args:
        settings: the `quantization_config` of the configuration.
        options: those of `from_pretrained`, fields of the configuration among them.

    Raises:
        InputError: the weights cannot be unpacked, or the model has no such form.

    Returns: the model, and what `from_pretrained` tells of its files.
    """
    import transformers

    own = layout.config()
    fields = {*own.to_dict(), "id2label", "label2id", "num_labels"} - {"dtype", "torch_dtype"}
    given = {name: options.pop(name) for name in list(options) if name in fields}
    given.pop("quantization_config", None)
    config = layout.config(**given) if given else own
    text = config.get_text_config()
    if hasattr(text, "quantization_config"):
        del text.quantization_config
    try:
        kind = getattr(transformers, form)._model_mapping[type(config)]
    except KeyError as error:
        raise InputError(
            f"model: {layout.path} is a {config.model_type}, which transformers has no {form} of"
        ) from error
    tensors = all_tensors(layout.shards())
    packed, used = backend.find(tensors, settings)
    files = _Files(tensors, packed, used)
    with files.reader:
        config.quantization_config = {
            "quant_method": METHOD,
            "settings": settings,
            "files": files,
        }
        model, info = kind.from_pretrained(
            None, config=config, state_dict=files.sources, output_loading_info=True, **options
        )
    if (layout.path / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = transformers.GenerationConfig.from_pretrained(layout.path)
    if unpacked := files.unpacked:
        numbers = sum(prod(packing.shape) for packing in unpacked)
        before = sum(packing.bytes for packing in unpacked)
        warnings.warn(
            f"model: {layout.path}: {count(len(unpacked), 'weight')} of {backend.name} outside "
            f"linear layers (such as experts) are unpacked: {_megabytes(before)} in the files take "
            f"{_megabytes(numbers * model.dtype.itemsize)} of memory in "
            f"{str(model.dtype).removeprefix('torch.')}",
            stacklevel=2,
        )
    return model, info


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
