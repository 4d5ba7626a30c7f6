"""What a resident model gives for a prompt, alone or with an adapter: text, or numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lorakit.models.loaded import writes_text
from lorakit.models.score_activations import Activation, activation_of, identity

if TYPE_CHECKING:
    from torch import nn

    from lorakit.models.classifier_form import ClassifierForm, SequenceHead

Kind = Literal["text", "embedding", "scores", "labels"]


@dataclass(frozen=True)
class Outputs:
    """What a model, or an adapter of it, gives.

    Attributes:
        kind: `text`, an `embedding`, one number (`scores`) or a number for each of its `labels`.
        labels: the names of what numbers are given for; empty for a reward model's one.
        pairs: two texts are read as one pair of the tokenizer's, as a cross-encoder does; else a
            score is that of a conversation.
        activation: what becomes of the logits where a request does not say.
    """

    kind: Kind
    labels: tuple[str, ...] = ()
    pairs: bool = False
    activation: Activation = identity


TEXT = Outputs("text")
EMBEDDING = Outputs("embedding")


def of_head(labels: tuple[str, ...], activation: Activation, pairs: bool) -> Outputs:
    """The outputs of a classifier's head, which gives a score if it has one output."""
    return Outputs("scores" if len(labels) == 1 else "labels", labels, pairs, activation)


def of_base(model: nn.Module, form: ClassifierForm | None) -> tuple[Outputs, SequenceHead | None]:
    """What a model gives without an adapter, and its head if its files are a classifier's.

    Raises:
        InputError: these lack a part, or ask for an activation that is not computed here.
    """
    if form is None or not form.is_classifier:
        return TEXT if writes_text(model) else EMBEDDING, None
    head = form.own_head(model)
    return of_head(head.labels, activation_of(form.own.config, len(head.labels)), True), head
