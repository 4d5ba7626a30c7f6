"""GGUF files for llama.cpp: an adapter for a base of its own (`--lora`), or base + adapter.

llama.cpp multiplies `B A` by `adapter.lora.alpha / r` with the file's one alpha and each pair's
own r (`llama_adapter_lora_weight::get_scale`), so what differs from that goes into `B`. A model is
merged and checked by `lorakit.adapters.merge`, and written tensor by tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch
from safetensors import safe_open

from lorakit import atomic
from lorakit.adapters.chat_template import exported_template
from lorakit.adapters.derived import origin
from lorakit.adapters.export.export_formats import Exported
from lorakit.adapters.export.gguf_family import (
    add_hyperparameters,
    differences,
    extra_tensors,
    family_of,
    interleaved,
    laid_out,
    language_name,
    language_part,
    tensor_name,
)
from lorakit.adapters.export.gguf_layout import GgufFamily
from lorakit.adapters.export.gguf_mixtures import MIXTURES, Forms, Mixture, byte_shape
from lorakit.adapters.export.gguf_tokenizer import add_templates, add_tokenizer
from lorakit.adapters.export.k_quants import quantized
from lorakit.adapters.export.plain import PlainAdapter, fitted_plain, read_plain
from lorakit.adapters.merge import merge
from lorakit.commands import quoted
from lorakit.errors import InputError, did_you_mean
from lorakit.folder_lock import reserves
from lorakit.folder_name import folder_name
from lorakit.lora.checkpoint import read_config
from lorakit.models.layouts import layout_of
from lorakit.models.names import resolve
from lorakit.models.shards import read_shards
from lorakit.models.skeleton import read_base_config
from lorakit.models.template_files import TEMPLATE_NAME
from lorakit.progress import track

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class GgufFile:
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


def export_gguf(
    adapter: str | Path,
    output: str | Path,
    *,
    base: str | None = None,
    merged: bool = False,
    dtype: str | None = None,
) -> Exported:
    """Writes the adapter, or with `merged` base + adapter, to the file `output`."""
    if merged:
        file = export_gguf_model(adapter, output, base=base, dtype=dtype or "float16")
    else:
        file = export_gguf_adapter(adapter, output, base=base, dtype=dtype or "float32")
    written = quoted(file.output)
    command = f"llama-cli -m {written}" if merged else f"llama-cli -m BASE.gguf --lora {written}"
    if file.template:
        command += f" --jinja --chat-template-file {quoted(file.template)}"
    summary = (
        f"GGUF {'model' if merged else 'adapter'}: {file.output} ({file.architecture}, "
        f"{file.tensors} tensors, {file.dtype}, {file.bytes / 1e6:.1f} MB)"
    )
    return Exported(file.output, summary, command, file.notices)


@reserves("output")
def export_gguf_adapter(
    adapter: str | Path, output: str | Path, *, base: str | None = None, dtype: str = "float32"
) -> GgufFile:
    """Writes the adapter in the folder `adapter` to the file `output`, for llama.cpp.

    Args:
        dtype: of the written factors: float32, float16 or bfloat16.

    Raises:
        InputError: the adapter, its base's architecture or `output` cannot be used.
    """
    require_file(output)
    mixture = MIXTURES.get(dtype)
    if mixture is None or mixture.rounds:
        raise InputError(
            f"--dtype of an adapter must be float32, float16 or bfloat16, not {dtype!r}"
        )
    plain = read_plain(adapter, "llama.cpp", base)
    config = language_part(read_base_config(resolve(plain.base_model).path))
    family = family_of(config, plain.base_model)
    plain = fitted_plain(adapter, plain)
    hint = (
        "llama.cpp takes the chat template from the base's file: give the adapter's own "
        "(--jinja --chat-template-file), or export with --merged"
    )
    template = exported_template(adapter, plain.base_model, hint)
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
        for name, tensor in _factors(plain, family, config):
            values = quantized(tensor, mixture.usual)
            writer.add_tensor(name, values, raw_dtype=mixture.usual)
            count += 1
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    size = Path(output).stat().st_size
    notices = (*plain.notices, *template.notices)
    file = Path(adapter) / TEMPLATE_NAME
    own = str(file) if template.differs and file.is_file() else None
    return GgufFile(str(output), family.name, dtype, count, size, notices, own)


def require_file(output: str | Path) -> None:
    """Raises InputError unless `output` is the name of a GGUF file that is not there yet."""
    if Path(output).suffix != ".gguf":
        raise InputError(f"-o {output}: a GGUF file's name ends in .gguf")
    atomic.require_free(output)


def _factors(
    plain: PlainAdapter, family: GgufFamily, config: PreTrainedConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """llama.cpp's tensors: `lora_a` (r, d_in) and `lora_b` (d_out, r).

    The token embedding's `lora_a` is (tokens, r), as rows are taken out of it.
    """
    for path, pair in plain.pairs.items():
        own = language_name(f"{path}.weight")
        if not own or path.endswith(family.not_adapted or "/"):
            raise InputError(f"llama.cpp adapts no {path}: export with --merged")
        B = pair.folded(plain.config.lora_alpha / pair.r)
        for part, rows in family.parts(own, B, config):
            name = tensor_name(family, config, part)
            at_the_ends = name in ("token_embd.weight", "output.weight")
            if at_the_ends and config.tie_word_embeddings:
                raise InputError(
                    f"the adapter changes {path}, and {plain.base_model} uses one weight as "
                    "embedding and as head, which llama.cpp cannot adapt apart: export with "
                    "--merged"
                )
            if name == "position_embd.weight":
                raise InputError(f"llama.cpp adapts no {path}: export with --merged")
            A = pair.A.T if pair.is_embedding else family.ordered(part, pair.A, config)
            yield f"{name}.lora_a", A
            yield f"{name}.lora_b", interleaved(family, config, part.rpartition(".")[0], rows)


@reserves("output")
def export_gguf_model(
    adapter: str | Path, output: str | Path, *, base: str | None = None, dtype: str = "float16"
) -> GgufFile:
    """Merges the adapter into its base and writes the model to the file `output`.

    The merge is made in float32 and checked, and rounded once when it is written. Beside `output`
    it needs the float32 model's size on the disk for a while.

    Args:
        dtype: of the written weights, one of `MIXTURES`. Vectors, and rows that a form cannot
            hold (not of a multiple of 32 or 256 values), are written wider.

    Raises:
        InputError: the adapter, the base's architecture or tokenizer, or `output` cannot be used.
        LorakitError: the merged model differs from base + adapter.
    """
    require_file(output)
    mixture_of(dtype)
    name = base or origin(adapter, read_config(adapter)).base_model
    if name:  # refuse what cannot be written before anything is merged
        family_of(language_part(read_base_config(resolve(name).path)), name)
    with (
        atomic.replacing_file(output) as path,
        TemporaryDirectory(prefix=f".{Path(output).name}.", dir=path.parent) as folder,
    ):
        merged = merge(adapter, Path(folder) / "merged", base=base, dtype="float32")
        report = write_gguf(Path(folder) / "merged", path, dtype, name or str(adapter))
    notices = (*merged.notices, *report.notices)
    return replace(report, output=str(output), notices=notices)


def write_gguf(folder: Path, output: str | Path, dtype: str, name: str) -> GgufFile:
    """Writes the plain model in `folder` (safetensors) to the GGUF file `output`.

    Args:
        dtype: one of `MIXTURES`.
        name: what the model is called, in messages too.

    Raises:
        InputError: its architecture or tokenizer has no known form in llama.cpp.
    """
    whole = read_base_config(folder)
    config = language_part(whole)
    family = family_of(config, name)
    tokenizer = layout_of(folder).tokenizer()
    names = [language_name(one) for tensors in read_shards(folder).values() for one in tensors]
    forms = Forms(mixture_of(dtype), config.num_hidden_layers, tied=not any(map(_is_head, names)))
    with atomic.replacing_file(output) as path:
        writer = gguf.GGUFWriter(path, family.name)
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(Path(name).name)
        add_hyperparameters(writer, family, config)
        writer.add_file_type(forms.mixture.file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_tokenizer(writer, tokenizer, family, config.vocab_size, name)
        written = {}
        for own, tensor in _tensors(folder, family, config):
            form = written[own] = forms.of(own, tuple(tensor.shape))
            shape, size = byte_shape(tuple(tensor.shape), form)
            writer.add_tensor_info(own, shape, np.dtype(np.uint8), size, form)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        tensors = track(_tensors(folder, family, config), "writing tensors", len(written))
        for own, tensor in tensors:
            writer.write_tensor_data(quantized(tensor, written[own]))
        writer.close()
    size = Path(output).stat().st_size
    notices = [*differences(family, config, name), *forms.notices()]
    if further := sum(_predicts_further(one, config) for one in names):
        notices.append(f"{further} tensors of multi-token prediction are left out")
    if config is not whole:
        notices.append(
            "the file has the language part alone: for pictures llama.cpp takes a second file, "
            "which its convert_hf_to_gguf.py --mmproj makes of the base"
        )
    return GgufFile(str(output), family.name, dtype, len(written), size, tuple(notices))


def mixture_of(dtype: str) -> Mixture:
    """The mixture that `--dtype` names, in small letters or capitals; InputError for none."""
    found = MIXTURES.get(dtype.lower())
    if found is None:
        near = did_you_mean(dtype, MIXTURES)
        raise InputError(f"--dtype must be one of {', '.join(MIXTURES)}, not {dtype!r}{near}")
    return found


def _is_head(name: str) -> bool:
    return name in ("lm_head.weight", "embed_out.weight")


def _predicts_further(name: str, config: PreTrainedConfig) -> bool:
    """Whether it is of multi-token prediction, which transformers does not load either."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    behind = layer is not None and int(layer[1]) >= config.num_hidden_layers
    return behind or name.startswith(("mtp.", "model.mtp_"))


def _tensors(
    folder: Path, family: GgufFamily, config: PreTrainedConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """llama.cpp's tensors, one at a time, in an order that is always the same."""
    with ExitStack() as opened:
        where: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            file = opened.enter_context(safe_open(path, framework="pt"))
            where |= dict.fromkeys(file.keys(), file)
        for stored, several in _stacked(where).items():
            name = language_name(stored)
            if name.endswith((".attn.bias", ".attn.masked_bias")):
                continue  # GPT-2's causal mask, in old files
            if not name or _predicts_further(name, config):
                continue
            tensors = [where[one].get_tensor(one) for one in several]
            tensor = tensors[0] if len(several) == 1 else torch.stack(tensors)
            for part, values in family.parts(name, tensor, config):
                yield tensor_name(family, config, part), laid_out(family, config, part, values)
    yield from extra_tensors(config).items()


def _stacked(names: Iterable[str]) -> dict[str, list[str]]:
    """`names` in order; those of a layer's experts are under one name, which llama.cpp stacks."""
    found: dict[str, list[str]] = {}
    for name in sorted(
        names, key=lambda one: [int(p) if p.isdigit() else -1 for p in one.split(".")]
    ):
        found.setdefault(re.sub(r"\.experts\.\d+\.", ".experts.", name), []).append(name)
    return dict(sorted(found.items()))
