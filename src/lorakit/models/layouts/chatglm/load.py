"""An original folder loaded as transformers' GLM, tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorakit.errors import InputError
from lorakit.models.layouts.chatglm.config import HUB_OPTIONS, native_config, read_original
from lorakit.models.layouts.chatglm.tokenizer import generation_settings
from lorakit.models.layouts.chatglm.weights import native_rows, usual_code


def load_original(path: Path, form: str = "AutoModelForCausalLM", **options: Any) -> Any:
    """The model in the original folder `path` as transformers' GLM.

    Args:
        form: the name of transformers' class for the task.
        options: those of `from_pretrained`; fields of the configuration are among them.

    Returns: the model; with `output_loading_info` it and what transformers says of the loading.

    Raises:
        InputError: the folder is damaged, or GLM has no such form.
    """
    import transformers

    original = read_original(path)
    fields = {*native_config(original).to_dict(), "id2label", "label2id", "num_labels"}
    fields -= {"dtype", "torch_dtype"}
    given = {name: options.pop(name) for name in list(options) if name in fields}
    config = options.pop("config", None) or native_config(original, **given)
    try:
        kind = getattr(transformers, form)._model_mapping[type(config)]
    except KeyError as error:
        raise InputError(f"model: {path} is a GLM, which transformers has no {form} of") from error
    for name in HUB_OPTIONS:
        options.pop(name, None)
    legacy = options.pop("torch_dtype", None)
    dtype = options.pop("dtype", legacy)
    with native_rows(original) as files:
        rows = {name: one for tensors in files.values() for name, one in tensors.items()}
        if dtype in (None, "auto"):
            dtype = next(r.tensor.dtype for r in rows.values() if r.tensor.code == usual_code(rows))
        if form != "AutoModelForCausalLM":
            del rows["lm_head.weight"]
        loaded = kind.from_pretrained(None, config=config, state_dict=rows, dtype=dtype, **options)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model.name_or_path = model.config.name_or_path = str(path)
    if form == "AutoModelForCausalLM":
        model.generation_config = generation_settings(original)
    return loaded
