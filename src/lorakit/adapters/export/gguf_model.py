"""Base + adapter as one GGUF model file, for llama.cpp, Ollama and whatever is built on them.

The merge itself, and the proof that it is right, is `lorakit.adapters.merge`'s; from its folder
the file is written tensor by tensor, so that no more than one of them is in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import gguf
import torch
from safetensors import safe_open

from lorakit import atomic
from lorakit.adapters.export.gguf_adapter import (
    DTYPES,
    GgufExport,
    require_file,
)
from lorakit.adapters.export.gguf_family import (
    Family,
    add_hyperparameters,
    differences,
    extra_tensors,
    family_of,
    laid_out,
    tensor_name,
)
from lorakit.adapters.export.gguf_tokenizer import add_tokenizer
from lorakit.errors import InputError
from lorakit.folder_lock import reserves
from lorakit.models.names import resolve
from lorakit.models.skeleton import read_base_config
from lorakit.progress import track

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_FILE_TYPES = {
    "float32": gguf.LlamaFileType.ALL_F32,
    "float16": gguf.LlamaFileType.MOSTLY_F16,
    "bfloat16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}


@reserves("output")
def export_gguf_model(
    adapter: str | Path, output: str | Path, *, base: str | None = None, dtype: str = "float16"
) -> GgufExport:
    """Merges the adapter into its base and writes the model to the file `output`.

    The merge is made in float32 and checked, and rounded once when it is written. Beside `output`
    it needs the float32 model's size on the disk for a while.

    Args:
        base: the base model, when it is not the recorded one.
        dtype: of the written weights, one of `DTYPES`. Vectors, and rows that q8_0 cannot hold
            (not of a multiple of 32 values), are written wider.

    Raises:
        InputError: the adapter, the base's architecture or tokenizer, or `output` cannot be used.
        LorakitError: the merged model differs from base + adapter.
    """
    from lorakit.adapters.manifest import read_manifest
    from lorakit.adapters.merge import merge
    from lorakit.lora.checkpoint import read_config

    require_file(output)
    if dtype not in DTYPES:
        raise InputError(f"--dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    manifest = read_manifest(adapter)
    recorded = manifest.base_model if manifest else read_config(adapter).base_model_name_or_path
    if name := base or recorded:  # what cannot be written is said before anything is merged
        family_of(read_base_config(resolve(name).path), name)
    with (
        atomic.replacing_file(output) as path,
        TemporaryDirectory(prefix=f".{Path(output).name}.", dir=path.parent) as folder,
    ):
        merged = merge(adapter, Path(folder) / "merged", base=base, dtype="float32")
        report = write_gguf(Path(folder) / "merged", path, dtype, name or str(adapter))
    notices = (*merged.notices, *report.notices)
    return replace(report, output=str(output), notices=notices)


def write_gguf(folder: Path, output: str | Path, dtype: str, name: str) -> GgufExport:
    """Writes the plain model in `folder` (safetensors) to the GGUF file `output`.

    Args:
        dtype: one of `DTYPES`.
        name: what the model is called, in messages too.

    Raises:
        InputError: its architecture or tokenizer has no known form in llama.cpp.
    """
    from transformers import AutoTokenizer

    config = read_base_config(folder)
    family = family_of(config, name)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    with atomic.replacing_file(output) as path:
        writer = gguf.GGUFWriter(path, family.name)
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(Path(name).name)
        add_hyperparameters(writer, family, config)
        writer.add_file_type(_FILE_TYPES[dtype])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_tokenizer(writer, tokenizer, family, config.vocab_size, name)
        count = 0
        for own, tensor in _tensors(folder, family, config):
            form = _form(own, tensor, dtype)
            shape = gguf.quant_shape_to_byte_shape(tensor.shape, form)
            size = int(torch.tensor(shape).prod())
            writer.add_tensor_info(own, shape, _BYTES, size, form)
            count += 1
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for own, tensor in track(_tensors(folder, family, config), "writing tensors", count):
            values = tensor.float().contiguous().numpy()
            writer.write_tensor_data(gguf.quantize(values, _form(own, tensor, dtype)))
        writer.close()
    size = Path(output).stat().st_size
    notices = tuple(differences(config, name))
    return GgufExport(str(output), family.name, dtype, count, size, notices)


_BYTES = torch.zeros(0, dtype=torch.uint8).numpy().dtype


def _tensors(
    folder: Path, family: Family, config: PreTrainedConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """llama.cpp's tensors, one at a time, in an order that is always the same."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                if name.endswith((".attn.bias", ".attn.masked_bias")):
                    continue  # GPT-2's causal mask, in old files
                own = tensor_name(family, config, name)
                yield own, laid_out(family, config, name, file.get_tensor(name))
    yield from extra_tensors(config).items()


def _form(name: str, tensor: torch.Tensor, dtype: str) -> gguf.GGMLQuantizationType:
    """How a tensor is written; llama.cpp computes with vectors and positions in float32 only."""
    if tensor.dim() < 2 or name == "position_embd.weight":
        return gguf.GGMLQuantizationType.F32
    if dtype == "q8_0" and tensor.shape[-1] % gguf.GGML_QUANT_SIZES[DTYPES[dtype]][0]:
        return gguf.GGMLQuantizationType.F16
    return DTYPES[dtype]
