"""One adapter, tried on the base: what it has beside the base's modules, and what it gives.

An adapter is loaded into a model of the base's structure, around the same weights, which proves
that it fits; what it brings is then taken out as parts, which the bank takes over. A classifier's
adapter is tried on the base in its form for sequence classification, and its head is kept apart.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorakit.adapters.derived import origin, other_weights
from lorakit.engine.outputs import EMBEDDING, TEXT, Outputs, of_head
from lorakit.engine.scoring import label_names, without_head
from lorakit.errors import InputError, listed
from lorakit.lora.checkpoint import (
    initial_factors,
    load_initial,
    load_tensors,
    read_adapter,
    read_initial,
    same_values,
)
from lorakit.lora.config import LoraConfig
from lorakit.lora.fitting import fitted
from lorakit.lora.joining import AdapterPart, parts_of
from lorakit.lora.key_names import PREFIX
from lorakit.lora.layers import LoraLayer, LoraLinear, LoraQuantizedLinear
from lorakit.lora.model import LoraModel
from lorakit.lora.parameters import set_trainable
from lorakit.lora.vocabulary import embeddings, rows_in_adapter, split_frozen
from lorakit.lora.wrapping import wrapped_modules
from lorakit.models.classifier_form import ClassifierForm, SequenceHead
from lorakit.models.fingerprint import fingerprint
from lorakit.models.loaded import writes_text
from lorakit.models.score_activations import activation_of, softmax

_TRIAL = "trial"
_EMBEDS, _CLASSIFIES = "FEATURE_EXTRACTION", "SEQ_CLS"
_REWARD = ("reward",)
"""The labels of a head that the objective `reward` has trained: it scores conversations."""


@dataclass(frozen=True, eq=False)
class Loaded:
    """An adapter in memory.

    Attributes:
        config: for the base at hand.
        parts: all that it has beside the base's modules, as the engine's bank takes it over.
        rank: the largest of its modules'; where the adapter started from other factors than zero,
            these are part of it (twice the rank).
        size: of its values, in bytes.
        head: of a reward model (1, d), or of a classifier (labels, d), on a causal base.
        classifier: what such an adapter has behind the body of another base.
        outputs: what it gives.
    """

    config: LoraConfig
    parts: list[AdapterPart] = field(repr=False)
    rank: int
    size: int
    head: torch.Tensor | None = field(default=None, repr=False)
    classifier: SequenceHead | None = field(default=None, repr=False)
    outputs: Outputs = TEXT


class AdapterReader:
    """Adapters of one base.

    Args:
        model: the base's structure, without adapters.
        base_model: its name.
        own_fingerprint: of its weights, to notice an adapter of others; None where it is not known.
        form: the base in its form for sequence classification, where adapters may be for that.
    """

    def __init__(
        self,
        model: Any,
        base_model: str,
        own_fingerprint: str | None,
        form: ClassifierForm | None,
    ) -> None:
        self._model, self._base_model = model, base_model
        self._fingerprint, self._form = own_fingerprint, form

    def read(self, folder: Path) -> Loaded:
        """The adapter in `folder`, in memory of its own: tried on a model of the base's structure.

        Raises:
            InputError: it does not fit the base, or cannot stand beside others.
        """
        config, tensors = read_adapter(folder)
        if config.task_type == _CLASSIFIES and self._form is not None:
            return self._load_classifier(folder, config, tensors, self._form)
        if config.task_type == _EMBEDS and self._form is not None and self._form.is_classifier:
            raise InputError(
                f"{folder} is for {_EMBEDS}, and {self._base_model} is a classifier: serve it on "
                "the encoder"
            )
        config, tensors, head = without_head(config, tensors)
        if config.task_type != _EMBEDS:
            require_text(folder, config, writes=writes_text(self._model))
        _, loaded = self._tried(folder, config, tensors, self._model)
        outputs = EMBEDDING if config.task_type == _EMBEDS else TEXT
        if head is not None and len(head) == 1:
            outputs = Outputs("scores")
        elif head is not None:
            names = label_names(origin(folder, config).labels, len(head))
            outputs = Outputs("labels", names, activation=softmax)
        return replace(loaded, head=head, outputs=outputs)

    def _load_classifier(
        self, folder: Path, config: LoraConfig, tensors: Mapping[str, Any], form: ClassifierForm
    ) -> Loaded:
        """A classifier's adapter on a base without a head, or on one that is a classifier itself.

        Raises:
            InputError: as `read`, or files and adapter lack a part of the head.
        """
        number = form.outputs_in(tensors, PREFIX)
        if not number and not form.is_classifier:
            raise InputError(
                f"{folder} is for {_CLASSIFIES} and brings no head ({listed(form.head, 3)}): train "
                "it with the head in modules_to_save"
            )
        number = number or len(form.labels)
        plain = form.over(structure_of(self._model), number)
        model, loaded = self._tried(folder, config, tensors, plain)
        try:
            form.require_whole(plain, {key.removeprefix(PREFIX) for key in tensors})
        except InputError as error:
            raise InputError(f"{folder} {error}") from error
        named = form.own.config if form.is_classifier and number == len(form.labels) else None
        record = origin(folder, config).labels
        labels = form.labels if named and not record else label_names(record, number)
        parts = [
            own
            for part in loaded.parts
            if part.path.startswith(f"{form.prefix}.")
            for own in _in_body(part, f"{form.prefix}.")
        ]
        outputs = of_head(labels, activation_of(named, number), pairs=True)
        if labels == _REWARD:  # it has learned to score conversations
            outputs = Outputs("scores")
        classifier = form.apart(model, labels)
        return replace(loaded, parts=parts, classifier=classifier, outputs=outputs)

    def _tried(
        self, folder: Path, config: LoraConfig, tensors: Mapping[str, torch.Tensor], plain: Any
    ) -> tuple[Any, Loaded]:
        """The adapter on a model of the structure of `plain`, and it in a memory of its own.

        Raises:
            InputError: it does not fit, or cannot stand beside others.
        """
        if reason := why_not_beside(config):
            raise AloneError(folder, reason)
        base = structure_of(plain)
        try:
            config, found, initial = fitted(base, config, tensors, read_initial(folder), folder)
            self._require_vocabulary(folder, config, found, plain)
            dora = config.use_dora
            trial = LoraModel(base, config, _TRIAL, autocast_adapter_dtype=dora, initialize=False)
            own = trial.adapter_tensors(_TRIAL)
            found, frozen = split_frozen(base, found, own)
            for (path, name), copied in frozen.items():
                if not same_values(copied, getattr(plain.get_submodule(path), name)):
                    raise AloneError(folder, f"brings weights of the base's own ({path})")
            load_tensors(own, found, folder)
            load_initial(base, _TRIAL, initial, config, folder)
        except AloneError:
            raise
        except InputError as error:
            why = str(error).removeprefix(f"{folder} ")
            why = why if why == str(error) else f"it {why}"
            raise InputError(f"{folder} does not fit {self._base_model}: {why}") from error
        set_trainable(own.values(), False)
        values = own | initial_factors(trial.get_base_model(), _TRIAL)
        for key, tensor in values.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise InputError(f"{folder}: {key} holds values that {tensor.dtype} cannot hold")
        layers = [layer for _, layer in wrapped_modules(base) if isinstance(layer, LoraLayer)]
        for layer in layers:
            if type(layer) in (LoraLinear, LoraQuantizedLinear) and layer.r:
                layer.fold_scaling(_TRIAL)  # once, and not whenever it joins the model
        rank = max((len(layer.factors(_TRIAL)[0]) for layer in layers if layer.r), default=0)
        size = sum(tensor.numel() * tensor.element_size() for tensor in values.values())
        return base, Loaded(config, parts_of(base, _TRIAL), rank, size)

    def _require_vocabulary(
        self, folder: Path, config: LoraConfig, tensors: Mapping[str, torch.Tensor], plain: Any
    ) -> None:
        """Raises AloneError for an adapter that has another number of tokens than the base."""
        for path, module in embeddings(plain).items():
            own: Any = module.weight
            rows = rows_in_adapter(config, tensors, path, len(own))
            if rows is not None and rows != len(own):
                raise AloneError(folder, f"is for {rows} tokens (the base has {len(own)})")

    def notice(self, folder: Path, loaded: Loaded) -> str:
        """What to say where an adapter was trained on other weights; mostly empty."""
        expected, own = origin(folder, loaded.config).base_fingerprint, self._fingerprint
        if loaded.classifier is not None and self._form is not None:
            own = self._form_fingerprint
        if None in (expected, own) or expected == own:
            return ""
        return other_weights(folder, self._base_model)

    @cached_property
    def _form_fingerprint(self) -> str | None:
        """That of the base in its form for sequence classification, without its head."""
        form = self._form
        if form is None:
            return None
        model = form.over(structure_of(self._model), len(form.labels))
        return fingerprint(model, without=form.new_modules)


def _in_body(part: AdapterPart, before: str) -> Iterator[AdapterPart]:
    """A part of a classifier's adapter by the body's own paths.

    A module that is trained whole and only holds others, as a pooler does, becomes these: another
    adapter may have one of them alone.
    """
    path, tied = part.path.removeprefix(before), part.tied_to.removeprefix(before)
    whole = part.values.get("modules_to_save")
    holds = isinstance(whole, nn.Module) and not [*whole.parameters(False), *whole.buffers()]
    if whole is None or not holds:
        yield part._replace(path=path, tied_to=tied)
        return
    for name, module in whole.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            values = {"modules_to_save": module}
            yield part._replace(path=f"{path}.{name}", tied_to=tied, values=values)


class AloneError(InputError):
    """An adapter that changes the base itself, so that it cannot stand beside others."""

    def __init__(self, folder: Path, reason: str) -> None:
        super().__init__(
            f"{folder} {reason}, which cannot be served beside other adapters: merge it with "
            "lorakit merge and serve the result, or serve it alone with --merged"
        )
        self.folder, self.reason = folder, reason


def structure_of(model: nn.Module, _known: dict[int, Any] | None = None) -> Any:
    """The modules of `model` once more, around the same parameters and buffers.

    Wrapping them, or giving them other parameters, leaves the model as it is.
    """
    known = {} if _known is None else _known
    if id(model) not in known:
        known[id(model)] = twin = copy.copy(model)
        twin._parameters, twin._buffers = dict(model._parameters), dict(model._buffers)
        twin._modules = {
            name: None if child is None else structure_of(child, known)
            for name, child in model._modules.items()
        }
    return known[id(model)]


def require_text(folder: Path, config: LoraConfig, *, writes: bool = True) -> None:
    """Raises InputError for an adapter of a model that does not write text.

    Args:
        writes: whether the base does; else the adapter must not be for one that does either.
    """
    if not writes and config.task_type is not None:
        raise InputError(
            f"{folder} is for {config.task_type}, and the base writes nothing: it has adapters for "
            f"{_EMBEDS} and {_CLASSIFIES}, others are used by lorakit eval or PEFT"
        )
    if config.task_type == _EMBEDS:
        raise InputError(f"{folder} gives embeddings and writes no text: ask it by lorakit serve")
    if config.task_type not in (None, "CAUSAL_LM"):
        raise InputError(
            f"{folder} is for {config.task_type} and cannot answer with text: score it with "
            "lorakit eval" + (", or ask it by lorakit serve" * (config.task_type == _CLASSIFIES))
        )


def why_not_beside(config: LoraConfig) -> str:
    """Why the adapter cannot stand beside others, as it changes the base; empty where it can."""
    if config.init.kind.changes_base:
        return "is for the base as LoftQ quantised it"
    if config.bias != "none":
        return "trains the base's biases"
    if config.layer_replication:
        return "repeats layers of the base (layer_replication)"
    return ""
