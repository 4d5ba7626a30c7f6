"""Whether a `RowCache` carries a model. Not believed but tried, beside the model's own cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from lorakit.engine.batch import Batch, ContinuousBatch, PackedNow
from lorakit.engine.cache import RowCache, argument, row_cache
from lorakit.engine.decode_step import DecodeStep
from lorakit.engine.picture_prompt import picture_inputs, place_pictures
from lorakit.engine.pictures_apart import PicturesApart, tells_pictures_apart
from lorakit.engine.plain_batch import PlainBatch
from lorakit.errors import first_line
from lorakit.lora.routing import Route, Routing
from lorakit.models.loaded import writes_text
from lorakit.models.state_updates import take_over

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lorakit.data.masking import TokenizedRow
    from lorakit.engine.picture_features import PictureFeatures
    from lorakit.engine.prefix_cache import PrefixCache
    from lorakit.engine.rows import AnswerRow
    from lorakit.engine.speculation import Drafts

_WINDOWS = ("sliding_window", "attention_chunk_size")
_NARROW = 4
"""The tokens of a window while it is tried, so that a few tokens are more than it holds."""

_AMPLIFIED = 1e-3
"""The most that rounding of float32 may become, as a part of the largest logit."""


@dataclass(frozen=True)
class Carried:
    """How a model is computed for several rows.

    Attributes:
        why_not: why only `generate` can do it; empty where it need not.
        in_parts: whether a prompt may be read in parts.
        padded: whether prompts may be read together, the shorter ones behind padding.
        step: computes newest tokens in the model's place; None where only the model does.
    """

    why_not: str = ""
    in_parts: bool = True
    padded: bool = True
    step: DecodeStep | None = None

    def notices(self, name: str) -> list[str]:
        """What a user should know of how the model `name` writes."""
        found = []
        if self.why_not:
            found.append(
                f"{name} is computed by transformers' generate ({self.why_not}): answers that "
                "begin together are written together, later ones wait for them"
            )
        if self.step is not None and (why := self.step.why_not_native):
            found.append(f"tokens are computed by PyTorch, at about half the speed: {why}")
        return found

    def batch(
        self,
        model: PreTrainedModel,
        routing: Routing,
        most: int,
        length: int,
        route: Route | None = None,
        features: PictureFeatures | None = None,
        prefixes: PrefixCache | None = None,
        packed: PackedNow = lambda: None,
        drafts: Drafts | None = None,
    ) -> Batch:
        """An empty batch of answers; arguments as in `ContinuousBatch`."""
        if self.why_not:
            return PlainBatch(model, routing, most, route, features)
        ways = self.in_parts, self.padded
        stepped = self.step, packed
        batch = ContinuousBatch(
            model, routing, most, length, route, *ways, features, prefixes, *stepped, drafts=drafts
        )
        if not tells_pictures_apart(model):
            return batch

        def carries(row: AnswerRow) -> bool:
            with routing.using(Route()):
                return not why_apart(model, row.asked())

        apart = PlainBatch(model, routing, most, route, features)
        return PicturesApart(batch, apart, most, carries)


def how_carried(model: PreTrainedModel) -> Carried:
    """Tries with two short rows how several rows of this model can be computed.

    Where that is right, its mixers compute by `state_updates` from here on when they answer.
    """
    if not writes_text(model):
        return Carried("it writes no text")
    if model.config.is_encoder_decoder:
        return Carried("it has an encoder")
    if argument(model) is None:
        return Carried("it takes no cache")
    with _narrow_windows(model.config.get_text_config()):
        try:
            expected = _Expected(model)
        except Exception as error:
            return Carried(_refused(error))
        undo = take_over(model)
        found = _ways(model, expected)
        if found.why_not:
            undo()
            found = _ways(model, expected)
        if not found.why_not:
            found = replace(found, step=_proved_step(model, expected))
    return found


def _ways(model: PreTrainedModel, expected: _Expected) -> Carried:
    if not (reason := _disproof(model, expected)):
        return Carried()
    # A state may begin at zero whenever more than one token is read, and count padding.
    for in_parts, padded in ((False, True), (True, False), (False, False)):
        if not _disproof(model, expected, in_parts, padded):
            return Carried("", in_parts, padded)
    return Carried(reason)


@contextmanager
def _narrow_windows(config: Any) -> Iterator[None]:
    """Within this block the model's windows hold `_NARROW` tokens."""
    own = {name: getattr(config, name, None) for name in _WINDOWS}
    wide = {name: w for name, w in own.items() if isinstance(w, int) and w > _NARROW}
    try:
        for name in wide:
            setattr(config, name, _NARROW)
        yield
    finally:
        for name, window in wide.items():
            setattr(config, name, window)


class _Expected:
    """What a model computes of two rows, each alone, by its own cache and without one.

    Attributes:
        rows: their tokens.
        logits: of the last token of each (2, vocabulary), by its own cache.
        rounding: how far these are from those without a cache.
    """

    @torch.inference_mode()
    def __init__(self, model: PreTrainedModel) -> None:
        size = model.config.get_text_config().vocab_size
        self.rows = [[i % size for i in row] for row in (range(1, 11), range(20, 24))]
        self.logits = torch.stack([_alone(model, row) for row in self.rows]).float()
        at_once = torch.stack([_at_once(model, row) for row in self.rows]).float()
        self.rounding = (at_once - self.logits).abs().max().item()


@torch.inference_mode()
def _disproof(
    model: PreTrainedModel, expected: _Expected, in_parts: bool = True, padded: bool = True
) -> str:
    """Computes two rows together, and compares each with the row alone in the model's own cache.

    Args:
        in_parts: the prompt of the first one is read in two parts.
        padded: their prompts are read together.
    """
    device = model.device
    forward: Any = model
    one, other = expected.rows
    try:
        cache = row_cache(model, rows=2, length=16)
        read = 6 if in_parts else 8
        if padded:
            forward(**cache.whole_prompts(0, [one[:read], other[:2]], device))
        else:
            forward(**cache.whole_prompts(0, [one[:read]], device))
            forward(**cache.whole_prompts(1, [other[:2]], device))
        if in_parts:
            forward(**cache.part_of_row(0, one[read:8], read, device))
        if cache.keeps_states and not _same_states(model, cache, [one[:8], other[:2]]):
            return "its states depend on how a prompt is read"
        forward(**cache.newest_tokens([one[8], other[2]], [8, 2], device))
        found = forward(**cache.newest_tokens([one[9], other[3]], [9, 3], device)).logits[:, -1]
    except Exception as error:
        return _refused(error)
    return _difference(model, found, expected.logits, expected.rounding)


@torch.inference_mode()
def _proved_step(model: PreTrainedModel, expected: _Expected) -> DecodeStep | None:
    """The function that computes newest tokens, where it gives what the model gives."""
    forward: Any = model
    one, other = expected.rows
    try:
        step, cache = DecodeStep(model), row_cache(model, rows=2, length=16)
        if not cache.own_mask or not step.serves(Route(), None):
            return None
        forward(**cache.whole_prompts(0, [one[:8], other[:2]], model.device))
        # Its first step proves the one in C++, so that answers are computed by one of both alone.
        step(cache, cache.newest_tokens([one[8], other[2]], [8, 2], model.device))
        found = step(cache, cache.newest_tokens([one[9], other[3]], [9, 3], model.device))
    except Exception:  # it has other modules, or they take something else
        return None
    if not _close(model, found, expected):
        return None
    step.prove_prompts(lambda: _reads_prompts(model, step, expected))
    return step


def _reads_prompts(model: PreTrainedModel, step: DecodeStep, expected: _Expected) -> bool:
    """Whether `DecodeStep.of_prompts` gives what the model gives, of prompts and their rests."""
    one, other = expected.rows
    cache = row_cache(model, rows=2, length=16)
    step.of_prompts(cache, cache.whole_prompts(0, [one[:6], other[:2]], model.device))
    step.of_prompts(cache, cache.part_of_row(0, one[6:8], 6, model.device))
    rests = cache.rests_of_prompts(0, [one[8:], other[2:]], [8, 2], model.device)
    found = step.of_prompts(cache, rests)
    return found is not None and _close(model, found, expected)


def _close(model: PreTrainedModel, found: torch.Tensor, expected: _Expected) -> bool:
    """Whether logits of the rows' last tokens are what is expected of them, to rounding."""
    off = (found.float() - expected.logits).norm() / expected.logits.norm()
    close = off.item() <= 16 * torch.finfo(model.dtype).eps or model.dtype.itemsize > 2
    return close and not _difference(model, found, expected.logits, expected.rounding)


@torch.inference_mode()
def why_apart(model: PreTrainedModel, asked: TokenizedRow) -> str:
    """Why a prompt with pictures cannot be computed beside other rows; empty where it can be.

    It is read with two tokens more, and compared with all of it at once.
    """
    device, more = model.device, [asked.input_ids[-1], asked.input_ids[0]]
    forward: Any = model
    longer = replace(asked, input_ids=[*asked.input_ids, *more])
    length = len(asked)
    try:
        ids = torch.tensor([longer.input_ids], device=device)
        whole = picture_inputs([longer], len(longer), device)
        mask = torch.ones_like(ids)
        expected = forward(input_ids=ids, attention_mask=mask, **whole, use_cache=False)
        cache = row_cache(model, rows=1, length=len(longer))
        given = cache.whole_prompts(0, [asked.input_ids], device)
        given |= picture_inputs([asked], length, device)
        positions, moved = place_pictures(asked, given)
        logits = [forward(**given | positions).logits[0, -1]]
        for i, token in enumerate(more):
            newest = cache.newest_tokens([token], [length + i], device, [moved])
            logits.append(forward(**newest).logits[0, -1])
    except Exception as error:
        return f"it does not take pictures with a cache of ours: {first_line(error)}"
    wanted = expected.logits[0, -len(logits) :]
    return _difference(model, torch.stack(logits), wanted.float())


def _difference(
    model: PreTrainedModel, found: torch.Tensor, expected: torch.Tensor, own: float = 0.0
) -> str:
    """How logits differ from those that were expected; empty where it is rounding.

    Args:
        own: how far two of the model's own ways are apart.
    """
    # Rounding differs between the ways by some steps of the dtype, and by what the model makes of
    # them: as much as between its own two ways, with a cache and without.
    largest = expected.abs().max().item()
    eps = torch.finfo(model.dtype).eps  # some models give logits in float32
    own = min(own, max(_AMPLIFIED, eps) * largest)
    rounding = max(_tolerance(model.dtype) * largest, 4 * own)
    if (difference := (found.float() - expected).abs().max().item()) <= rounding:
        return ""
    return f"beside other rows its logits differ by {difference:.3g}"


def _refused(error: Exception) -> str:
    return f"it does not take a cache of ours: {type(error).__name__}: {first_line(error)}"


def _tolerance(dtype: torch.dtype) -> float:
    """How far results of one dtype may be apart, as a part of the largest."""
    eps = torch.finfo(dtype).eps
    return 64 * eps if eps < _AMPLIFIED / 64 else 8 * eps


def _same_states(model: PreTrainedModel, cache: RowCache, prompts: list[list[int]]) -> bool:
    """Whether the first states of the rows are those of their prompts, each read whole and alone.

    In half precision logits do not show it: a state is a small part of what makes them.
    """
    forward: Any = model
    alone = row_cache(model, rows=len(prompts), length=16)
    for row, prompt in enumerate(prompts):
        forward(**alone.whole_prompts(row, [prompt], model.device))
    for found, wanted in zip(cache.first_states(), alone.first_states(), strict=True):
        off = (found.float() - wanted.float()).flatten(1).norm(dim=1)
        allowed = max(_AMPLIFIED, 8 * torch.finfo(model.dtype).eps)
        if (off > allowed * wanted.float().flatten(1).norm(dim=1)).any():
            return False
    return True


def _alone(model: PreTrainedModel, row: list[int]) -> torch.Tensor:
    """The logits (vocabulary,) of the last token, as `generate` computes them."""
    forward: Any = model
    name, past = argument(model) or "", None
    for begin, end in ((0, len(row) - 2), (len(row) - 2, len(row) - 1), (len(row) - 1, len(row))):
        ids = torch.tensor([row[begin:end]], device=model.device)
        positions = torch.arange(begin, end, device=model.device)[None]
        out = forward(input_ids=ids, position_ids=positions, use_cache=True, **{name: past})
        if (past := out.get(name)) is None:
            raise ValueError("it returns no cache")
    return out.logits[0, -1]


def _at_once(model: PreTrainedModel, row: list[int]) -> torch.Tensor:
    """The same without a cache."""
    forward: Any = model
    return forward(input_ids=torch.tensor([row], device=model.device), use_cache=False).logits[
        0, -1
    ]
