"""Base models: from a name to a loaded model and tokenizer, and how they are run."""

from lorakit.models.load import load_model

__all__ = ["load_model"]
