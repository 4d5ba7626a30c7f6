"""From a classifier's logits to what is answered: probabilities, or a score as the model has it.

The rule is vLLM's (`get_classification_act_fn` and `get_cross_encoder_act_fn` of its pooler) and
sentence-transformers' (`CrossEncoder`): one output is a sigmoid, several are a softmax;
transformers' `problem_type` makes several labels that may be true together a sigmoid each, and a
regression the number itself; a cross-encoder's configuration may name another function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lorakit.errors import InputError, listed

Activation = Callable[[Sequence[float]], list[float]]


def softmax(logits: Sequence[float]) -> list[float]:
    """exp(z_i) / Σ exp(z_j)."""
    largest = max(logits)
    weights = [math.exp(value - largest) for value in logits]
    total = sum(weights)
    return [weight / total for weight in weights]


def sigmoid(logits: Sequence[float]) -> list[float]:
    """1 / (1 + exp(-z)) of each, in float64, so that large logits keep their order."""
    return [1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z)) for z in logits]


def identity(logits: Sequence[float]) -> list[float]:
    """The logits themselves."""
    return [*logits]


def tanh(logits: Sequence[float]) -> list[float]:
    """tanh(z) of each."""
    return [math.tanh(value) for value in logits]


_BY_PROBLEM: Mapping[str, Activation] = {
    "regression": identity,
    "single_label_classification": softmax,
    "multi_label_classification": sigmoid,
}
_BY_NAME: Mapping[str, Activation] = {"Identity": identity, "Sigmoid": sigmoid, "Tanh": tanh}


def activation_of(config: Any, outputs: int) -> Activation:
    """What becomes of the logits of a classifier with this configuration.

    Args:
        config: transformers' of a trained classifier; None where nothing is known but the outputs.

    Raises:
        InputError: it asks for a function that is not computed here.
    """
    if outputs == 1 and (named := _named(config)):
        name = named.rpartition(".")[2]
        if name not in _BY_NAME:
            raise InputError(
                f"model: its config.json asks for the activation {named}; there are "
                f"{listed([*_BY_NAME])}"
            )
        return _BY_NAME[name]
    problem = getattr(config, "problem_type", None)
    if outputs == 1:  # a softmax of one number is always 1
        return identity if problem == "regression" else sigmoid
    return _BY_PROBLEM.get(str(problem), softmax)


def _named(config: Any) -> str:
    """The function that sentence-transformers has written into a cross-encoder's configuration."""
    own = getattr(config, "sentence_transformers", None)
    named = own.get("activation_fn") if isinstance(own, Mapping) else None
    named = named or getattr(config, "sbert_ce_default_activation_function", None)
    return named if isinstance(named, str) else ""
