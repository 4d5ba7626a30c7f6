"""The pictures of a chat: found in its messages, fetched where that is allowed, and looked at.

What is wrong with a picture is its own request's error, 400 with OpenAI's code and the picture's
place. Bytes, format and pixels are looked at before anything is decoded.
"""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Any

from lorakit.data.conversations import IMAGE, Message, pictures_of
from lorakit.data.fetched_pictures import HostRefusedError, fetch, is_address
from lorakit.data.pictures import as_data_url, bytes_of, open_picture
from lorakit.errors import InputError
from lorakit.server.errors import ApiError, bad_field, in_words
from lorakit.server.fair_turns import Turns
from lorakit.server.options import Limits

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
"""Those of OpenAI's API; readers of rarer formats are not tried on what strangers send."""

_FETCHED_AT_ONCE = 8
_SCAN = b"\xff\xda"
_SCANS = 40
"""Of a JPEG, each of which takes as long to decode as all of a plain one; usual are up to ten."""

_PIXELS_A_CHARACTER = 20
"""Work on so many pixels takes its turn as work on a character of text does."""


@dataclass(frozen=True)
class Place:
    """A picture of a request, and where it stands there."""

    message: int
    part: int
    url: str

    def error(self, message: str, code: str) -> ApiError:
        """400 for this picture."""
        return bad_field(message, self.param, code)

    @property
    def param(self) -> str:
        return in_words(("messages", self.message, "content", self.part))


def places_of(messages: Sequence[Message]) -> list[Place]:
    """The pictures in messages as chat templates know them."""
    return [
        Place(number, at, part[IMAGE])
        for number, message in enumerate(messages)
        if isinstance(message["content"], list)
        for at, part in enumerate(message["content"])
        if part["type"] == IMAGE
    ]


def without_pictures(messages: Sequence[Message]) -> list[Message]:
    """The same with nothing but places where pictures are, which is all that a template reads."""
    return _with(messages, iter(lambda: "picture", None))


class Images:
    """What a server takes of pictures.

    Args:
        fetch_from: the hosts that pictures are fetched from; empty for every public one, None for
            none at all.
    """

    def __init__(self, limits: Limits, fetch_from: Sequence[str] | None) -> None:
        self._limits, self._hosts = limits, fetch_from
        self._turns = Turns("lorakit-images")
        self._fetching = ThreadPoolExecutor(_FETCHED_AT_ONCE, "lorakit-fetch")

    async def taken(self, messages: Sequence[Message], client: str) -> tuple[list[Message], int]:
        """The messages with pictures as data URLs, and how many pixels these have.

        Raises:
            ApiError: 400, a picture is none, is too large or cannot be fetched, or there are too
                many.
        """
        places = places_of(messages)
        if len(places) > self._limits.images:
            raise bad_field(
                f"there are {len(places)} pictures, and at most {self._limits.images} are taken",
                "messages",
                "too_many_images",
            )
        urls = await asyncio.gather(*map(self._url, places))
        found = [Place(p.message, p.part, url) for p, url in zip(places, urls, strict=True)]
        pixels = await self._turns.run(
            partial(_looked_at, found, self._limits), sum(map(len, urls)) // 8, client
        )
        return _with(messages, iter(urls)), pixels

    async def in_turn(self, work: Any, pixels: int, client: str) -> Any:
        """The result of `work` on pictures, in a thread, when it has its turn."""
        return await self._turns.run(work, pixels // _PIXELS_A_CHARACTER, client)

    async def _url(self, place: Place) -> str:
        if place.url[:5].lower() == "data:":
            if len(place.url) > 2 * self._limits.image_bytes:
                raise place.error(_too_many_bytes(self._limits), "image_file_too_large")
            return place.url
        if not is_address(place.url):
            raise place.error(
                "a picture is a data URL (data:image/png;base64,...) or an address of the web",
                "invalid_image_url",
            )
        if self._hosts is None:
            raise place.error(
                "pictures are not fetched from the web here: send a data URL, or start "
                "lorakit serve with --fetch-images",
                "invalid_image_url",
            )
        work = partial(fetch, place.url, self._hosts, self._limits.image_bytes)
        try:
            data = await asyncio.get_running_loop().run_in_executor(self._fetching, work)
        except HostRefusedError as error:  # what names mean in the server's network is not told
            reason = "the picture is at a host that this server does not ask: send a data URL"
            raise place.error(reason, "failed_to_download_image") from error
        except InputError as error:
            raise place.error(f"the picture {error}", "failed_to_download_image") from error
        return as_data_url(data)


def broken(messages: Sequence[Message], error: InputError) -> ApiError:
    """What is told of pictures of which one could not be used; slow, as each is tried again."""
    for place in places_of(messages):
        try:
            open_picture(place.url)
        except InputError as reason:
            return place.error(f"the picture {reason}", "image_parse_error")
    return bad_field(str(error), "messages", "invalid_image")


def _with(messages: Sequence[Message], pictures: Iterator[str]) -> list[Message]:
    """The messages with other pictures in the places of their own."""
    return [
        {
            **message,
            "content": [
                {**part, IMAGE: next(pictures)} if part["type"] == IMAGE else part
                for part in message["content"]
            ],
        }
        if pictures_of(message["content"])
        else message
        for message in messages
    ]


def _looked_at(places: Sequence[Place], limits: Limits) -> int:
    """How many pixels pictures have, by their headers. Raises ApiError, as `taken`."""
    from PIL import Image, UnidentifiedImageError

    pixels = 0
    for place in places:
        try:
            data = bytes_of(place.url)
        except InputError as error:
            raise place.error(f"the picture: {error}", "invalid_base64_image") from error
        if not data:
            raise place.error("the picture has no bytes", "empty_image_file")
        if len(data) > limits.image_bytes:
            raise place.error(_too_many_bytes(limits), "image_file_too_large")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # its size is looked at below
                with Image.open(BytesIO(data), formats=FORMATS) as image:
                    (width, height), kind = image.size, image.format
                    pixels += width * height
                    animated = kind != "MPO" and getattr(image, "is_animated", False)
        except UnidentifiedImageError as error:
            raise place.error(
                f"the picture is not of the formats {', '.join(FORMATS)}, or is damaged",
                "unsupported_image_media_type",
            ) from error
        except Image.DecompressionBombError as error:
            raise place.error(_too_many_pixels(limits), "image_too_large") from error
        except Exception as error:  # what readers of damaged files raise is of any kind
            raise place.error(
                f"the picture is damaged ({type(error).__name__}): save it again",
                "image_parse_error",
            ) from error
        if pixels > limits.image_pixels:
            raise place.error(_too_many_pixels(limits), "image_too_large")
        if data.count(_SCAN) > _SCANS:
            raise place.error(
                "the picture is a JPEG in too many scans: save it anew", "image_parse_error"
            )
        if animated:
            raise place.error("the picture is animated: send one frame", "invalid_image_format")
    return pixels


def _too_many_bytes(limits: Limits) -> str:
    return (
        f"the picture has more than the {limits.image_bytes:,} bytes that are taken: make it "
        "smaller"
    )


def _too_many_pixels(limits: Limits) -> str:
    return (
        f"pictures of a request may have {limits.image_pixels:,} pixels together, and these have "
        "more: make them smaller"
    )
