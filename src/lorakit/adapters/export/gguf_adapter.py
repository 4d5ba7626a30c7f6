"""An adapter as a GGUF file, which llama.cpp puts on its own copy of the base model (`--lora`).

llama.cpp multiplies `B A` by `adapter.lora.alpha / r` with the file's one alpha and each pair's
own r (`llama_adapter_lora_weight::get_scale`), so what differs from that goes into `B`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import gguf

from lorakit import atomic
from lorakit.adapters.chat_template import exported_template
from lorakit.adapters.export.gguf_family import Family, family_of, interleaved, tensor_name
from lorakit.adapters.export.gguf_tokenizer import add_templates
from lorakit.adapters.export.plain import PlainAdapter, fitted_plain, read_plain
from lorakit.errors import InputError
from lorakit.folder_lock import reserves
from lorakit.folder_name import folder_name
from lorakit.models.names import resolve
from lorakit.models.skeleton import read_base_config
from lorakit.models.template_files import TEMPLATE_NAME

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

DTYPES = {
    "float32": gguf.GGMLQuantizationType.F32,
    "float16": gguf.GGMLQuantizationType.F16,
    "bfloat16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
}


@dataclass(frozen=True)
class GgufExport:
    """What was written: `tensors` counts those of the file.

    `template` is the file with an adapter's chat template, where its base may have another one.
    """

    output: str
    architecture: str
    dtype: str
    tensors: int
    bytes: int
    notices: tuple[str, ...] = ()
    template: str | None = None


@reserves("output")
def export_gguf_adapter(
    adapter: str | Path, output: str | Path, *, base: str | None = None, dtype: str = "float32"
) -> GgufExport:
    """Writes the adapter in the folder `adapter` to the file `output`, for llama.cpp.

    Args:
        base: the base model, when it is not the recorded one; only its configuration is read.
        dtype: of the written factors, one of `DTYPES` without q8_0.

    Raises:
        InputError: the adapter, its base's architecture or `output` cannot be used.
    """
    require_file(output)
    if dtype not in DTYPES or dtype == "q8_0":
        raise InputError(
            f"--dtype of an adapter must be float32, float16 or bfloat16, not {dtype!r}"
        )
    plain = read_plain(adapter, "llama.cpp", base)
    config = read_base_config(resolve(plain.base_model).path)
    family = family_of(config, plain.base_model)
    plain = fitted_plain(adapter, plain)
    template = exported_template(adapter, plain.base_model)
    with atomic.replacing_file(output) as path:
        writer = gguf.GGUFWriter(path, family.name)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(folder_name(adapter))
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(plain.config.lora_alpha))
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, plain.base_model)
        add_templates(writer, template.own)
        count = 0
        for name, tensor in _tensors(plain, family, config):
            values = gguf.quantize(tensor.float().contiguous().numpy(), DTYPES[dtype])
            writer.add_tensor(name, values, raw_dtype=DTYPES[dtype])
            count += 1
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    size = Path(output).stat().st_size
    notices = [*plain.notices, *template.notices]
    file = Path(adapter) / TEMPLATE_NAME
    if template.differs:
        notices.append(
            "llama.cpp takes the chat template from the base's file: give the adapter's own "
            "(--jinja --chat-template-file), or export with --merged"
        )
    own = str(file) if template.differs and file.is_file() else None
    return GgufExport(str(output), family.name, dtype, count, size, tuple(notices), own)


def require_file(output: str | Path) -> None:
    """Raises InputError unless `output` is the name of a GGUF file that is not there yet."""
    if Path(output).suffix != ".gguf":
        raise InputError(f"-o {output}: a GGUF file's name ends in .gguf")
    atomic.require_free(output)


def _tensors(
    plain: PlainAdapter, family: Family, config: PreTrainedConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """llama.cpp's tensors: `lora_a` (r, d_in) and `lora_b` (d_out, r).

    The token embedding's `lora_a` is (tokens, r), as rows are taken out of it.
    """
    for path, pair in plain.pairs.items():
        name = tensor_name(family, config, f"{path}.weight")
        at_the_ends = name in ("token_embd.weight", "output.weight")
        if at_the_ends and config.tie_word_embeddings:
            raise InputError(
                f"the adapter changes {path}, and {plain.base_model} uses one weight as embedding "
                "and as head, which llama.cpp cannot adapt apart: export with --merged"
            )
        if name == "position_embd.weight":
            raise InputError(f"llama.cpp adapts no {path}: export with --merged")
        scale = plain.config.lora_alpha / pair.r
        yield f"{name}.lora_a", pair.A.T if pair.is_embedding else pair.A
        yield f"{name}.lora_b", interleaved(family, config, path, pair.folded(scale))
