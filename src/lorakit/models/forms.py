"""In which form a base model is loaded: PEFT's task types and transformers' classes for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

FORMS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""transformers' class for each of PEFT's task types; FEATURE_EXTRACTION is served, not trained."""

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


def is_bare(config: Any) -> bool:
    """Whether a model's files were written by its body alone, without a head."""
    from transformers import AutoModel

    try:
        body: Any = AutoModel._model_mapping[type(config)]
    except KeyError:
        return False
    bodies = body if isinstance(body, tuple) else (body,)
    return any(name in (config.architectures or ()) for name in (b.__name__ for b in bodies))


def label_options(labels: Sequence[str]) -> dict[str, Any]:
    """The fields of a model's configuration that name a classifier's classes."""
    if not labels:
        return {}
    return {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
    }
