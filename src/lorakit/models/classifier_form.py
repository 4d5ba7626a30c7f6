"""What a model for sequence classification has behind its body, apart from that body.

transformers' classes for it (`BertForSequenceClassification`, …) are a body and layers behind it
that differ from class to class: a pooler, a dense layer, a mean over tokens, a projection. Here the
body is computed by whoever has it, once for rows of many adapters; the class's own `forward` does
the rest, with a stand-in in the body's place that gives the hidden states that are there already.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorakit.errors import InputError, listed
from lorakit.models.layouts import layout_of
from lorakit.models.load import set_padding
from lorakit.models.shards import ShardReader, all_tensors
from lorakit.models.skeleton import FileNames, file_names, skeleton

_NONE = -1  # no token


@dataclass(frozen=True, eq=False)
class SequenceHead:
    """The layers behind a body.

    Attributes:
        model: the class's own model, with a stand-in for the body.
        labels: the names of its outputs, by their number.
    """

    model: Any
    labels: tuple[str, ...]

    def __call__(self, outputs: Any, input_ids: torch.Tensor) -> torch.Tensor:
        """The logits (rows, labels), in float32 or wider.

        Args:
            outputs: what the body gave for these rows, without padding.
            input_ids: (rows, seq).
        """
        own: Any = getattr(self.model, self.model.base_model_prefix)
        own.given = type(outputs)(**{name: _wide(value) for name, value in outputs.items()})
        try:
            given = {"input_ids": input_ids}
            if "attention_mask" in inspect.signature(self.model.forward).parameters:
                given["attention_mask"] = torch.ones_like(input_ids)
            logits: torch.Tensor = self.model(**given).logits
        finally:
            own.given = None
        return logits


class _GivenBody(nn.Module):
    """Stands in a body's place, and gives what has been computed."""

    given: Any = None

    def forward(self, *_: Any, **named: Any) -> Any:
        """What was given, whatever a body is asked.

        Raises:
            _AskedError: nothing was given.
        """
        if self.given is None:
            raise _AskedError(n for n, value in named.items() if isinstance(value, torch.Tensor))
        return self.given


class _AskedError(Exception):
    """What a body is given by name."""


class ClassifierForm:
    """A base model in its form for sequence classification; nothing is read before it is needed.

    Args:
        path: of the base's files.
        pad_token_id: by which causal models that are trained here find the last token of a row.
        is_classifier: whether the files are a classifier's own, with its head.
    """

    def __init__(self, path: Path, pad_token_id: int, is_classifier: bool = False) -> None:
        self._path, self._pad = path, pad_token_id
        self.is_classifier = is_classifier

    @cached_property
    def own(self) -> Any:
        """The model as its configuration has it, on the meta device.

        Raises:
            InputError: transformers has no such form of it, or one whose layers cannot be had
                apart from the body.
        """
        model: Any = skeleton(self._path, "SEQ_CLS")
        prefix = model.base_model_prefix
        if not isinstance(getattr(model, prefix, None), nn.Module):
            raise InputError(f"model: {type(model).__name__} has no body of its own")
        if kept := [name for name, _ in model.named_buffers() if not _under(name, prefix)]:
            raise InputError(
                f"model: {type(model).__name__} keeps {listed(kept, 3)} behind its body, which is "
                "not served here: use transformers"
            )
        return model

    @property
    def prefix(self) -> str:
        """What the names of the body's parameters begin with, without the point."""
        return str(self.own.base_model_prefix)

    @property
    def labels(self) -> tuple[str, ...]:
        """The names that the configuration has for the outputs."""
        names = self.own.config.id2label
        return tuple(str(names[i]) for i in sorted(names))

    @cached_property
    def head(self) -> list[str]:
        """The names of the parameters behind the body."""
        return [name for name, _ in self.own.named_parameters() if not _under(name, self.prefix)]

    @cached_property
    def _outputs(self) -> list[str]:
        """Those of them that have as many rows as there are labels."""
        more = self._skeleton(len(self.labels) + 1)
        own = dict(self.own.named_parameters())
        return [n for n, one in more.named_parameters() if one.shape != own[n].shape]

    @cached_property
    def _names(self) -> FileNames:
        return file_names(self.own, self._stored)

    @cached_property
    def _stored(self) -> Mapping[str, Any]:
        return all_tensors(layout_of(self._path).shards())

    @cached_property
    def _values(self) -> dict[str, torch.Tensor]:
        """What the files hold of the head: all of a classifier's, little or nothing of others'."""
        names = self._names.stored
        found = {name: self._stored[names[name]] for name in self.head if name in names}
        with ShardReader(one.path for one in found.values()) as reader:
            return {name: reader.read(one) for name, one in found.items()}

    @cached_property
    def lacking(self) -> list[str]:
        """The names of the body's parameters that the files do not hold, such as a pooler's."""
        if self._names.converted:  # told apart by transformers alone, when it loads them
            return []
        own = (name for name, _ in self.own.named_parameters() if _under(name, self.prefix))
        return [name for name in own if name not in self._names.stored]

    @property
    def new_modules(self) -> list[str]:
        """The modules that a classifier trained on these files has of its own."""
        lacking = (name.rpartition(".")[0] for name in self.lacking)
        return list(dict.fromkeys([*(name.partition(".")[0] for name in self.head), *lacking]))

    def outputs_in(self, tensors: Mapping[str, torch.Tensor], before: str) -> int:
        """How many labels the head has that `tensors` bring, under names that begin with `before`.

        0 where they bring none.

        Raises:
            InputError: they disagree.
        """
        found = [tensors[key] for name in self._outputs if (key := before + name) in tensors]
        if len(sizes := {one.shape[0] for one in found}) > 1:
            raise InputError(f"its head has {listed(map(str, sorted(sizes)))} outputs at once")
        return sizes.pop() if sizes else 0

    def over(self, body: Any, number: int) -> Any:
        """The model with this body and a head for `number` labels, in float32 or wider.

        What the files do not hold of the head is 0 (`require_whole`).

        Args:
            body: which becomes the model's; modules that the form's own has not are taken out.
        """
        model: Any = self._skeleton(number)
        first: torch.Tensor = next(body.parameters())
        floats = first.is_floating_point()
        dtype = torch.promote_types(first.dtype, torch.float32) if floats else torch.float32
        own = getattr(model, self.prefix)
        for name, child in body._modules.items():
            if child is not None and getattr(own, name, None) is None:
                body._modules[name] = None
        setattr(model, self.prefix, body)
        model.config._name_or_path = body.config._name_or_path
        if (quantizer := getattr(body, "hf_quantizer", None)) is not None:
            model.hf_quantizer = quantizer
        for name, blank in [(n, p) for n, p in model.named_parameters() if n in self.head]:
            value = self._values.get(name)
            if value is None or value.shape != blank.shape:
                value = torch.zeros(blank.shape)
            parent, _, leaf = name.rpartition(".")
            value = value.to(first.device, dtype)
            setattr(model.get_submodule(parent), leaf, nn.Parameter(value, requires_grad=False))
        set_padding(model, self._padding())
        return model.eval()

    def require_whole(self, model: Any, brought: set[str]) -> None:
        """Raises InputError unless files and adapter have all that `over` has put together.

        Args:
            brought: the names of parameters that an adapter has itself.
        """
        there = {name: one.shape for name, one in self._values.items()}
        needed = {name: one.shape for name, one in model.named_parameters()}
        missing = [
            name
            for name in (*self.head, *self.lacking)
            if name not in brought and there.get(name) != needed[name]
        ]
        if missing:
            raise InputError(
                f"lacks {listed(missing, 3)}, which would be random: train it with "
                f"modules_to_save={sorted({name.rpartition('.')[0] for name in missing})}"
            )

    def apart(self, model: Any, labels: tuple[str, ...]) -> SequenceHead:
        """The head of a model that `over` has made; the model has no body then.

        Raises:
            InputError: the class has its body compute something of its own, as Longformer's has it
                attend globally to the first token.
        """
        device = next(model.parameters()).device
        setattr(model, self.prefix, _GivenBody())
        try:
            model(input_ids=torch.zeros(1, 4, dtype=torch.long, device=device))
        except _AskedError as asked:
            if own := sorted({*asked.args[0]} - {"input_ids", "attention_mask", "token_type_ids"}):
                raise InputError(
                    f"model: {type(model).__name__} gives its body {listed(own)} of its own, which "
                    "is not served here: use transformers"
                ) from asked
        return SequenceHead(model, labels)

    def own_head(self, body: Any) -> SequenceHead:
        """The head that a classifier's own files hold.

        Raises:
            InputError: they do not hold all of it.
        """
        model = self.over(body, len(self.labels))
        if missing := [n for n in (*self.head, *self.lacking) if n not in self._values]:
            raise InputError(
                f"model: {self._path} lacks {listed(missing, 3)} in its files: copy or fetch the "
                "model again"
            )
        return self.apart(model, self.labels)

    def _padding(self) -> int:
        """The token of padding, which a causal model passes over when it looks for the last one.

        A checkpoint without one reads the last token, whatever that is.
        """
        own = getattr(self.own.config.get_text_config(), "pad_token_id", None)
        if not self.is_classifier:
            return self._pad
        return _NONE if own is None else int(own)

    def _skeleton(self, number: int) -> Any:
        """The model on the meta device, with so many outputs."""
        names = self.labels if number == len(self.labels) else label_numbers(number)
        return skeleton(self._path, "SEQ_CLS", labels=names)


def label_numbers(number: int) -> tuple[str, ...]:
    """transformers' own names of so many labels."""
    return tuple(f"LABEL_{i}" for i in range(number))


def _under(name: str, prefix: str) -> bool:
    return name.startswith(f"{prefix}.")


def _wide(value: Any) -> Any:
    narrow = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.float() if narrow and value.element_size() < 4 else value
