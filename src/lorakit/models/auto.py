"""transformers' `AutoModelForCausalLM` and `AutoTokenizer`, which read foreign layouts too.

For scripts: `from lorakit import AutoModelForCausalLM, AutoTokenizer`. What is in transformers' own
layout goes to transformers unchanged.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from lorakit.models.layouts import foreign_layout


class AutoModelForCausalLM(transformers.AutoModelForCausalLM):
    """transformers' class; a folder in a foreign layout becomes the model that it holds."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own. Raises InputError for a damaged folder in a foreign layout."""
        name = pretrained_model_name_or_path
        if isinstance(name, str | Path) and (foreign := foreign_layout(name)):
            return foreign.model("AutoModelForCausalLM", **kwargs)
        return super().from_pretrained(name, *args, **kwargs)


class AutoTokenizer(transformers.AutoTokenizer):
    """transformers' class; a folder in a foreign layout gives its fast tokenizer."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own. Raises InputError for a damaged folder in a foreign layout."""
        name = pretrained_model_name_or_path
        if isinstance(name, str | Path) and (foreign := foreign_layout(name)):
            return foreign.tokenizer(**kwargs)
        return super().from_pretrained(name, *args, **kwargs)
