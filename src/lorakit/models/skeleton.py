"""A base model without its weights: modules and shapes only, and what its files call them.

Enough to know what an adapter changes, at no cost in memory. Loading weights is `load.py`'s work,
the files themselves are `shards.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import InputError
from lorakit.models.forms import FORMS, causal_form, label_options
from lorakit.models.layouts import layout_of
from lorakit.models.remote_code import needed_code_refused, trusted
from lorakit.models.shards import all_tensors

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class FileNames:
    """What a model's parameters are called in its files.

    `stored` gives, by the model's name, the name in the file where the tensor is the very same.
    `converted` are names in the files of tensors that are cut, stacked or turned when they are
    loaded; `unused` those that the model has no place for.
    """

    stored: dict[str, str]
    converted: frozenset[str]
    unused: frozenset[str]


def read_base_config(path: Path, **options: Any) -> PreTrainedConfig:
    """The configuration of the model at `path`, with `options` in place of its own values."""
    try:
        return layout_of(path).config(**options)
    except InputError:
        raise
    except Exception as error:  # transformers has a kind of its own for every check
        raise InputError(
            f"model: the configuration of {path} cannot be read: {_reason(error)}"
        ) from error


def stored_quantization(config: PreTrainedConfig) -> dict[str, Any]:
    """The settings by which the files' weights are quantised; empty where they are not."""
    text = config.get_text_config()  # where a model for pictures may have them
    settings = getattr(config, "quantization_config", None)
    settings = settings or getattr(text, "quantization_config", None) or {}
    return settings if isinstance(settings, dict) else settings.to_dict()


def skeleton(
    path: Path,
    task_type: str = "CAUSAL_LM",
    dtype: torch.dtype | None = None,
    labels: Sequence[str] = (),
) -> PreTrainedModel:
    """The model at `path`, a folder or GGUF file, in its form for `task_type`, on the meta device.

    `dtype` is None for the configuration's; `labels` are as in `load_for_task`.
    """
    config = read_base_config(path, **label_options(labels))
    form = causal_form(config) if task_type == "CAUSAL_LM" else FORMS[task_type]
    return _on_meta(config, form, path, dtype)


def blank_model(config: PreTrainedConfig, path: Path) -> PreTrainedModel:
    """The model at `path` on the meta device, in the form that its `config` names."""
    import transformers

    named = (getattr(config, "architectures", None) or [""])[0]
    known = isinstance(named, str) and hasattr(getattr(transformers, named, None), "_from_config")
    causal = type(config) in transformers.AutoModelForCausalLM._model_mapping
    return _on_meta(config, named if known else FORMS["CAUSAL_LM"] if causal else "AutoModel", path)


def _on_meta(
    config: PreTrainedConfig, form: str, path: Path, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    import torch
    import transformers

    kind = getattr(transformers, form)
    if form.startswith("Auto"):
        build = partial(kind.from_config, trust_remote_code=trusted())
    else:
        build = kind._from_config
    try:
        with torch.device("meta"), needed_code_refused(path):
            model = build(config, dtype=dtype)
    except InputError:
        raise
    except Exception as error:  # a value in the configuration can fail anywhere
        raise InputError(f"model: {path} has no form as {form}: {_reason(error)}") from error
    return model.eval()


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    return text if " " in text else f"{type(error).__name__} {text}".rstrip()


def file_names(model: PreTrainedModel, names: Iterable[str]) -> FileNames:
    """What each of `names`, those of the tensors in the files, is in `model`.

    It is transformers' own answer: renamed parts, and the body's prefix that a file may lack.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    own: dict[str, Any] = model.state_dict()
    prefix = model.base_model_prefix
    stored: dict[str, str] = {}
    converted, unused = set(), set()
    for name in names:
        found, pattern = rename_source_key(name, renamings, converters, prefix, own)
        if found not in own and name in own:
            found, pattern = rename_source_key(name, [], [], prefix, own)
        if pattern is not None:
            converted.add(name)
        elif found in own:
            stored[found] = name
        else:
            unused.add(name)
    return FileNames(stored, frozenset(converted), frozenset(unused))


def kept_whole(path: Path, task_type: str, labels: Sequence[str]) -> list[str]:
    """Modules of the model at `path` that must not be quantised in its form for `task_type`.

    A classifier's head is new, and so is what the model's files lack: they are trained whole.
    """
    from transformers.quantizers.base import get_keys_to_not_convert

    model = skeleton(path, task_type, labels=labels)
    names = file_names(model, all_tensors(layout_of(path).shards()))
    heads = () if model.base_model is model else model.named_children()  # a bare body has none
    kept = {name for name, child in heads if child is not model.base_model}
    if not names.converted:
        own = (name for name, _ in model.named_parameters())
        kept |= {name.rpartition(".")[0] for name in own if name not in names.stored}
    return sorted({*kept, *get_keys_to_not_convert(model)})
