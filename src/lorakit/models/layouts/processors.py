"""The processor of a model that reads pictures, also where torchvision is not installed.

Without torchvision, transformers resizes pictures with Pillow, which the processors below need not
know: a part for videos is left out, and Pixtral's processor takes from Pillow's module the one
function for which it asks for torchvision's.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from lorakit.models.template_files import read_object
from lorakit.models.torchvision_build import torchvision_trouble

_NAMES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


def has_processor(folder: Path) -> bool:
    """Whether the files in `folder` say how pictures are read."""
    return any((folder / name).is_file() for name in _NAMES[:2])


def load_processor(folder: Path, load: Callable[[Any], Any]) -> Any:
    """The processor in `folder`; without torchvision, one that reads no videos.

    Args:
        load: calls the `from_pretrained` of one of transformers' classes on the folder.

    Raises what `load` does, and ImportError where torchvision is needed or does not load.
    """
    try:
        from transformers import AutoProcessor

        return load(AutoProcessor)
    except (ImportError, ValueError, AttributeError, OSError, RuntimeError) as error:
        if trouble := torchvision_trouble():
            raise ImportError(trouble) from error
        if importlib.util.find_spec("torchvision"):
            raise
        if (kind := _kind(folder)) is None:
            raise
    parameters = inspect.signature(kind.__init__).parameters
    own = read_object(folder / _NAMES[0]) if (folder / _NAMES[0]).is_file() else {}
    plain = {k: v for k, v in own.items() if k in parameters and not isinstance(v, dict)}
    parts = {name: _part(name, load) for name in kind.get_attributes()}
    return _without_videos(kind)(**{**plain, **parts})


def _part(name: str, load: Callable[[Any], Any]) -> Any:
    """A processor's part by the name of its argument."""
    import transformers

    if "video" in name:
        return _NoVideos()
    kinds = {"image": "AutoImageProcessor", "tokenizer": "AutoTokenizer"}
    kind = next((kind for word, kind in kinds.items() if word in name), "AutoFeatureExtractor")
    return load(getattr(transformers, kind))


def _kind(folder: Path) -> Any:
    """The class that the files name; None where they name none of transformers'."""
    import transformers

    for name in _NAMES:
        if (folder / name).is_file() and (
            kind := read_object(folder / name).get("processor_class")
        ):
            return _behind_placeholder(getattr(transformers, str(kind), None))
    return None


def _behind_placeholder(kind: Any) -> Any:
    """The class for which transformers gives a placeholder without torchvision.

    Pixtral's is complete but for a function from the module of its image processor, which Pillow's
    module has too; of others that module is missing.
    """
    if not getattr(kind, "is_dummy", False):
        return kind
    package, _, name = kind.__module__.rpartition(".")
    images = name.replace("processing_", "image_processing_", 1)
    pillow = images.replace("image_processing_", "image_processing_pil_", 1)
    try:
        with _in_place_of(f"{package}.{images}", importlib.import_module(f"{package}.{pillow}")):
            return getattr(importlib.import_module(kind.__module__), kind.__name__)
    except ImportError:
        return None


@contextmanager
def _in_place_of(name: str, module: ModuleType) -> Iterator[None]:
    """Within the block, imports of the module `name` find `module`."""
    sys.modules[name] = module
    try:
        yield
    finally:
        del sys.modules[name]


class _NoVideos:
    """In the place of a processor's part for videos; each of its settings is None."""

    model_input_names: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


def _without_videos(kind: Any) -> Any:
    """The class `kind`, which lets its video processor be missing."""

    def check(self: Any, name: str, argument: Any) -> Any:
        if isinstance(argument, _NoVideos):
            return None
        return kind.check_argument_for_proper_class(self, name, argument)

    return type(kind.__name__, (kind,), {"check_argument_for_proper_class": check})
