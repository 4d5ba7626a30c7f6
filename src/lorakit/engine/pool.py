"""The adapters that an engine may serve: names, folders, versions, and what of them is in memory.

An adapter is checked against the base when it is registered; its factors stay in memory up to a
limit, the least recently used are read again when they are asked for. Registering a name again
publishes a new version: whoever has the old one goes on with it. Everything is read from a private
copy of the folder, and nothing in memory is a page of a file.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from lorakit.adapters.adapter_tokenizer import own_tokenizer, require_same_pipeline
from lorakit.adapters.chat_template import use_template
from lorakit.adapters.joined import NotJoinableError, joined_copy
from lorakit.adapters.private_copy import PrivateCopy
from lorakit.data.bounded_templates import TemplateTimeoutError
from lorakit.engine.adapter_reader import AdapterReader, AloneError, Loaded, structure_of
from lorakit.engine.outputs import TEXT, Outputs
from lorakit.engine.sampling import Ending, ending
from lorakit.errors import InputError, LorakitError, did_you_mean, first_line, listed
from lorakit.lora.vocabulary import vocabulary_size
from lorakit.models.classifier_form import ClassifierForm
from lorakit.models.picture_reader import pass_reader
from lorakit.openmp import released_afterwards

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LEAST_LIMIT = 1 << 30
"""Bytes that a file of weights may have, however small the base is."""


class UnknownModelError(InputError):
    """No adapter has the name that was asked for, or none any more."""


@dataclass(frozen=True)
class AdapterInfo:
    """A registered adapter.

    Attributes:
        rank: the largest of its modules'.
        size: of its values in memory, in bytes.
        version: how often the name has been registered.
        loaded: whether it is in memory now.
        notice: what its user should know; mostly empty.
        outputs: what it gives: text, or numbers.
        owner: whose it is alone; empty where it is everyone's.
    """

    name: str
    folder: Path
    base_model: str
    rank: int
    size: int
    version: int = 1
    loaded: bool = True
    notice: str = ""
    outputs: Outputs = TEXT
    owner: str = ""


@dataclass(frozen=True, eq=False)
class Version:
    """One version of an adapter. Requests hold it for as long as they need it."""

    info: AdapterInfo
    key: str  # its name in the bank
    tokenizer: PreTrainedTokenizerBase = field(repr=False)  # with the adapter's chat template
    ending: Ending
    root: Path | None  # what the folder must lie below
    digest: str  # of the folder's files


class AdapterPool:
    """Adapters of one base model by name.

    Args:
        model: the base that they are for, without adapters; it is read here and never changed.
        base_model: its name.
        fingerprint: of its weights, to notice an adapter of others; None where it is not known.
        limit: how many bytes of adapters may stay in memory.
        form: the base in its form for sequence classification, where adapters may be for that.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        base_model: str,
        fingerprint: str | None,
        limit: int,
        form: ClassifierForm | None = None,
    ) -> None:
        self._model: Any = structure_of(model)  # as others wrap modules of the model itself
        self._reader = AdapterReader(self._model, base_model, fingerprint, form)
        self._tokenizer, self._base_model = tokenizer, base_model
        self._limit = limit
        self._versions: dict[str, Version] = {}
        self._registered: dict[str, int] = {}
        self._keys = count()
        self._loaded: OrderedDict[Version, Loaded] = OrderedDict()
        self._lock = Lock()
        self.closed_because = ""
        """Why no adapter can be registered, if none can."""

    def register(
        self, name: str, folder: str | Path, root: Path | None = None, owner: str = ""
    ) -> AdapterInfo:
        """Makes the adapter in `folder` available as `name`, in a new version if there is one.

        Args:
            root: what the folder, relative to it or absolute, and its files must lie below.
            owner: whose it is alone.

        Raises:
            InputError: the folder holds no adapter, or one that this base cannot serve.
            LorakitError: it cannot be copied.
        """
        if self.closed_because:
            raise InputError(self.closed_because)
        if not name or name == self._base_model:
            raise InputError(f"an adapter cannot be named {name!r}: that is the base's own name")
        path = Path(folder)
        with self._copy(path, root) as copied:
            loaded = self._reader.read(copied.folder)
            tokenizer, other_template = self._tokenizer_of(copied.folder)
            notices = [self._reader.notice(copied.folder, loaded), other_template]
            notice = copied.said("; ".join(filter(None, notices)))
            own = ending(self._model, tokenizer)
        info = AdapterInfo(
            name,
            path if root is None else root.absolute() / path,
            self._base_model,
            rank=loaded.rank,
            size=loaded.size,
            notice=notice,
            outputs=loaded.outputs,
            owner=owner,
        )
        with self._lock:
            number = self._registered[name] = self._registered.get(name, 0) + 1
            info = replace(info, version=number)
            key = f"adapter-{next(self._keys)}"
            version = Version(info, key, tokenizer, own, root, copied.digest)
            self._loaded.pop(self._versions.get(name, version), None)
            self._versions[name] = version
            self._keep(version, loaded)
        return version.info

    def unregister(self, name: str) -> None:
        """Forgets an adapter; requests that hold it finish.

        Raises:
            InputError: there is none of this name.
        """
        version = self.version(name)
        with self._lock:
            self._versions.pop(name, None)
            self._loaded.pop(version, None)
            if version.info.owner:  # such names come and go, and are numbered anew
                self._registered.pop(name, None)

    def infos(self) -> list[AdapterInfo]:
        """All adapters, in the order of their registration."""
        with self._lock:
            return [replace(v.info, loaded=v in self._loaded) for v in self._versions.values()]

    def holds(self, name: str) -> bool:
        """Whether the adapter `name` is in memory."""
        with self._lock:
            return self._versions.get(name) in self._loaded

    def let_go(self, name: str) -> None:
        """Frees the memory of an adapter, which is read again when it is asked for."""
        with self._lock:
            if (version := self._versions.get(name)) is not None:
                self._loaded.pop(version, None)

    def version(self, name: str) -> Version:
        """The version in force of the adapter `name`.

        Raises:
            UnknownModelError: there is none.
        """
        with self._lock:
            found = self._versions.get(name)
            names = [n for n, v in self._versions.items() if not v.info.owner]
        if found is None:
            raise UnknownModelError(
                f"there is no model {name!r}{did_you_mean(name, names)}; there are: "
                f"{listed([self._base_model, *names])}"
            )
        return found

    def loaded(self, version: Version) -> Loaded:
        """The values of an adapter, from memory or from its folder.

        Raises:
            InputError: the folder is not what it was when the adapter was registered.
        """
        with self._lock:
            if (found := self._loaded.get(version)) is not None:
                self._loaded.move_to_end(version)
                return found
        info = version.info
        changed = InputError(
            f"{info.folder} has changed since {info.name} was loaded: load it again"
        )
        try:
            with self._copy(info.folder, version.root) as copied:
                if copied.digest != version.digest:
                    raise changed
                loaded = self._reader.read(copied.folder)
        except InputError as error:
            raise changed from error
        with self._lock:
            if self._versions.get(info.name) is version:
                self._keep(version, loaded)
        return loaded

    def _keep(self, version: Version, loaded: Loaded) -> None:
        """Keeps an adapter, and lets go of others; the newest stays, however large it is."""
        self._loaded[version] = loaded
        while len(self._loaded) > 1 and sum(v.info.size for v in self._loaded) > self._limit:
            self._loaded.popitem(last=False)

    @contextmanager
    def _copy(self, folder: Path, root: Path | None) -> Iterator[PrivateCopy]:
        """A private copy of a folder, with the frozen adapters that it is added to, as one.

        Whatever is raised while it is read is an error of ours.
        """
        base = sum(p.numel() * p.element_size() for p in self._model.parameters())
        with released_afterwards(), ExitStack() as stack:
            copying = joined_copy(folder, max(_LEAST_LIMIT, 4 * base), root)
            try:
                copied = stack.enter_context(copying)
            except NotJoinableError as error:
                raise AloneError(folder, error.reason) from error
            try:
                yield copied
            except AloneError as error:
                raise AloneError(folder, error.reason) from error
            except (InputError, TemplateTimeoutError) as error:
                raise InputError(copied.said(str(error))) from error
            except (LorakitError, KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # panics of Rust's parsers are no Exception
                kind = type(error).__name__
                raise InputError(
                    f"{folder} cannot be read as an adapter: {kind}: {first_line(error)}"
                ) from error

    def _tokenizer_of(self, folder: Path) -> tuple[PreTrainedTokenizerBase, str]:
        """The adapter's own tokenizer, or the base's, with the adapter's chat template.

        Returns: it, and a notice where that template is not the base's.
        """
        rows = vocabulary_size(self._model)
        own = own_tokenizer(folder, self._tokenizer, rows)
        if own is not None:
            require_same_pipeline(folder, own, self._tokenizer)
            pass_reader(self._tokenizer, own)
        tokenizer: PreTrainedTokenizerBase = own or copy.copy(self._tokenizer)
        present: Any = self._tokenizer.chat_template
        return tokenizer, use_template(tokenizer, folder, self._base_model, present)
