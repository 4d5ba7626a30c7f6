"""What a vision-language model's processor makes of pictures: its tokens and its tensors.

The processor is transformers' own. A tokenizer of a model that reads pictures carries its reader,
so that whoever renders and tokenises a conversation finds it there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorakit.errors import InputError, first_line

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from lorakit.models.picture_positions import PicturePositions

_ATTRIBUTE = "picture_reader"
_OF_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
_PLACES = "text_replacement_offsets"
_JOINTLY = "batch_num_images"
"""Processors with this output (LLaVA-OneVision) cut a row's only picture into tiles, and none of
several."""


@dataclass(frozen=True)
class Expanded:
    """A text with every picture's tokens in it.

    Attributes:
        before: the characters [begin, end) of what stood for each picture in the text before.
        places: those of its tokens.
    """

    text: str
    before: list[tuple[int, int]]
    places: list[tuple[int, int]]

    def moved(self, at: int) -> int:
        """Where the character `at` of the text before is now; it is not inside of a picture."""
        ends = [(old, new) for (_, old), (_, new) in zip(self.before, self.places, strict=True)]
        behind = [new - old for old, new in ends if old <= at]
        return at + (behind[-1] if behind else 0)


class PictureReader:
    """A model's processor, as rows and batches use it.

    Args:
        processor: transformers', with an `image_processor` and an `image_token`.
        dtype: of the model; pixels are given in it. None leaves them as the processor makes them.

    Attributes:
        token: what a chat template writes where a picture stands.
        positions: of the tokens of rows, for models where these have three dimensions.
    """

    positions: PicturePositions | None = None

    def __init__(self, processor: Any, dtype: torch.dtype | None = None) -> None:
        self.processor, self._dtype = processor, dtype
        self.token = str(processor.image_token)
        if processor.tokenizer.pad_token is None:  # texts of several rows are padded
            processor.tokenizer.pad_token = processor.tokenizer.eos_token

    def expand(self, text: str, images: Sequence[Image]) -> Expanded:
        """`text` with the tokens of `images` in the place of each `token`.

        Raises:
            InputError: the processor cannot use a picture.
        """
        made = self._run([text], [images], return_text_replacement_offsets=True)
        [found] = made[_PLACES]
        pieces, at = [], 0
        for one in found:
            (begin, end), new = one["span"], one["replacement"]
            pieces += [text[at:begin], new]
            at = end
        before, places = ([tuple(one[key]) for one in found] for key in ("span", "new_span"))
        return Expanded("".join([*pieces, text[at:]]), before, places)

    def reads_alone(self, images: Sequence[Image], first: int) -> bool:
        """Whether the first pictures of a row become the same tokens without the others."""
        whole, part = (
            self.expand(self.token * len(some), some).text for some in (images, images[:first])
        )
        return whole.startswith(part)

    def tensors(self, rows: Sequence[Sequence[Image]]) -> dict[str, torch.Tensor]:
        """What the model is given of the pictures of rows beside tokens, such as `pixel_values`.

        Args:
            rows: of each row its pictures, at least one.
        """
        if _JOINTLY not in self.processor.image_processor.model_input_names:
            rows = [[image for images in rows for image in images]]
        texts = [self.token * len(images) for images in rows]
        made = self._run(texts, rows, return_tensors="pt", padding=True)
        return {
            name: x.to(self._dtype) if self._dtype and x.is_floating_point() else x
            for name, x in made.items()
            if name not in (*_OF_TEXT, _PLACES)
        }

    def kinds(self, input_ids: Sequence[int]) -> dict[str, list[int]]:
        """Which tokens are of pictures, by the name that the model gives it; empty if it does not.

        Rows of text in a batch beside these have zeros there.
        """
        if not self.processor.return_mm_token_type_ids:
            return {}
        own = self.processor.create_mm_token_type_ids([list(input_ids)])[0]
        names = self.processor.model_input_names
        name = "token_type_ids" if "token_type_ids" in names else "mm_token_type_ids"
        return {name: [int(kind) for kind in own]}

    def _run(self, texts: list[str], rows: Sequence[Sequence[Image]], **options: Any) -> Any:
        try:
            return self.processor(text=texts, images=[list(one) for one in rows], **options)
        except (ValueError, TypeError, IndexError, RuntimeError, ZeroDivisionError) as error:
            kind = type(self.processor).__name__
            raise InputError(f"{kind} cannot use the picture: {first_line(error)}") from error


def picture_reader(processor: Any, dtype: torch.dtype | None = None) -> PictureReader | str:
    """The reader of a processor, or why there is none; arguments as in `PictureReader`."""
    kind = type(processor).__name__
    if not hasattr(processor, "get_text_with_replacements"):
        return "the installed transformers does not say where pictures' tokens are: upgrade it"
    if getattr(processor, "image_token", None) is None or not hasattr(processor, "image_processor"):
        return f"{kind} has no token that stands for a picture"
    return PictureReader(processor, dtype)


def reader_of(tokenizer: Any) -> PictureReader | None:
    """How the model of `tokenizer` reads pictures; None where it does not."""
    found = getattr(tokenizer, _ATTRIBUTE, None)
    return found if isinstance(found, PictureReader) else None


def why_unread(tokenizer: Any) -> str:
    """Why the model of `tokenizer` reads no pictures."""
    found = getattr(tokenizer, _ATTRIBUTE, None)
    return found or "the model reads text alone: give a vision-language model"


def give_reader(tokenizer: Any, reader: PictureReader | str | None) -> None:
    """Lets `tokenizer` carry the reader, or the reason why there is none."""
    if reader is not None:
        setattr(tokenizer, _ATTRIBUTE, reader)


def pass_reader(source: Any, target: Any) -> None:
    """Lets a tokenizer that takes the place of another one carry the same reader."""
    give_reader(target, getattr(source, _ATTRIBUTE, None))
