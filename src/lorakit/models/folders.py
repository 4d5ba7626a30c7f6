"""What a model's folder holds: configuration, weights, tokenizer, whichever layout it is in.

transformers reads its own layout; ChatGLM's original one is read by `chatglm/`, and looks here as
if it were transformers'. Names are resolved before (`names.py`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import InputError
from lorakit.models.chatglm.config import is_original, native_config, read_original
from lorakit.models.remote_code import needed_code_refused, trusted
from lorakit.models.shards import read_shards

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
        from lorakit.models.chatglm.load import load_original

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
        from lorakit.models.chatglm.tokenizer import original_tokenizer

        return original_tokenizer(read_original(folder), **options)
    try:
        return _loaded(AutoTokenizer, folder, options)
    except (TypeError, AttributeError) as error:  # JSON of another form than it asks for
        raise InputError(f"the tokenizer in {folder} is damaged: copy or save it again") from error


def _loaded(kind: Any, folder: Path, options: dict[str, Any]) -> Any:
    with needed_code_refused(folder):
        return kind.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trusted(), **options
        )


def template_in(folder: Path) -> str | None:
    """The model's own chat template, None where it has none.

    Raises:
        InputError: a file cannot be read.
    """
    if is_original(folder):
        return tokenizer_in(folder).chat_template
    if (path := folder / "chat_template.jinja").is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read: {error}") from error
    for name in ("tokenizer_config.json", "chat_template.json"):
        if (path := folder / name).is_file():
            template = _json_object(path).get("chat_template")
            if isinstance(template, list):  # several by their names
                named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
                template = named.get("default")
            if isinstance(template, str):
                return template
    return None


def _json_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: it is not readable JSON") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} is damaged: it is no JSON object")
    return values


def shards_in(folder: Path) -> dict[str, dict[str, StoredTensor]]:
    """Where every tensor of the model lies, by file and by the name that transformers gives it.

    Raises:
        InputError: a file is missing or damaged, or is no safetensors file.
    """
    if is_original(folder):
        from lorakit.models.chatglm.weights import native_shards

        return native_shards(read_original(folder))
    return read_shards(folder)
