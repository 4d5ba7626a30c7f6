"""transformers' `AutoModelForCausalLM` and `AutoTokenizer`, which read ChatGLM's folders too.

For scripts: `from lorakit import AutoModelForCausalLM, AutoTokenizer`. Everything but a folder in
ChatGLM's original layout goes to transformers unchanged.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from lorakit.models.layouts import foreign_layout
from lorakit.models.layouts.layout import ForeignLayout


class AutoModelForCausalLM(transformers.AutoModelForCausalLM):
    """transformers' class; a folder in ChatGLM's original layout becomes its GLM."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own.

        Raises:
            InputError: a ChatGLM's folder is damaged.
        """
        if foreign := _foreign(pretrained_model_name_or_path):
            return foreign.model("AutoModelForCausalLM", **kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)


class AutoTokenizer(transformers.AutoTokenizer):
    """transformers' class; a folder in ChatGLM's original layout gives a fast tokenizer."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own.

        Raises:
            InputError: a ChatGLM's folder is damaged.
        """
        if foreign := _foreign(pretrained_model_name_or_path):
            return foreign.tokenizer(**kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)


def _foreign(name: Any) -> ForeignLayout | None:
    return foreign_layout(name) if isinstance(name, str | Path) else None
