"""A base model without its weights: modules and shapes only, and what its files call them.

Enough to know what an adapter changes, at no cost in memory. Loading weights is `load.py`'s work,
the files themselves are `shards.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import InputError
from lorakit.models.load import FORMS, label_options

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


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


def skeleton(
    task_type: str, folder: Path, dtype: torch.dtype, labels: Sequence[str] = ()
) -> PreTrainedModel:
    """The model in `folder` in its form for `task_type`, on the meta device.

    Args:
        labels: as in `load_for_task`.

    Raises:
        InputError: transformers has no such model.
    """
    import torch
    import transformers
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, **label_options(labels))
        with torch.device("meta"):
            model = getattr(transformers, FORMS[task_type]).from_config(config, dtype=dtype)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else repr(error)
        raise InputError(f"model: {folder} cannot be loaded: {reason}") from error
    return model.eval()


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
