"""Pictures that rows name: where one is, what may be read, and its pixels in RGB.

A picture is kept as a text, an absolute path or a `data:` URL, so that a message with it stays
plain JSON; it is decoded when its pixels are needed. Files are read in the folder of the data
alone, or in the one that `data.media_dir` names, whatever `..` and symbolic links say; addresses
of the web become files where `data.fetch_images` allows it (`data.fetched_pictures`).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from lorakit.data.fetched_pictures import is_address, kept, shown
from lorakit.errors import InputError, did_you_mean, one_line

if TYPE_CHECKING:
    from PIL.Image import Image

    from lorakit.data.sources import Row

MOST_BYTES = 64 * 2**20
"""Of a picture's file: more than cameras write, and less than fills the memory."""

MOST_PIXELS = 100_000_000
"""Of a picture: a few kilobytes of PNG can claim billions."""

_DATA_URL = re.compile(r"data:[^,]{0,200}?(;base64)?,", re.IGNORECASE)
_FIRST_FRAME, _TRANSPARENT, _DEEP, _CUT_OFF = (
    "animated: their first frame is read",
    "transparent: they are laid on white",
    "of 16 bits a channel: they are read with 8",
    "cut off at the end of the file: all pixels are there, and they are read",
)


@dataclass(frozen=True)
class Reachable:
    """Where pictures of rows may be.

    Attributes:
        folder: where files are looked for; None is the folder of each data file.
        fetch: whether addresses of the web are fetched; or the hosts that alone are asked.
    """

    folder: Path | None = None
    fetch: bool | Sequence[str] = False


_BESIDE_DATA = Reachable()

_reachable: ContextVar[Reachable] = ContextVar("reachable_pictures", default=_BESIDE_DATA)


@contextmanager
def pictures_in(
    folder: str | Path | None = None, fetch: bool | Sequence[str] = False
) -> Iterator[None]:
    """Within the block, pictures are where `Reachable` says.

    Raises:
        InputError: it is no folder.
    """
    place = None if folder is None else Path(folder).expanduser()
    if place is not None and not place.is_dir():
        raise InputError(f"data.media_dir: {place} is not a folder; check the path")
    token = _reachable.set(Reachable(place, fetch))
    try:
        yield
    finally:
        _reachable.reset(token)


def reachable() -> Reachable:
    """What `pictures_in` says here."""
    return _reachable.get()


def source_of(row: Row, value: Any, what: str) -> str:
    """The picture that a value in a row means, as an absolute path or a `data:` URL.

    Args:
        value: a path (relative to the data's folder), a `file:` or `data:` URL, the bytes of a
            file, `{"bytes": …, "path": …}` (the form of `datasets`), or a Pillow image.

    Raises:
        InputError: it is none of these, the file is missing, or lies outside the data's folder.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, (bytes, bytearray)):
        return as_data_url(bytes(value))
    if hasattr(value, "tobytes") and hasattr(value, "getexif"):
        return _of_pillow(value)
    if not isinstance(value, str) or not value.strip():
        found = "empty" if isinstance(value, str) else f"of the type {type(value).__name__}"
        raise row.error(f"{what} is {found}; expected the path of a picture, or a data URL")
    if value[:5].lower() == "data:":
        if not _DATA_URL.match(value):
            raise row.error(f"{what} is a data URL without a comma; expected data:image/…;base64,…")
        return value
    if is_address(value):
        return _from_web(row, value, what)
    return str(_inside(row, value, what))


def _from_web(row: Row, url: str, what: str) -> str:
    """The file of a picture of the web, which is fetched if `fetch_images` allows it."""
    fetch = _reachable.get().fetch
    if fetch is False:
        raise row.error(
            f"{what} is an address of the web ({shown(url)}), and none is fetched unless asked: "
            "set data.fetch_images=true (--fetch-images), or give the path of a file"
        )
    try:
        return str(kept(url, () if fetch is True else fetch, check=decoded))
    except InputError as error:
        raise row.error(f"{what} ({shown(url)}) {error}") from error


def _inside(row: Row, value: str, what: str) -> Path:
    """The file that a path means, if it lies in the folder of the data or in `media_dir`."""
    if value[:7].lower() == "file://":
        value = unquote(urlsplit(value).path)
    root = _reachable.get().folder or row.path.parent
    name = one_line(value[:120])
    if "\0" in value:
        raise row.error(f"{what} holds a NUL character; remove it")
    try:
        file, folder = (root / value).resolve(), root.resolve()
        if not file.is_relative_to(folder):
            raise row.error(
                f"{what}: {name} lies outside {root or '.'}, the folder that pictures are read in; "
                "move it there, or name its folder in data.media_dir"
            )
        if not file.is_file():
            siblings = [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else []
            why = "is a folder" if file.is_dir() else "no such picture"
            hint = did_you_mean(file.name, siblings) or f"; check the path, from {folder} on"
            raise row.error(f"{what}: {name}: {why}{hint}")
    except InputError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # too long a name, links in a circle
        raise row.error(f"{what}: {name} cannot be looked for ({error})") from error
    return file


def as_data_url(data: bytes) -> str:
    """The bytes of a picture's file as a `data:` URL."""
    return f"data:image;base64,{base64.b64encode(data).decode()}"


def _of_pillow(image: Any) -> str:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return as_data_url(buffer.getvalue())


def bytes_of(source: str) -> bytes:
    """The bytes of a picture's file.

    Raises:
        InputError: they cannot be read, or there are too many.
    """
    try:
        if match := _DATA_URL.match(source):
            if len(source) > 2 * MOST_BYTES:
                raise InputError(f"more than {MOST_BYTES >> 20} MiB; make it smaller")
            content = source[match.end() :]
            if match[1]:
                # Encoders break lines, and some leave the padding out.
                digits = "".join(unquote(content).split()).rstrip("=")
                return base64.b64decode(digits + "=" * (-len(digits) % 4), validate=True)
            return unquote_to_bytes(content)
        with Path(source).open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except binascii.Error as error:
        raise InputError("its base64 is damaged; encode it again") from error
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror or error})") from error
    if len(data) > MOST_BYTES:
        raise InputError(f"more than {MOST_BYTES >> 20} MiB; make it smaller")
    return data


def digest(source: str) -> str:
    """SHA-256 of a picture's file, as 64 hexadecimal digits."""
    return hashlib.sha256(bytes_of(source)).hexdigest()


def is_data_url(source: str) -> bool:
    """Whether a picture stands in its source itself."""
    return _DATA_URL.match(source) is not None


def label(source: str) -> str:
    """What a picture is called in messages."""
    return "a data URL" if is_data_url(source) else one_line(Path(source).name)


def open_picture(source: str) -> tuple[Image, list[str]]:
    """A picture as `decoded`, from its file or `data:` URL."""
    return decoded(bytes_of(source))


def decoded(data: bytes) -> tuple[Image, list[str]]:
    """A picture in RGB, upright as its EXIF data says, and what was done to it beside that.

    Transparent pixels are laid on white, 16 bits become 8, and of an animation the first frame is
    read; CMYK and palettes are converted. A file that is cut off behind its last pixel is read,
    one that lacks pixels is damaged.

    Args:
        data: of a picture's file.

    Raises:
        InputError: it is damaged, no picture, or too large; or Pillow is not installed.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise InputError("pictures need Pillow: pip install 'lorakit[pictures]'") from error
    done = list[str]()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow warns of is looked at below
            with Image.open(BytesIO(data)) as image:
                width, height = image.size
                if width * height > MOST_PIXELS:
                    raise InputError(
                        f"has {width:,} x {height:,} pixels, and at most {MOST_PIXELS:,} are read; "
                        "make it smaller"
                    )
                if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                    done.append(_FIRST_FRAME)
                if _is_cut_off(data, image.format):
                    done.append(_CUT_OFF)
                upright = ImageOps.exif_transpose(image)
                return _in_rgb(upright, done), done
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError("is not a picture, or of a format that Pillow does not read") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"has more than {MOST_PIXELS:,} pixels; make it smaller") from error
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError) as error:
        raise InputError(f"is damaged ({one_line(str(error))[:100]}); save it again") from error
    except Exception as error:  # readers of rare formats raise errors of their own
        raise InputError(f"cannot be read ({type(error).__name__}); save it again") from error


def _is_cut_off(data: bytes, format: str | None) -> bool:
    """Whether a file lacks the mark of its end.

    Of these formats Pillow stops at the last pixel and looks for none behind it; others that lack
    a byte are damaged to it.
    """
    if format == "PNG":
        return b"IEND\xaeB`\x82" not in data  # with its check sum
    return format == "GIF" and not data.rstrip(b"\0").endswith(b";")


def _in_rgb(image: Image, done: list[str]) -> Image:
    import PIL.Image

    image.load()
    if image.mode.startswith("I") or image.mode == "F":
        return _of_wide_pixels(image, done).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        opaque = image.convert("RGBA")
        if opaque.getchannel("A").getextrema() != (255, 255):
            done.append(_TRANSPARENT)
        white = PIL.Image.new("RGBA", opaque.size, (255, 255, 255, 255))
        return PIL.Image.alpha_composite(white, opaque).convert("RGB")
    return image.convert("RGB")


def _of_wide_pixels(image: Image, done: list[str]) -> Image:
    """A grey picture of 16 or 32 bits with 8, which Pillow would cut off at 255."""
    import numpy as np
    import PIL.Image

    pixels = np.asarray(image)
    if image.mode == "F" or pixels.min(initial=0) < 0 or pixels.max(initial=0) > 65535:
        raise InputError(
            "has pixels that are no whole numbers of 8 or 16 bits; convert it to 8 bits"
        )
    if image.mode == "I" and pixels.max(initial=0) <= 255:
        return PIL.Image.fromarray(pixels.astype(np.uint8))
    done.append(_DEEP)
    return PIL.Image.fromarray((pixels.astype(np.uint32) >> 8).astype(np.uint8))
