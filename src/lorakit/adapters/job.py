"""What is merged into what: adapters, their weights, the base's folder, and what goes with it.

Both ways of merging, `streaming.py` and `in_memory.py`, start from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorakit.adapters.adapter_files import AdapterFiles, read_files
from lorakit.adapters.adapter_tokenizer import (
    TOKENIZER_FILES,
    copy_tokenizer,
    has_tokenizer,
    load_tokenizer,
    own_tokenizer,
)
from lorakit.adapters.chat_template import adapter_template, common_template
from lorakit.adapters.lineage import digest, frozen_below
from lorakit.adapters.open import chosen_quantization
from lorakit.adapters.verify import Survival
from lorakit.errors import InputError
from lorakit.lora import LoraModel
from lorakit.lora.checkpoint import INITIAL_NAME
from lorakit.lora.layers import Mergeable, ModulesToSaveWrapper, unwrapped
from lorakit.lora.layers.weight_updates import in_part
from lorakit.lora.vocabulary import embeddings, rows_in_file
from lorakit.lora.wrapping import wrapped_modules
from lorakit.models.forms import CLASSIFICATION
from lorakit.models.layouts import layout_of
from lorakit.models.load import DTYPES, torch_dtype
from lorakit.models.names import resolve
from lorakit.models.quantization.settings import Quantization
from lorakit.models.shards import StoredTensor
from lorakit.models.skeleton import read_base_config, stored_quantization
from lorakit.models.template_files import write_templates


@dataclass(frozen=True)
class MergeJob:
    """The adapters to be merged, and the base's place.

    `weights` multiply each adapter's update; `base` was asked for in place of the recorded one;
    `path` is its folder or GGUF file; `dtype` that of the result. `packed` says how the base's
    files are quantised (empty where they are not), `quantization` how it is loaded.
    """

    adapters: list[AdapterFiles]
    weights: list[float]
    base: str | None
    path: Path
    dtype: torch.dtype | None
    packed: str = ""
    quantization: Quantization | None = None

    @property
    def first(self) -> AdapterFiles:
        """The first adapter, which says the base and the form of the model."""
        return self.adapters[0]


@dataclass
class MergedFiles:
    """What was written: a model of the class `kind`, mostly in `dtype`, with `modules` changed."""

    kind: type
    dtype: torch.dtype
    modules: int
    survival: Survival
    notices: list[str]


def prepare(
    adapter: str | Path | Sequence[str | Path],
    base: str | None = None,
    dtype: str | None = None,
    weights: Sequence[float] | None = None,
    quantization: str | None = None,
) -> MergeJob:
    """Reads the adapters and finds the base. Arguments are those of `merge.merge`.

    Raises:
        InputError: they cannot be used, or not together.
    """
    folders = [adapter] if isinstance(adapter, (str, Path)) else list(adapter)
    if not folders:
        raise InputError("give an adapter's folder")
    if dtype is not None and dtype not in DTYPES[1:]:
        raise InputError(f"--dtype must be one of {', '.join(DTYPES[1:])}, not {dtype!r}")
    adapters = [read_files(folder, base) for folder in folders]
    numbers = [1.0] * len(adapters) if weights is None else list(weights)
    _check_weights(adapters, numbers)
    below = []
    for folder in list(folders):  # what each stands on is added whole, once
        for place in frozen_below(folder):
            if digest(place) not in map(digest, folders):
                folders.append(place)
                below.append(place)
                adapters.append(read_files(place, base or adapters[0].base_model))
                numbers.append(1.0)
    first = adapters[0]
    for other in adapters[1:]:
        if first.base_model != other.base_model:
            raise InputError(
                f"{first.folder} is for {first.base_model}, and {other.folder} for "
                f"{other.base_model}: if they are the same model, give it with --base"
            )
        if first.task_type != other.task_type and other.folder not in below:
            raise InputError(
                f"{first.folder} is for {first.task_type}, and {other.folder} for "
                f"{other.task_type}: one model cannot have both forms"
            )
    path = resolve(first.base_model).path
    chosen = None if dtype is None else torch_dtype(dtype, "cpu")
    loaded = chosen_quantization(folders, quantization)
    return MergeJob(adapters, numbers, base, path, chosen, _packed(path), loaded)


def _packed(path: Path) -> str:
    """How the files of the model at `path` are quantised; empty where they are not."""
    if packing := layout_of(path).packing:
        return packing
    values = stored_quantization(read_base_config(path))
    return str(values.get("quant_method", "in an unknown way")) if values else ""


def obstacle(job: MergeJob) -> str:
    """Why the base's files cannot be merged one by one; empty where they can."""
    if job.quantization:
        return (
            f"the base is quantised to {job.quantization}, as for training, and written "
            "dequantised; --quantization none uses the weights of its files"
        )
    if job.packed:
        return f"the base is quantised ({job.packed}); it is written unquantised"
    for adapter in job.adapters:
        config = adapter.config
        if config.layer_replication:
            return "layer_replication builds another model than the one in the files"
        if config.init.kind.changes_base:
            return f"{config.init_lora_weights} quantises the base's weights again"
        if config.init.kind.subtracted and not (adapter.folder / INITIAL_NAME).is_file():
            return f"{config.init_lora_weights} takes its start out of the loaded weights"
    return ""


def exact_dtype(job: MergeJob, stored: Mapping[str, StoredTensor]) -> torch.dtype:
    """In which sums are made: float32, or float64 where the base or an adapter has it.

    Raises:
        InputError: the base's weights are packed, and no configuration says how.
    """
    for name, tensor in stored.items():
        plain = tensor.code in ("F64", "F32", "BF16", "F16")
        if not (plain or job.packed) and len(tensor.shape) > 1 and name.endswith("weight"):
            raise InputError(
                f"model: {tensor.path}: {name} is stored as {tensor.code}, and the configuration "
                "names no quantisation that would say what it means"
            )
    wide = any(t.dtype == torch.float64 for a in job.adapters for t in a.tensors.values())
    wide = wide or any(tensor.code == "F64" for tensor in stored.values())
    return torch.float64 if wide else torch.float32


def copy_others(job: MergeJob, folder: Path, rows: int) -> Any:
    """Copies the base's tokenizer, generation settings and chat templates.

    The adapter's tokenizer takes the place of the base's where it has more tokens, and the
    templates that it was trained with that of all of the base's.

    Args:
        rows: for how many tokens the merged model has embeddings.

    Returns: the tokenizer with a padding token, where the form of the model needs one; else None.
    """
    own, layout = None, layout_of(job.path)
    if has_tokenizer(job.first.folder):
        own = own_tokenizer(job.first.folder, load_tokenizer(job.path), rows)
    layout.write_companions(folder, without=TOKENIZER_FILES if own is not None else ())
    if own is not None:
        copy_tokenizer(job.first.folder, folder)
    trained_with = adapter_template(job.first.folder).own
    templates = layout.templates() if trained_with is None else trained_with
    if templates is not None and not (trained_with is None and own is None):
        write_templates(folder, templates)
    if job.first.task_type == "CAUSAL_LM":
        return None
    tokenizer = own or load_tokenizer(job.path)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = templates
    tokenizer.save_pretrained(folder)
    return tokenizer


def template_notices(job: MergeJob) -> list[str]:
    """The notices on the chat templates of adapters and base."""
    if job.first.task_type != "CAUSAL_LM":
        return []
    notices: list[str] = []
    common_template([adapter.folder for adapter in job.adapters], notices)
    trained = adapter_template(job.first.folder)
    notices.append(trained.notice(job.first.base_model, layout_of(job.path).templates()))
    return [notice for notice in notices if notice]


def _check_weights(adapters: Sequence[AdapterFiles], weights: Sequence[float]) -> None:
    """Raises InputError unless each adapter has a weight that it can be multiplied by."""
    if len(weights) != len(adapters):
        raise InputError(f"--weights: {len(weights)} numbers for {len(adapters)} adapters")
    for adapter, weight in zip(adapters, weights, strict=True):
        if not -1e6 < weight < 1e6:
            raise InputError(f"--weights: {weight} is not a number between -1e6 and 1e6")
        if weight != 1 and adapter.task_type in CLASSIFICATION:
            raise InputError(
                f"--weights: {adapter.folder} brings a classifier's head, which the base has "
                f"not, so it cannot be scaled: give it the weight 1, not {weight:g}"
            )


def add_others(
    model: LoraModel,
    adapters: Sequence[AdapterFiles],
    weights: Sequence[float],
    added_tokens: int = 0,
) -> dict[str, float]:
    """Loads all but the first of `adapters`, which is there, and makes all of them active.

    What each changes is multiplied by its weight: of `W` that was trained whole, to `V`,
    `W + weight (V - W)` is left. Where the model has no values that is `plan.py`'s to do.

    Args:
        added_tokens: how many tokens the model got for the first adapter.

    Returns: their weights by their names in the model.

    Raises:
        InputError: one does not fit the base, or cannot stand beside the others.
    """
    if added_tokens and weights[0] != 1:
        raise InputError(
            f"--weights: {adapters[0].folder} brings {added_tokens} tokens that the base does not "
            f"have, so they cannot be scaled: give it the weight 1, not {weights[0]:g}"
        )
    base = model.get_base_model()
    for adapter in adapters[1:]:
        for path, module in embeddings(base).items():
            rows, own = rows_in_file(adapter.tensors, path), len(unwrapped(module).weight)
            if rows not in (None, own):
                raise InputError(
                    f"{adapter.folder} is for a model with {rows} tokens, and {adapters[0].folder} "
                    f"for {own}: if it only adds some to these, give it as the first adapter"
                )
    names = ["default", *(f"adapter_{i}" for i in range(1, len(adapters)))]
    for name, adapter in list(zip(names, adapters, strict=True))[1:]:
        model.load_adapter(adapter.folder, name)
    model.set_adapter(names, inference_mode=True)
    by_name = dict(zip(names, weights, strict=True))
    for _, module in wrapped_modules(model.get_base_model()):
        if isinstance(module, Mergeable):
            for name in module.adapters:
                module.set_share(name, by_name[name])
    done: set[int] = set()
    for W, V, weight in _trained_whole(model, by_name):
        if id(V) not in done and not W.is_meta:  # once, also where an embedding is the head
            V.data = in_part(W, V.detach(), weight)
            done.add(id(V))
    return by_name


def _trained_whole(
    model: LoraModel, weights: Mapping[str, float]
) -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
    """The base's tensors that adapters have trained whole, the trained ones, and the weights."""
    for _, module in wrapped_modules(model.get_base_model()):
        if isinstance(module, ModulesToSaveWrapper):
            before = module.original_module.state_dict(keep_vars=True)
            for name in module.adapters:
                for ending, trained in module.adapter_tensors(name).items():
                    yield before[ending], trained, weights[name]
    if model.biases:  # those of one adapter, which is alone
        (weight,) = weights.values()
        yield from ((*pair, weight) for pair in model.biases.pairs())
