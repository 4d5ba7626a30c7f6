"""Chat templates as files: where a tokenizer's `save_pretrained` leaves them, and where it looks.

A model, or an adapter, has one template, or several by name (`default`, `tool_use`, `rag`). They
are in `chat_template.jinja` and `additional_chat_templates/`, in older folders in
`tokenizer_config.json`, and a processor's in `chat_template.json`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from lorakit import atomic
from lorakit.errors import InputError

TEMPLATE_NAME = "chat_template.jinja"
ADDITIONAL = "additional_chat_templates"
PROCESSOR_NAME = "chat_template.json"
DEFAULT = "default"
_SETTINGS = "tokenizer_config.json"

Templates = str | dict[str, str]
"""One template, or several by name: what a tokenizer has as `chat_template`."""


def default_of(templates: Templates | None) -> str | None:
    """The template of conversations without tools; None where there is none."""
    return templates.get(DEFAULT) if isinstance(templates, dict) else templates


def digest(templates: Templates | None) -> str:
    """SHA-256 of the templates, as 64 hexadecimal digits; of nothing where there are none."""
    text = templates or ""
    if not isinstance(text, str):
        text = json.dumps(text, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def same_templates(one: Templates | None, other: Templates | None) -> bool:
    """Whether both write the same: Jinja drops a last newline, and knows one kind of newlines."""
    return _plain(one) == _plain(other)


def _plain(templates: Templates | None) -> dict[str, str]:
    named = templates if isinstance(templates, dict) else {DEFAULT: templates or ""}
    return {
        name: text.replace("\r\n", "\n").removesuffix("\n") for name, text in named.items() if text
    }


def read_templates(folder: str | Path) -> Templates | None:
    """The chat templates in a folder, read as transformers reads them; None where it has none."""
    folder = Path(folder)
    files = {DEFAULT: folder / TEMPLATE_NAME}
    if (more := folder / ADDITIONAL).is_dir():
        files |= {path.name.removesuffix(".jinja"): path for path in sorted(more.glob("*.jinja"))}
    found = {name: _text(path) for name, path in files.items() if path.is_file()}
    if not found:
        for name in (_SETTINGS, PROCESSOR_NAME):
            if (path := folder / name).is_file():
                found = _named(read_object(path).get("chat_template"))
            if found:
                break
    return found[DEFAULT] if found.keys() == {DEFAULT} else found or None


def template_in(path: str | Path) -> Templates:
    """The chat template in a file, or those in a folder.

    Raises:
        InputError: there is none.
    """
    path = Path(path)
    found = read_templates(path) if path.is_dir() else _text(path)
    if not found or (isinstance(found, str) and not found.strip()):
        raise InputError(f"chat_template: {path} holds no chat template: give a .jinja file")
    return found


def write_templates(folder: str | Path, templates: Templates) -> None:
    """Makes `templates` the only ones in a folder, of its tokenizer and its processor."""
    folder = Path(folder)
    named = templates if isinstance(templates, dict) else {DEFAULT: templates}
    for name in named:
        if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise InputError(f"a chat template is named {name!r}, which is not a file name")
    _remove_templates(folder)
    for name, text in named.items():
        if name == DEFAULT:
            atomic.write_file(folder / TEMPLATE_NAME, text)
        else:
            (folder / ADDITIONAL).mkdir(exist_ok=True)
            atomic.write_file(folder / ADDITIONAL / f"{name}.jinja", text)


def copy_additional(source: Path, folder: Path) -> None:
    """Copies the templates that stand in a folder of their own."""
    for path in sorted(source.glob(f"{ADDITIONAL}/*.jinja")):
        (folder / ADDITIONAL).mkdir(exist_ok=True)
        shutil.copyfile(path, folder / ADDITIONAL / path.name)


def _remove_templates(folder: Path) -> None:
    (folder / TEMPLATE_NAME).unlink(missing_ok=True)
    (folder / PROCESSOR_NAME).unlink(missing_ok=True)
    shutil.rmtree(folder / ADDITIONAL, ignore_errors=True)
    if (path := folder / _SETTINGS).is_file():
        values = read_object(path)
        if values.pop("chat_template", None) is not None:
            atomic.write_file(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def _named(templates: Any) -> dict[str, str]:
    """Templates by name, out of a JSON file's text, list of names and texts, or object."""
    if isinstance(templates, list):
        pairs = [(t.get("name"), t.get("template")) for t in templates if isinstance(t, dict)]
        templates = dict(pairs) if all(isinstance(name, str) for name, _ in pairs) else {}
    if isinstance(templates, str):
        templates = {DEFAULT: templates}
    if not isinstance(templates, dict):
        return {}
    return {name: text for name, text in templates.items() if isinstance(text, str) and text}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def read_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: it is not readable JSON") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} is damaged: it is not a JSON object")
    return values
