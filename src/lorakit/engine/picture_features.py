"""What a model's vision part makes of pictures, computed once for all rows that show them.

A picture's features are kept by the SHA-256 of its file, and by the adapter where that changes the
vision part or the projector. Adapters of the projector alone share what the vision part makes.
A bounded number of bytes is kept, the latest used. Features reach the model, and `generate`, as
transformers' `mm_encoder_outputs`.
"""

from __future__ import annotations

import hashlib
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import ModelOutput

from lorakit.data.picture_rows import opened
from lorakit.data.pictures import digest
from lorakit.engine.picture_prompt import Prepared, picture_kinds
from lorakit.lora.architecture import output_head, without_wrappers
from lorakit.lora.parts import part_prefixes
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
_JOINTLY = "batch_num_images"
"""Models with this argument (LLaVA-OneVision) look at pictures of one prompt together."""


def picture_features(
    model: PreTrainedModel, routing: Routing, most_bytes: int = FEATURE_BYTES
) -> PictureFeatures | None:
    """The features of pictures for a model; None where it does not take them beside tokens."""
    inner: Any = model.base_model
    takes = "mm_encoder_outputs" in inspect.signature(model.forward).parameters
    if not takes or not hasattr(inner, "get_image_features"):
        return None
    return PictureFeatures(model, routing, most_bytes)


class PictureFeatures:
    """Features of pictures under adapters whose values do not change.

    Args:
        model: with the bank's layers in it.
        routing: the bank's.
        most_bytes: how much may be kept; 0 keeps nothing.
    """

    def __init__(self, model: PreTrainedModel, routing: Routing, most_bytes: int) -> None:
        self._model: Any = model
        self._routing, self._most = routing, most_bytes
        self._kept: OrderedDict[tuple[str, ...], Any] = OrderedDict()
        self._sizes: dict[tuple[str, ...], int] = {}
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
        jointly = _JOINTLY in self._arguments
        groups = [tuple(sources)] if jointly else [(source,) for source in sources]
        return tuple(self._one(group, pictures, adapter) for group in groups)

    def inputs(self, rows: Sequence[AnswerRow], width: int) -> dict[str, Any]:
        """What the model is given of the pictures of prompts, padded on the left to `width`.

        Nothing where no prompt has a picture.
        """
        device = self._model.device
        found = []
        for row in rows:
            if row.pictures is None or not row.pictures.placed:
                continue
            for one in row.ticket.prepared or self.prepared(row.pictures, row.adapter):
                found.append(self._features(one, row.pictures, row.adapter))
            row.ticket.prepared = None
        if not found:
            return {}
        outputs = [output for output, _ in found]
        joined = {name: _joined([o[name] for o in outputs]) for name in outputs[0]}
        image = _output(type(outputs[0]), joined)
        others = {name: torch.cat([o[name] for _, o in found]) for name in found[0][1]}
        kinds = picture_kinds([row.asked() for row in rows], width, device)
        return {**kinds, **others, "mm_encoder_outputs": {"image": image}}

    # --- one picture ----------------------------------------------------------------------

    def _one(self, group: tuple[str, ...], pictures: RowPictures, adapter: str) -> Prepared:
        key = hashlib.sha256("".join(map(digest, group)).encode()).hexdigest()
        known = adapter in self._changes and self._key(key, adapter) in self._kept
        tensors = None if known else pictures.reader.tensors([opened(group)])
        return Prepared(key, group, tensors)

    def _features(self, one: Prepared, pictures: RowPictures, adapter: str) -> tuple[Any, Any]:
        """The model's output for pictures, and what else it is given of them beside pixels."""
        key = self._key(one.key, adapter)
        if (kept := self._get(key)) is not None:
            return kept
        tensors = one.tensors
        if tensors is None:  # dropped since it was prepared
            tensors = pictures.reader.tensors([opened(one.sources)])
        tensors = {name: x.to(self._model.device) for name, x in tensors.items()}
        given = {name: x for name, x in tensors.items() if name in self._arguments}
        with self._routing.using(Route.of_rows((adapter,))), self._tower_once(one.key, adapter):
            output = self._model.base_model.get_image_features(**given, return_dict=True)
        # Attributes, as some models write into an output what is no key of it then.
        read = {name: x for name in _READ if (x := getattr(output, name, None)) is not None}
        read = read or {"last_hidden_state": output.last_hidden_state}
        others = {name: x for name, x in tensors.items() if not name.startswith(_PIXELS)}
        return self._put(key, (_output(type(output), read), others))

    @contextmanager
    def _tower_once(self, picture: str, adapter: str) -> Iterator[None]:
        """Within the block the vision part's outputs are kept ones, if there are."""
        tower, calls = self._tower, 0
        if tower is None or not self._most or "vision" in self._changed(adapter):
            yield
            return
        compute: Callable[..., Any] = tower.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            key, calls = ("tower", picture, str(calls)), calls + 1
            output = self._get(key)
            if output is None:
                output = self._put(key, compute(*args, **kwargs))
            # A new one around the same tensors, as models write into what they get.
            return replace(output) if isinstance(output, ModelOutput) else output

        tower.forward = forward
        try:
            yield
        finally:
            del tower.forward

    # --- who changes what -----------------------------------------------------------------

    def _key(self, picture: str, adapter: str) -> tuple[str, ...]:
        return ("features", picture, adapter if self._changed(adapter) else BASE)

    def _changed(self, adapter: str) -> frozenset[str]:
        """Which of `vision` and `projector` an adapter of the bank changes."""
        if adapter not in self._changes:
            own = (
                path for path, module in wrapped_places(self._model) if adapter in module.adapters
            )
            parts = (self._part(without_wrappers(path)) for path in own)
            self._changes[adapter] = frozenset().union(*parts)
        return self._changes[adapter]

    def _part(self, path: str) -> tuple[str, ...]:
        if path == self._head:
            return ()
        for part in ("projector", "language", "vision"):
            if any(path == one or path.startswith(f"{one}.") for one in self._prefixes[part]):
                return () if part == "language" else (part,)
        return ("projector", "vision")  # nothing is known of it

    @cached_property
    def _arguments(self) -> frozenset[str]:
        return frozenset(inspect.signature(self._model.base_model.get_image_features).parameters)

    @cached_property
    def _prefixes(self) -> dict[str, list[str]]:
        return part_prefixes(self._model)

    @cached_property
    def _head(self) -> str:
        head = output_head(self._model)
        return next((name for name, one in self._model.named_modules() if one is head), "")

    @cached_property
    def _tower(self) -> Any:
        """The vision part, where it is one module that has no projector inside."""
        vision = self._prefixes["vision"]
        inside = [p for p in self._prefixes["projector"] for v in vision if p.startswith(f"{v}.")]
        return self._model.get_submodule(vision[0]) if len(vision) == 1 and not inside else None

    # --- what is kept ---------------------------------------------------------------------

    def _get(self, key: tuple[str, ...]) -> Any:
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def _put(self, key: tuple[str, ...], value: Any) -> Any:
        size = _bytes_of(value)
        if size <= self._most:
            self._kept[key], self._sizes[key] = value, size
            while sum(self._sizes.values()) > self._most:
                oldest, _ = self._kept.popitem(last=False)
                del self._sizes[oldest]
        return value


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


def _bytes_of(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(_bytes_of, value.values()))
    return sum(map(_bytes_of, value)) if isinstance(value, (list, tuple)) else 0
