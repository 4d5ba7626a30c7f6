"""What a model's vision part makes of pictures, computed once for all rows that show them.

A picture's features are kept by the SHA-256 of its file, and by the adapter where that changes the
vision part or the projector. Adapters of the projector alone share what the vision part makes.
A bounded number of bytes is kept, the latest used. Features reach the model, and `generate`, as
transformers' `mm_encoder_outputs`.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from lorakit.data.picture_rows import opened
from lorakit.data.pictures import digest
from lorakit.engine.kept_features import KeptFeatures
from lorakit.engine.picture_prompt import Prepared, picture_kinds
from lorakit.engine.vision_boundary import VisionBoundary
from lorakit.lora.parts import seeing_parts
from lorakit.lora.routing import BASE, Route, Routing
from lorakit.lora.wrapping import wrapped_places

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lorakit.data.picture_rows import RowPictures
    from lorakit.engine.rows import AnswerRow

FEATURE_BYTES = 256 << 20
"""How much is kept; a picture of SmolVLM has up to 2.5 MB of features, one of a 7B Qwen 10 MB."""

_READ = ("pooler_output", "deepstack_features")
_PIXELS = "pixel_"
JOINTLY = "batch_num_images"
"""Models with this argument (LLaVA-OneVision) look at pictures of one prompt together."""


def picture_features(
    model: PreTrainedModel, routing: Routing, most_bytes: int = FEATURE_BYTES
) -> PictureFeatures | None:
    """The features of pictures for a model; None where it does not take them beside tokens."""
    return PictureFeatures(model, routing, most_bytes) if takes_features(model) else None


def takes_features(model: PreTrainedModel) -> bool:
    """Whether a model takes features of pictures in the place of pixels."""
    takes = "mm_encoder_outputs" in inspect.signature(model.forward).parameters
    return takes and hasattr(model.base_model, "get_image_features")


def arguments_of(model: PreTrainedModel) -> frozenset[str]:
    """What a model's `get_image_features` takes."""
    inner: Any = model.base_model
    return frozenset(inspect.signature(inner.get_image_features).parameters)


def looked_at(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> tuple[Any, Any]:
    """What a model makes of pictures that are looked at together, under the route in force.

    Args:
        tensors: the processor's, on the model's device.

    Returns: the model's output for them, with what it reads of that alone; and what else it is
        given of them beside pixels.
    """
    arguments, inner = arguments_of(model), model.base_model
    given = {name: x for name, x in tensors.items() if name in arguments}
    output = inner.get_image_features(**given, return_dict=True)
    # Attributes, as some models write into an output what is no key of it then.
    read = {name: x for name in _READ if (x := getattr(output, name, None)) is not None}
    read = read or {"last_hidden_state": output.last_hidden_state}
    others = {name: x for name, x in tensors.items() if not is_pixels(name)}
    return _output(type(output), read), others


def is_pixels(name: str) -> bool:
    """Whether a tensor of the processor has pixels, or says which there are."""
    return name.startswith(_PIXELS)


def together(found: Sequence[tuple[Any, Any]]) -> dict[str, Any]:
    """What a model is given of pictures that were `looked_at` one after the other."""
    outputs = [output for output, _ in found]
    joined = {name: _joined([o[name] for o in outputs]) for name in outputs[0]}
    others = {name: torch.cat([o[name] for _, o in found]) for name in found[0][1]}
    return {**others, "mm_encoder_outputs": {"image": _output(type(outputs[0]), joined)}}


class PictureFeatures:
    """Features of pictures under adapters whose values do not change.

    Args:
        model: with the bank's layers in it.
        routing: the bank's.
        most_bytes: how much may be kept; 0 keeps nothing.

    Attributes:
        kept: the features, and what passed the vision part's end.
    """

    def __init__(self, model: PreTrainedModel, routing: Routing, most_bytes: int) -> None:
        self._model: Any = model
        self._routing = routing
        self.kept = KeptFeatures(most_bytes)
        self._changes: dict[str, frozenset[str]] = {BASE: frozenset()}

    def prepared(self, pictures: RowPictures, adapter: str = "") -> tuple[Prepared, ...]:
        """A prompt's pictures as the processor prepares them, decoded and resized.

        It may be called from another thread than the one that computes.

        Args:
            adapter: the name in the bank of the one that will look at them.

        Raises:
            InputError: one cannot be read, or the processor cannot use it.
        """
        sources = [one.source for one in pictures.placed]
        jointly = JOINTLY in arguments_of(self._model)
        groups = [tuple(sources)] if jointly else [(source,) for source in sources]
        return tuple(self._one(group, pictures, adapter) for group in groups)

    def inputs(self, rows: Sequence[AnswerRow], width: int) -> dict[str, Any]:
        """What the model is given of the pictures of prompts, padded on the left to `width`.

        Nothing where no prompt has a picture.
        """
        found = []
        for row in rows:
            if row.pictures is None or not row.pictures.placed:
                continue
            for one in row.ticket.prepared or self.prepared(row.pictures, row.adapter):
                found.append(self._features(one, row.pictures, row.adapter))
            row.ticket.prepared = None
        if not found:
            return {}
        kinds = picture_kinds([row.asked() for row in rows], width, self._model.device)
        return {**kinds, **together(found)}

    # --- one picture ----------------------------------------------------------------------

    def _one(self, group: tuple[str, ...], pictures: RowPictures, adapter: str) -> Prepared:
        key = hashlib.sha256("".join(map(digest, group)).encode()).hexdigest()
        known = adapter in self._changes and self._key(key, adapter) in self.kept
        tensors = None if known else pictures.reader.tensors([opened(group)])
        return Prepared(key, group, tensors)

    def _features(self, one: Prepared, pictures: RowPictures, adapter: str) -> tuple[Any, Any]:
        """The model's output for pictures, and what else it is given of them beside pixels."""
        key = self._key(one.key, adapter)
        if (kept := self.kept.get(key)) is not None:
            found: tuple[Any, Any] = kept
            return found
        tensors = one.tensors
        if tensors is None:  # dropped since it was prepared
            tensors = pictures.reader.tensors([opened(one.sources)])
        tensors = {name: x.to(self._model.device) for name, x in tensors.items()}
        with self._routing.using(Route.of_rows((adapter,))):
            found = self._from_boundary(one.key, tensors, adapter)
        self.kept.put(key, found)
        return found

    def _from_boundary(
        self, picture: str, tensors: dict[str, torch.Tensor], adapter: str
    ) -> tuple[Any, Any]:
        """`looked_at`, from the end of the vision part on where what it makes is kept."""
        boundary = self._boundary
        if not boundary.exists or boundary.inside or "vision" in self._changed(adapter):
            return looked_at(self._model, tensors)
        key = ("tower", picture)
        if (recorded := self.kept.get(key)) is not None:
            with boundary.replaying(recorded):
                return looked_at(self._model, tensors)
        with boundary.recording() as passed:
            found = looked_at(self._model, tensors)
        self.kept.put(key, tuple(passed))
        return found

    # --- who changes what -----------------------------------------------------------------

    def _key(self, picture: str, adapter: str) -> tuple[str, ...]:
        return ("features", picture, adapter if self._changed(adapter) else BASE)

    def _changed(self, adapter: str) -> frozenset[str]:
        """Which of `vision` and `projector` an adapter of the bank changes."""
        if adapter not in self._changes:
            places = wrapped_places(self._model)
            own = [path for path, module in places if adapter in module.adapters]
            self._changes[adapter] = seeing_parts(own, self._model)
        return self._changes[adapter]

    @cached_property
    def _boundary(self) -> VisionBoundary:
        return VisionBoundary(self._model)


def _output(kind: Any, values: dict[str, Any]) -> Any:
    """A model's output with these values alone; some classes ask for a last hidden state."""
    return kind(**{"last_hidden_state": None, **values})


def _joined(values: Sequence[Any]) -> Any:
    """Features of several pictures, in any of the forms in which models give them."""
    first = values[0]
    if len(values) == 1:
        return first
    if isinstance(first, torch.Tensor):
        return torch.cat(list(values))
    if isinstance(first[0], (list, tuple)):  # layer by layer (deepstack)
        return [_joined(layer) for layer in zip(*values, strict=True)]
    return [features for value in values for features in value]
