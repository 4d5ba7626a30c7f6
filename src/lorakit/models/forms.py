"""In which form a base model is loaded: PEFT's task types and transformers' classes for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

FORMS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}
"""transformers' class for each of PEFT's task types that lorakit trains."""

CLASSIFICATION = ("SEQ_CLS", "TOKEN_CLS")


def causal_form(config: Any) -> str:
    """The class that loads a model which writes text: with its part for pictures, if it has one."""
    from transformers import AutoModelForImageTextToText

    if type(config) in AutoModelForImageTextToText._model_mapping:
        return "AutoModelForImageTextToText"
    return FORMS["CAUSAL_LM"]


def is_encoder(config: Any) -> bool:
    """Whether a model reads text in both directions and writes none, as BERT does."""
    from transformers import AutoModelForMaskedLM

    masked = type(config) in AutoModelForMaskedLM._model_mapping
    return masked and not (config.is_encoder_decoder or getattr(config, "is_decoder", False))


def label_options(labels: Sequence[str]) -> dict[str, Any]:
    """The fields of a model's configuration that name a classifier's classes."""
    if not labels:
        return {}
    return {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
    }
