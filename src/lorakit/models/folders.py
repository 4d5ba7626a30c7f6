"""What a model's folder holds: configuration, weights, tokenizer, whichever layout it is in.

transformers reads its own layout; ChatGLM's original one is read by `chatglm/`, and looks here as
if it were transformers'. Names are resolved before (`names.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import InputError
from lorakit.models.layouts.chatglm.config import is_original, native_config, read_original
from lorakit.models.remote_code import needed_code_refused, trusted
from lorakit.models.shards import read_shards
from lorakit.models.template_files import Templates, read_templates

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from lorakit.models.shards import StoredTensor


def config_in(folder: Path, **options: Any) -> PreTrainedConfig:
    """The configuration of the model in `folder`; `options` take the place of its own values.

    Raises:
        InputError: a file holds something else, it is ChatGLM's, and damaged, or it needs code of
            its own. What transformers raises is of many kinds.
    """
    from transformers import AutoConfig

    if is_original(folder):
        return native_config(read_original(folder), **options)
    return _loaded(AutoConfig, folder, options)


def model_in(folder: Path, form: str, **options: Any) -> Any:
    """What `form`, one of transformers' classes, loads from `folder` with `from_pretrained`.

    Raises:
        InputError: it is ChatGLM's, and damaged, or it needs code of its own. What transformers
            raises is of many kinds.
    """
    import transformers

    if is_original(folder):
        from lorakit.models.layouts.chatglm.load import load_original

        return load_original(folder, form, **options)
    return _loaded(getattr(transformers, form), folder, options)


def tokenizer_in(folder: Path, **options: Any) -> Any:
    """The tokenizer in `folder`.

    Raises:
        InputError: it is ChatGLM's, and damaged, or it needs code of its own. What transformers
            raises is of many kinds.
    """
    from transformers import AutoTokenizer

    if is_original(folder):
        from lorakit.models.layouts.chatglm.tokenizer import original_tokenizer

        return original_tokenizer(read_original(folder), **options)
    try:
        tokenizer = _loaded(AutoTokenizer, folder, options)
    except (TypeError, AttributeError) as error:  # JSON of another form than it asks for
        raise InputError(f"the tokenizer in {folder} is damaged: copy or save it again") from error
    if not tokenizer.chat_template and "chat_template" not in options:
        tokenizer.chat_template = read_templates(folder)  # it may be the processor's
    return tokenizer


def _loaded(kind: Any, folder: Path, options: dict[str, Any]) -> Any:
    with needed_code_refused(folder):
        return kind.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trusted(), **options
        )


def templates_in(path: Path) -> Templates | None:
    """The chat templates of the model in a folder or GGUF file, None where it has none.

    Raises:
        InputError: a file cannot be read.
    """
    if path.is_file():
        return _templates_of_gguf(path)
    if is_original(path):
        return tokenizer_in(path).chat_template
    return read_templates(path)


def templates_of(name: str) -> Templates | None:
    """The chat templates of the model `name` as it is on this machine; nothing is fetched.

    Raises:
        InputError: it is not here, or a file cannot be read.
    """
    from lorakit.models.names import resolve

    return templates_in(resolve(name, as_it_is=True).path)


def _templates_of_gguf(path: Path) -> str | None:
    from gguf import GGUFReader

    try:
        field = GGUFReader(path).get_field("tokenizer.chat_template")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    return None if field is None else str(field.contents())


def shards_in(folder: Path) -> dict[str, dict[str, StoredTensor]]:
    """Where every tensor of the model lies, by file and by the name that transformers gives it.

    Raises:
        InputError: a file is missing or damaged, or is no safetensors file.
    """
    if is_original(folder):
        from lorakit.models.layouts.chatglm.weights import native_shards

        return native_shards(read_original(folder))
    return read_shards(folder)
