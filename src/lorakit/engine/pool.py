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
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from lorakit.adapters.adapter_tokenizer import own_tokenizer, require_same_pipeline
from lorakit.adapters.chat_template import use_template
from lorakit.adapters.derived import origin, other_weights
from lorakit.adapters.private_copy import PrivateCopy, private_copy
from lorakit.adapters.updates import (
    AdapterFile,
    ModuleUpdate,
    ParameterUpdate,
    read_updates,
)
from lorakit.data.bounded_templates import TemplateTimeoutError
from lorakit.engine.sampling import Ending, ending
from lorakit.errors import InputError, LorakitError, did_you_mean, first_line, listed
from lorakit.lora.slots import AdapterSlots, Factors
from lorakit.lora.vocabulary import vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LEAST_LIMIT = 1 << 30
"""Bytes that a file of weights may have, however small the base is."""


@dataclass(frozen=True)
class AdapterInfo:
    """A registered adapter.

    Attributes:
        rank: the largest of its modules'.
        size: of its factors in memory, in bytes.
        version: how often the name has been registered.
        loaded: whether its factors are in memory now.
        notice: what its user should know; mostly empty.
    """

    name: str
    folder: Path
    base_model: str
    rank: int
    size: int
    version: int = 1
    loaded: bool = True
    notice: str = ""


@dataclass(frozen=True, eq=False)
class Version:
    """One version of an adapter. Requests hold it for as long as they need it."""

    info: AdapterInfo
    tokenizer: PreTrainedTokenizerBase = field(repr=False)  # with the adapter's chat template
    ending: Ending
    root: Path | None  # what the folder must lie below
    digest: str  # of the folder's files


class AdapterPool:
    """Adapters of one base model by name.

    Args:
        slots: the model that they are for.
        base_model: its name.
        fingerprint: of its weights, to notice an adapter of others; None where it is not known.
        limit: how many bytes of factors may stay in memory.
    """

    def __init__(
        self,
        slots: AdapterSlots,
        tokenizer: PreTrainedTokenizerBase,
        base_model: str,
        fingerprint: str | None,
        limit: int,
    ) -> None:
        self._slots, self._tokenizer, self._base_model = slots, tokenizer, base_model
        self._fingerprint, self._limit = fingerprint, limit
        self._versions: dict[str, Version] = {}
        self._registered: dict[str, int] = {}
        self._factors: OrderedDict[Version, Factors] = OrderedDict()
        self._lock = Lock()
        self.closed_because = ""
        """Why no adapter can be registered, if none can."""

    def register(self, name: str, folder: str | Path, root: Path | None = None) -> AdapterInfo:
        """Makes the adapter in `folder` available as `name`, in a new version if there is one.

        Args:
            root: what the folder, relative to it or absolute, and its files must lie below.

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
            file = read_updates(copied.folder, self._slots.model)
            factors = self._check(file)
            tokenizer, other_template = self._tokenizer_of(copied.folder)
            notices = [self._other_weights(file), other_template]
            notice = copied.said("; ".join(filter(None, notices)))
            own = ending(self._slots.model, tokenizer)
        info = AdapterInfo(
            name,
            path if root is None else root.absolute() / path,
            self._base_model,
            rank=max(A.shape[-2] for A, _ in factors.values()),
            size=_size(factors),
            notice=notice,
        )
        with self._lock:
            number = self._registered[name] = self._registered.get(name, 0) + 1
            info = replace(info, version=number)
            version = Version(info, tokenizer, own, root, copied.digest)
            self._factors.pop(self._versions.get(name, version), None)
            self._versions[name] = version
            self._keep(version, factors)
        return version.info

    def unregister(self, name: str) -> None:
        """Forgets an adapter; requests that hold it finish.

        Raises:
            InputError: there is none of this name.
        """
        version = self.version(name)
        with self._lock:
            self._versions.pop(name, None)
            self._factors.pop(version, None)

    def infos(self) -> list[AdapterInfo]:
        """All adapters, in the order of their registration."""
        with self._lock:
            return [replace(v.info, loaded=v in self._factors) for v in self._versions.values()]

    def holds(self, name: str) -> bool:
        """Whether the adapter `name` is in memory."""
        with self._lock:
            return self._versions.get(name) in self._factors

    def version(self, name: str) -> Version:
        """The version in force of the adapter `name`.

        Raises:
            InputError: there is none.
        """
        with self._lock:
            found, names = self._versions.get(name), list(self._versions)
        if found is None:
            raise InputError(
                f"there is no model {name!r}{did_you_mean(name, names)}; there are: "
                f"{listed([self._base_model, *names])}"
            )
        return found

    def factors(self, version: Version) -> Factors:
        """The factors of an adapter, from memory or from its folder.

        Raises:
            InputError: the folder is not what it was when the adapter was registered.
        """
        with self._lock:
            if (found := self._factors.get(version)) is not None:
                self._factors.move_to_end(version)
                return found
        info = version.info
        changed = InputError(
            f"{info.folder} has changed since {info.name} was loaded: load it again"
        )
        try:
            with self._copy(info.folder, version.root) as copied:
                if copied.digest != version.digest:
                    raise changed
                factors = self._check(read_updates(copied.folder, self._slots.model))
        except InputError as error:
            raise changed from error
        with self._lock:
            if self._versions.get(info.name) is version:
                self._keep(version, factors)
        return factors

    def _keep(self, version: Version, factors: Factors) -> None:
        """Keeps factors, and lets go of others; the newest stay, however large they are."""
        self._factors[version] = factors
        while len(self._factors) > 1 and sum(v.info.size for v in self._factors) > self._limit:
            self._factors.popitem(last=False)

    @contextmanager
    def _copy(self, folder: Path, root: Path | None) -> Iterator[PrivateCopy]:
        """A private copy of a folder; whatever is raised while it is read is an error of ours."""
        base = sum(p.numel() * p.element_size() for p in self._slots.model.parameters())
        with private_copy(folder, max(_LEAST_LIMIT, 4 * base), root) as copied:
            try:
                yield copied
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
        rows = vocabulary_size(self._slots.model)
        own = own_tokenizer(folder, self._tokenizer, rows)
        if own is not None:
            require_same_pipeline(folder, own, self._tokenizer)
        tokenizer: PreTrainedTokenizerBase = own or copy.copy(self._tokenizer)
        present: Any = self._tokenizer.chat_template
        return tokenizer, use_template(tokenizer, folder, self._base_model, present)

    def _check(self, file: AdapterFile) -> Factors:
        """The adapter's factors in the model's dtype, in memory of their own.

        Raises:
            InputError: it does not fit the base, or changes more than weights by B A.
        """
        require_text(file)
        if reason := why_not_beside(file):
            raise InputError(
                f"{file.folder} {reason}, which cannot be served beside other adapters: merge it "
                "with lorakit merge and serve the result, or serve it alone with --merged"
            )
        file.require_updates()
        updates: dict[str, ModuleUpdate | ParameterUpdate]
        updates = {**file.updates, **file.parameters}
        if not updates:
            raise InputError(f"{file.folder} changes no module by B A")
        dtype = self._slots.dtype
        factors = {}
        for path, update in updates.items():
            A, B = update.factors()
            factors[path] = A.to(dtype, copy=True), (B * update.scaling).to(dtype)
            if not (factors[path][0].isfinite().all() and factors[path][1].isfinite().all()):
                raise InputError(f"{file.folder}: {path} holds values that {dtype} cannot hold")
        try:
            self._slots.require_fitting(factors)
        except InputError as error:
            raise InputError(f"{file.folder} does not fit {self._base_model}: {error}") from error
        return factors

    def _other_weights(self, file: AdapterFile) -> str:
        expected = origin(file.folder, file.config).base_fingerprint
        if None in (expected, self._fingerprint) or expected == self._fingerprint:
            return ""
        return other_weights(file.folder, self._base_model)


def require_text(file: AdapterFile) -> None:
    """Raises InputError for an adapter of a model that does not write text."""
    if file.config.task_type not in (None, "CAUSAL_LM"):
        raise InputError(
            f"{file.folder} is for {file.config.task_type} and cannot answer with text: score it "
            "with lorakit eval"
        )


def why_not_beside(file: AdapterFile) -> str:
    """Why the adapter cannot stand beside others, as it is more than products of two matrices
    beside weights; empty where it can.
    """
    if file.has_magnitudes:
        return "is a DoRA adapter"
    if file.config.init.kind.changes_base:
        return "is for the base as LoftQ quantised it"
    if file.config.bias != "none":
        return "trains the base's biases"
    if any(update.bias is not None for update in file.updates.values()):
        return "has a bias of its own (lora_bias)"
    if any(update.ending != "lora_A.weight" for update in file.updates.values()):
        return "adapts an embedding"
    if file.config.layer_replication:
        return "repeats layers of the base (layer_replication)"
    if file.others:
        return f"brings weights of its own ({listed(sorted(file.others), 2)})"
    return ""


def _size(factors: Factors) -> int:
    return sum(m.numel() * m.element_size() for pair in factors.values() for m in pair)
