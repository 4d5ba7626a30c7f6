"""The chat template that an adapter was trained with, beside the one that its base has now.

A run keeps its template in the adapter's folder, and its digest in `lorakit.json`. Whatever asks,
merges or exports an adapter takes the template from here, with the notice where the two differ: a
base may be updated on the hub, its tokenizer replaced, its template edited.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.adapters.manifest import read_record
from lorakit.data.templates import PLAIN_TEMPLATE
from lorakit.errors import InputError
from lorakit.models.names import resolve
from lorakit.models.template_files import (
    TEMPLATE_NAME,
    Templates,
    default_of,
    digest,
    read_templates,
    same_templates,
)


@dataclass(frozen=True)
class AdapterTemplate:
    """What an adapter's folder says of its chat template.

    `own` are the templates that lie there, `sha256` is the recorded digest of those that it was
    trained with; None where the folder does not say.
    """

    folder: Path
    own: Templates | None
    sha256: str | None

    @property
    def digest(self) -> str | None:
        """Of the templates that it is asked with, where the folder says which these are."""
        return digest(self.own) if self.own is not None else self.sha256

    def notice(self, base: str, present: Templates | None) -> str:
        """The notice for the base model `base`, whose own templates are now `present`; or ""."""
        return ". ".join(self.difference(base, present))

    def difference(self, base: str, present: Templates | None) -> tuple[str, ...]:
        """The same in two parts: what differs, and what is done or can be done about it."""
        place = self.folder / TEMPLATE_NAME
        if self.own is None:
            if self.sha256 in (None, digest(present)):
                return ()
            return (
                f"{self.folder} was trained with another chat template ({_short(self.sha256)}) "
                f"than {base} has now ({_shown(present)})",
                "It keeps no copy of it, so the base's is used and answers may be worse: put the "
                f"old template into {place}",
            )
        if self.sha256 not in (None, digest(self.own)):
            other = "the same" if same_templates(self.own, present) else "another one"
            return (
                f"the chat template of {self.folder} ({_shown(self.own)}) is not the one that it "
                f"was trained with ({_short(self.sha256)}); {base} has {other}",
                f"Answers may be worse: put the old template into {place}",
            )
        if same_templates(self.own, present) or (present is None and self._made_up):
            return ()
        return (
            f"{self.folder} was trained with another chat template ({_shown(self.own)}) than "
            f"{base} has now ({_shown(present)})",
            f"The adapter's own is used; to use the base's, remove the one in {self.folder}",
        )

    @property
    def _made_up(self) -> bool:
        """Whether a base without a template is nothing new."""
        return self.sha256 is None or str(default_of(self.own)).endswith(PLAIN_TEMPLATE)


def adapter_template(folder: str | Path) -> AdapterTemplate:
    """What the adapter's folder says of its chat template; InputError for a damaged file."""
    record = read_record(folder)
    sha256 = record.template_sha256 if record else None
    return AdapterTemplate(Path(folder), read_templates(folder), sha256)


def use_template(tokenizer: Any, folder: str | Path, base: str, present: Templates | None) -> str:
    """Gives `tokenizer` the chat template that the adapter in `folder` is asked with.

    Returns: a notice where it was trained with other templates than `present`, those of the
    tokenizer of `base`; or "".
    """
    trained = adapter_template(folder)
    tokenizer.chat_template = present if trained.own is None else trained.own
    return trained.notice(base, present)


def template_notice(folder: str | Path, base: str | None) -> str:
    """As `AdapterTemplate.notice`, from the base's files; "" where they are not on this machine."""
    trained = adapter_template(folder)
    if base is None or trained.digest is None:
        return ""
    known, present = present_templates(base)
    return trained.notice(base, present) if known else ""


def present_templates(base: str) -> tuple[bool, Templates | None]:
    """Whether the files of `base` are on this machine, and the chat templates in them."""
    try:
        return True, resolve(base, as_it_is=True).layout.templates()
    except InputError:
        return False, None


@dataclass(frozen=True)
class ExportedTemplate:
    """The chat template of an adapter whose new files do not hold the base's.

    `own` are the adapter's; `differs` says that a program must be given its default one, as that
    of the base is another or not known; `notices` are the user's.
    """

    own: Templates | None
    differs: bool
    notices: tuple[str, ...]


def exported_template(folder: str | Path, base: str, hint: str) -> ExportedTemplate:
    """What an export of the adapter in `folder` does about its chat template.

    Args:
        hint: the notice where the program must be given the adapter's template.
    """
    trained = adapter_template(folder)
    known, present = present_templates(base)
    parts = trained.difference(base, present) if known else ()
    default = default_of(trained.own)
    differs = default is not None and not (known and same_templates(default, default_of(present)))
    # The hint tells which one is used.
    notices = (*parts[:1], hint) if differs else (". ".join(parts),) if parts else ()
    return ExportedTemplate(trained.own, differs, notices)


def common_template(
    folders: Sequence[Path], notices: list[str]
) -> tuple[Templates | None, str | None]:
    """The templates of several adapters, and their digest; the first's where they differ.

    Args:
        notices: gets a line where they differ.
    """
    found = [adapter_template(folder) for folder in folders]
    if len({template.digest for template in found}) > 1:
        notices.append(
            f"the adapters were trained with different chat templates: that of {folders[0]} is "
            "carried along"
        )
    return found[0].own, found[0].sha256


def _shown(templates: Templates | None) -> str:
    return "none" if not templates else _short(digest(templates))


def _short(sha256: str | None) -> str:
    return f"sha256 {str(sha256)[:12]}"
