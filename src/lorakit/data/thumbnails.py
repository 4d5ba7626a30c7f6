"""Small copies of pictures for pages and records: text that a page can show by itself."""

from __future__ import annotations

import re
from io import BytesIO
from typing import TYPE_CHECKING, Any

from lorakit.data.conversations import IMAGE, Message
from lorakit.data.pictures import as_data_url, bytes_of, digest, is_data_url, open_picture
from lorakit.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

EDGE = 256
"""Pixels of a thumbnail's longer side."""

THUMBNAIL = "thumbnail"
"""The key of a recorded picture that holds its thumbnail."""

MOST_CHARACTERS = 100_000
"""Of a thumbnail that a page shows: more than any of this size has."""

_SAFE = re.compile(r"data:image/(?:jpeg|png|webp);base64,[A-Za-z0-9+/]+={0,2}")
_SIDEWAYS = range(5, 9)  # of EXIF's orientations


def thumbnail(source: str) -> str:
    """A JPEG of at most `EDGE` pixels a side as a `data:` URL, about 10 kB.

    Raises:
        InputError: the picture cannot be read.
    """
    image, _ = open_picture(source)
    image.thumbnail((EDGE, EDGE))
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return as_data_url(buffer.getvalue()).replace("data:image;", "data:image/jpeg;")


def is_thumbnail(value: Any) -> bool:
    """Whether a value of unknown origin is a small picture that a page may show."""
    return (
        isinstance(value, str)
        and len(value) <= MOST_CHARACTERS
        and _SAFE.fullmatch(value) is not None
    )


def pixel_size(source: str) -> tuple[int, int]:
    """Width and height of a picture as it is seen, by its header alone.

    Raises:
        InputError: the picture cannot be read.
    """
    from PIL import Image

    try:
        with Image.open(BytesIO(bytes_of(source))) as image:
            width, height = image.size
            turned = image.getexif().get(0x0112) in _SIDEWAYS
    except InputError:
        raise
    except Exception as error:  # what readers of damaged files raise is of any kind
        raise InputError(f"is damaged ({type(error).__name__}); save it again") from error
    return (height, width) if turned else (width, height)


def recorded(messages: Sequence[Message]) -> list[Message]:
    """Messages for a record: each picture by its place, or its hash, with a thumbnail."""
    return [
        {**message, "content": [_recorded(part) for part in message["content"]]}
        if isinstance(message["content"], list)
        else message
        for message in messages
    ]


def _recorded(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] != IMAGE:
        return part
    source = part[IMAGE]
    name = f"sha256:{digest(source)}" if is_data_url(source) else source
    return {"type": IMAGE, IMAGE: name, THUMBNAIL: thumbnail(source)}
