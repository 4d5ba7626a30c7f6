"""The layouts in which base models lie on disk: one file or folder each, and one line here."""

from __future__ import annotations

from pathlib import Path

from lorakit.models.layouts.chatglm import ChatGLM
from lorakit.models.layouts.gguf_file import GGUFFile
from lorakit.models.layouts.layout import ForeignLayout, Layout

LAYOUTS: list[type[Layout]] = [ChatGLM, GGUFFile]
"""The layouts beside transformers' own; the first that recognises the files reads them."""


def layout_of(path: Path) -> Layout:
    """The files at `path`, a folder or a file, in their layout."""
    return next((kind for kind in LAYOUTS if kind.recognises(path)), Layout)(path)


def foreign_layout(name: str | Path) -> ForeignLayout | None:
    """The model that `name` means, a folder or a cached hub id, if its layout is a foreign one."""
    path = Path(name).expanduser()
    if not path.is_dir() and isinstance(name, str) and name.count("/") == 1:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            cached = try_to_load_from_cache(name, "config.json")
        except HFValidationError:
            return None
        path = Path(cached).parent if isinstance(cached, str) else path
    found = layout_of(path)
    return found if isinstance(found, ForeignLayout) else None
