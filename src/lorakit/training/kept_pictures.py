"""Pictures of a run whose frozen features are computed once and kept, within a number of bytes.

Where nothing of the vision part is trained, what it makes of a picture is the same in every epoch.
Each picture is then computed by itself, not with those that happen to be in its batch, so that a
run gives the same numbers whether its features were kept or not. Batches name pictures by numbers,
in place of which the model is given transformers' `mm_encoder_outputs`. Pictures whose features
are not known yet are decoded and resized in a thread, while the model computes the batch before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lorakit.data.masking import sequences_of
from lorakit.data.picture_rows import opened
from lorakit.engine.kept_features import KeptFeatures
from lorakit.engine.picture_features import (
    JOINTLY,
    arguments_of,
    is_pixels,
    looked_at,
    takes_features,
    together,
)
from lorakit.engine.vision_boundary import Recorded, VisionBoundary
from lorakit.errors import count
from lorakit.lora.parts import seeing_parts
from lorakit.lora.wrapping import wrapped_places
from lorakit.models.loaded import base_model, in_evaluation
from lorakit.training.position import planned_steps, steps_per_epoch

if TYPE_CHECKING:
    from lorakit.data.picture_rows import RowPictures
    from lorakit.models.picture_reader import PictureReader
    from lorakit.training.trainer import LoraTrainer

NUMBERS = "picture_numbers"
"""The tensor (pictures,) of a batch that says which pictures it has, int64."""

WORTH = 1.25
"""So many times a picture is looked at in a run from which on its features are kept."""

Pictures = tuple[str, ...]
"""The sources of pictures that are looked at together, mostly one."""


@contextmanager
def pictures_kept(trainer: LoraTrainer, most_bytes: int) -> Iterator[str | None]:
    """Within the block, a trainer's batches have kept features of pictures where that is of use.

    Args:
        most_bytes: how much is kept; 0 switches it off.

    Yields: a line about it, if there is anything to keep.
    """
    kept = _kept(trainer, most_bytes)
    if kept is None:
        yield None
        return
    datasets: list[Any] = [d for d in (trainer.train_dataset, trainer.eval_dataset) if d]
    for dataset in datasets:
        dataset.pictures = kept.tensors
    model: Any = base_model(trainer.model)
    hook = model.register_forward_pre_hook(kept.put_in, with_kwargs=True)
    try:
        yield (
            f"what the frozen vision part makes of {count(len(kept), 'picture')} is computed once "
            f"and kept, up to {most_bytes >> 20:,} MiB (data.image_features_mb)"
        )
    finally:
        hook.remove()
        for dataset in datasets:
            dataset.pictures = None
        kept.close()


def _kept(trainer: LoraTrainer, most_bytes: int) -> TrainingPictures | None:
    """What keeps them; None where the vision part changes, or hardly any picture comes twice."""
    model: Any = base_model(trainer.model)
    if (
        not most_bytes
        or trainer.is_spread
        or trainer.streams
        or trainer.args.dataloader_num_workers
    ):
        return None
    parts = [
        [s.pictures for s in sequences_of(dataset.rows) if s.pictures and s.pictures.placed]
        for dataset in (trainer.train_dataset, trainer.eval_dataset)
        if dataset is not None
    ]
    if not any(parts) or not takes_features(model):
        return None
    boundary, changed = VisionBoundary(model), seeing_parts(_changing(model), model)
    if "vision" in changed or not boundary.exists or any(map(_draws, boundary.before())):
        return None
    jointly = JOINTLY in arguments_of(model)
    looks = [Counter(g for one in part for g in groups_of(one, jointly)) for part in parts]
    batches = len(trainer.sampler)
    epochs = planned_steps(trainer.args, batches) / steps_per_epoch(trainer.args, batches)
    # Held-out rows are scored at least with the adapter and without it.
    times = epochs * looks[0].total() + 2 * sum(part.total() for part in looks[1:])
    distinct = [*dict.fromkeys(g for part in looks for g in part)]
    if times < WORTH * len(distinct):
        return None
    reader = next(one for part in parts for one in part).reader
    return TrainingPictures(model, reader, distinct, boundary if changed else None, most_bytes)


def _changing(model: nn.Module) -> Iterator[str]:
    """The paths of modules of which something is trained, or which have adapters."""
    inside = set[int]()
    for path, module in wrapped_places(model):
        inside |= {id(parameter) for parameter in module.parameters()}
        yield path
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in inside:
            yield name.rpartition(".")[0]


def _draws(module: nn.Module) -> bool:
    """Whether a module draws something in training (dropout of its own, or of its attention)."""
    names = ("p", "dropout", "attention_dropout", "drop_prob")
    rates = [getattr(module, name, 0) for name in names]
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def groups_of(pictures: RowPictures, jointly: bool) -> list[Pictures]:
    """The pictures of a row, those in one tuple that are looked at together."""
    sources = tuple(one.source for one in pictures.placed)
    return [sources] if jointly else [(source,) for source in sources]


class TrainingPictures:
    """The pictures of a run.

    Args:
        model: the base, with its adapters in it.
        reader: the model's.
        groups: all pictures that there are, those in one tuple that are looked at together.
        boundary: where what is kept ends, as the projector behind it is trained; None keeps what
            the projector makes.
        most_bytes: how much is kept.
    """

    def __init__(
        self,
        model: Any,
        reader: PictureReader,
        groups: Sequence[Pictures],
        boundary: VisionBoundary | None,
        most_bytes: int,
    ) -> None:
        self._model, self._reader, self._boundary = model, reader, boundary
        self._groups, self._numbers = groups, {group: i for i, group in enumerate(groups)}
        self._jointly = JOINTLY in arguments_of(model)
        self.kept = KeptFeatures(most_bytes, drops=False)
        self._beside: dict[int, dict[str, torch.Tensor]] = {}
        self._coming: dict[int, Future[dict[str, torch.Tensor]]] = {}
        self._thread = ThreadPoolExecutor(1, "lorakit-pictures")

    def __len__(self) -> int:
        return len(self._groups)

    def close(self) -> None:
        """Ends what is prepared beside the model."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def tensors(self, pictures: Sequence[RowPictures]) -> dict[str, torch.Tensor]:
        """What stands in a batch for the pictures of its rows: `NUMBERS`, and their sizes where
        positions depend on them.
        """
        groups = [group for one in pictures for group in groups_of(one, self._jointly)]
        numbers = [self._numbers[group] for group in groups]
        for number in numbers:
            if number not in self.kept and number not in self._coming:
                self._coming[number] = self._thread.submit(self._prepare, number)
        found = {NUMBERS: torch.tensor(numbers)}
        if (positions := self._reader.positions) is not None:
            sizes = [self._sizes(number).get(positions.grids) for number in numbers]
            if known := [one for one in sizes if one is not None]:
                found[positions.grids] = torch.cat(known)
        return found

    def put_in(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """A model's arguments with features in the place of numbers: a forward pre-hook."""
        if NUMBERS not in kwargs:
            return None
        rest = {name: value for name, value in kwargs.items() if name != NUMBERS}
        found = [self._features(number) for number in kwargs[NUMBERS].tolist()]
        return args, rest | together(found)

    # --- one picture, or several that are looked at together ----------------------------------

    def _prepare(self, number: int) -> dict[str, torch.Tensor]:
        return self._reader.tensors([opened(self._groups[number])])

    def _prepared(self, number: int) -> dict[str, torch.Tensor]:
        coming = self._coming.get(number)
        return self._prepare(number) if coming is None else coming.result()

    def _sizes(self, number: int) -> dict[str, torch.Tensor]:
        if number not in self._beside:
            made = self._prepared(number)
            self._beside[number] = {k: x for k, x in made.items() if not is_pixels(k)}
        return self._beside[number]

    def _features(self, number: int) -> tuple[Any, Any]:
        """`looked_at`, with the gradient of the projector where that is trained."""
        kept = self.kept.get(number)
        if kept is None:
            kept = self.kept.put(number, self._computed(number))
        self._coming.pop(number, None)
        if self._boundary is None:
            return kept
        recorded, tensors = kept
        if recorded is None:
            return looked_at(self._model, tensors)
        with self._boundary.replaying(recorded):
            return looked_at(self._model, tensors)

    @torch.no_grad()
    def _computed(self, number: int) -> Any:
        """The features; or what passed the boundary, with tensors that may stand for its pixels.

        Where a model does not give the same features again from what passed, that is None, beside
        the pixels.
        """
        device = self._model.device
        tensors = {name: x.to(device) for name, x in self._prepared(number).items()}
        if self._boundary is None:
            return looked_at(self._model, tensors)
        with in_evaluation(self._model):  # the projector's dropout is not drawn here
            with self._boundary.recording() as passed:
                wanted, _ = looked_at(self._model, tensors)
            # Behind the boundary pixels are not read, but their shapes; which is tried.
            blank = {k: _blank(x) if is_pixels(k) else x for k, x in tensors.items()}
            for standing in (blank, tensors):
                if self._again(tuple(passed), standing, wanted):
                    return tuple(passed), standing
        return None, tensors

    def _again(self, passed: Recorded, tensors: dict[str, torch.Tensor], wanted: Any) -> bool:
        """Whether what passed the boundary gives the same features to the bit."""
        assert self._boundary is not None
        try:
            with self._boundary.replaying(passed):
                found, _ = looked_at(self._model, tensors)
        except (RuntimeError, StopIteration, TypeError, ValueError, IndexError, KeyError):
            return False
        return _equal(found, wanted)


def _blank(x: torch.Tensor) -> torch.Tensor:
    """Ones of the same shape that take no memory."""
    return torch.ones((), dtype=x.dtype, device=x.device).expand(x.shape)


def _equal(found: Any, wanted: Any) -> bool:
    """Whether all tensors are the same to the bit."""
    if isinstance(found, torch.Tensor):
        return torch.equal(found, wanted)
    if isinstance(found, dict):
        return all(_equal(value, wanted[name]) for name, value in found.items())
    if isinstance(found, (list, tuple)):
        return all(map(_equal, found, wanted))
    return found is None
