"""What a model's folder holds: configuration, weights, tokenizer, whichever layout it is in.

transformers reads its own layout; ChatGLM's original one is read by `chatglm/`, and looks here as
if it were transformers'. Names are resolved before (`names.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.models.chatglm.config import is_original, native_config, read_original
from lorakit.models.shards import read_shards

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from lorakit.models.shards import StoredTensor


def config_in(folder: Path, **options: Any) -> PreTrainedConfig:
    """The configuration of the model in `folder`; `options` take the place of its own values.

    Raises:
        InputError: it is ChatGLM's, and damaged. What transformers raises is of many kinds.
    """
    from transformers import AutoConfig

    if is_original(folder):
        return native_config(read_original(folder), **options)
    return AutoConfig.from_pretrained(folder, local_files_only=True, **options)


def model_in(folder: Path, form: str, **options: Any) -> Any:
    """What `form`, one of transformers' classes, loads from `folder` with `from_pretrained`.

    Raises:
        InputError: it is ChatGLM's, and damaged. What transformers raises is of many kinds.
    """
    import transformers

    if is_original(folder):
        from lorakit.models.chatglm.load import load_original

        return load_original(folder, form, **options)
    return getattr(transformers, form).from_pretrained(folder, local_files_only=True, **options)


def tokenizer_in(folder: Path, **options: Any) -> Any:
    """The tokenizer in `folder`.

    Raises:
        InputError: it is ChatGLM's, and damaged. What transformers raises is of many kinds.
    """
    from transformers import AutoTokenizer

    if is_original(folder):
        from lorakit.models.chatglm.tokenizer import original_tokenizer

        return original_tokenizer(read_original(folder), **options)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, **options)


def shards_in(folder: Path) -> dict[str, dict[str, StoredTensor]]:
    """Where every tensor of the model lies, by file and by the name that transformers gives it.

    Raises:
        InputError: a file is missing or damaged, or is no safetensors file.
    """
    if is_original(folder):
        from lorakit.models.chatglm.weights import native_shards

        return native_shards(read_original(folder))
    return read_shards(folder)
