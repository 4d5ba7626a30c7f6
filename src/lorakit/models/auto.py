"""transformers' `AutoModelForCausalLM` and `AutoTokenizer`, which read ChatGLM's folders too.

For scripts: `from lorakit import AutoModelForCausalLM, AutoTokenizer`. Everything but a folder in
ChatGLM's original layout goes to transformers unchanged.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from lorakit.models.folders import model_in, tokenizer_in
from lorakit.models.layouts.chatglm.config import original_folder


class AutoModelForCausalLM(transformers.AutoModelForCausalLM):
    """transformers' class; a folder in ChatGLM's original layout becomes its GLM."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own.

        Raises:
            InputError: a ChatGLM's folder is damaged.
        """
        if (folder := _original(pretrained_model_name_or_path)) is not None:
            return model_in(folder, "AutoModelForCausalLM", **kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)


class AutoTokenizer(transformers.AutoTokenizer):
    """transformers' class; a folder in ChatGLM's original layout gives a fast tokenizer."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own.

        Raises:
            InputError: a ChatGLM's folder is damaged.
        """
        if (folder := _original(pretrained_model_name_or_path)) is not None:
            return tokenizer_in(folder, **kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)


def _original(name: Any) -> Path | None:
    """The folder that `name` means, where it is in ChatGLM's layout: a path, or a cached hub id."""
    if not isinstance(name, str | Path):
        return None
    return original_folder(name)
