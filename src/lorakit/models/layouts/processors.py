"""The processor of a model that reads pictures, also where its part for videos cannot be loaded."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorakit.models.template_files import read_object

_NAMES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


def has_processor(folder: Path) -> bool:
    """Whether the files in `folder` say how pictures are read."""
    return any((folder / name).is_file() for name in _NAMES[:2])


def load_processor(folder: Path, load: Callable[[Any], Any]) -> Any:
    """The processor in `folder`; without torchvision, one that reads no videos.

    Args:
        load: calls the `from_pretrained` of one of transformers' classes on the folder.
    """
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    try:
        return load(AutoProcessor)
    except (ImportError, ValueError, AttributeError, OSError):
        if importlib.util.find_spec("torchvision") or (kind := _kind(folder)) is None:
            raise
    parameters = inspect.signature(kind.__init__).parameters
    if "video_processor" not in parameters:
        return load(AutoProcessor)  # raises what it raised
    own = read_object(folder / _NAMES[0]) if (folder / _NAMES[0]).is_file() else {}
    plain = {k: v for k, v in own.items() if k in parameters and not isinstance(v, dict)}
    parts = {"image_processor": load(AutoImageProcessor), "tokenizer": load(AutoTokenizer)}
    return _without_videos(kind)(**{**plain, **parts, "video_processor": None})


def _kind(folder: Path) -> Any:
    """The class that the files name; None where they name none of transformers'."""
    import transformers

    for name in _NAMES:
        if (folder / name).is_file() and (
            kind := read_object(folder / name).get("processor_class")
        ):
            return getattr(transformers, str(kind), None)
    return None


def _without_videos(kind: Any) -> Any:
    """The class `kind`, which lets its video processor be missing."""

    def check(self: Any, name: str, argument: Any) -> Any:
        return (
            None if argument is None else kind.check_argument_for_proper_class(self, name, argument)
        )

    return type(kind.__name__, (kind,), {"check_argument_for_proper_class": check})
