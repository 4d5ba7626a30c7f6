"""Grammars compiled for tokenizers, by llguidance, away from the thread that computes.

A grammar comes from whoever sends a request, and parentheses in parentheses may fill the stack, or
alternatives the memory. So each is first checked in a process of its own (`grammar_worker.py`),
which is ended when it takes too long; what passed is compiled here, and kept while it is used.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from contextlib import suppress
from threading import Lock
from typing import IO, TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from lorakit.data.script_process import ScriptProcess
from lorakit.engine import grammar_worker
from lorakit.engine.grammar import Grammar, GrammarError, GrammarState
from lorakit.engine.grammar_worker import LIMITS
from lorakit.errors import InputError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lorakit.engine.pool import AdapterPool
    from lorakit.engine.sampling import Ending

SECONDS = 3.0
"""How long the check of a grammar may take; ordinary ones take some milliseconds."""
_KEPT = 64  # grammars
_TOKENIZERS = 8


class Grammars:
    """The grammars of one engine's requests. Methods may be called from any thread.

    Args:
        tokenizer: the base's.
        ending: what ends an answer of the base.
        pool: the adapters, each with a tokenizer and an ending of its own.
        vocabulary: how many logits the model has.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        ending: Ending,
        pool: AdapterPool,
        vocabulary: int,
    ) -> None:
        self._base, self._pool, self._vocabulary = (tokenizer, ending), pool, vocabulary
        self._lock = Lock()  # of what is known, never held for long
        self._compiling = Lock()
        self._checker: ScriptProcess | None = None
        self._checked: OrderedDict[Grammar, str | GrammarError] = OrderedDict()
        self._matchers: OrderedDict[tuple[Grammar, Any], Any] = OrderedDict()
        self._of_content: OrderedDict[tuple[str, frozenset[int]], Any] = OrderedDict()
        self._tokenizers: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()

    def form(self, grammar: Grammar | None, adapter: str | None = None) -> GrammarState | None:
        """An answer of a grammar, at its beginning; it is compiled the first time.

        Raises:
            GrammarError: it cannot be compiled within the limits.
            InputError: there is no such adapter, llguidance is missing, or it cannot read the
                tokenizer.
        """
        if grammar is None:
            return None
        tokenizer, ending = self._written_by(adapter)
        if (matcher := self._known(grammar, tokenizer)) is None:
            with self._compiling:
                # Another thread may have compiled it meanwhile.
                matcher = self._known(grammar, tokenizer)
                if matcher is None:
                    matcher = self._compiled(grammar, tokenizer, ending.tokens)
        own = self._tokenizers[tokenizer] if grammar.kind == "json" else None
        return GrammarState(matcher.deep_copy(), own)

    def prepare(self) -> None:
        """Reads the base's tokenizer now, for which other threads stand still about a second.

        Where answers can have no form nothing happens: requests for them are told why.
        """
        tokenizer, ending = self._base
        with self._compiling, suppress(InputError):
            self._tokenizer(tokenizer, ending.tokens)

    def is_compiled(self, grammar: Grammar, adapter: str | None = None) -> bool:
        """Whether `form` has nothing to compile, so that it returns at once.

        Raises:
            InputError: there is no such adapter.
        """
        return self._known(grammar, self._written_by(adapter)[0]) is not None

    def _written_by(self, adapter: str | None) -> tuple[PreTrainedTokenizerBase, Ending]:
        """The tokenizer of the answers, and what ends them."""
        if adapter is None:
            return self._base
        version = self._pool.version(adapter)
        return version.tokenizer, version.ending

    def _known(self, grammar: Grammar, tokenizer: PreTrainedTokenizerBase) -> Any:
        """The matcher of a grammar that has been compiled, at once; None of others."""
        with self._lock:
            own = self._tokenizers.get(tokenizer)
            if own is None or (grammar, own) not in self._matchers:
                return None
            self._matchers.move_to_end((grammar, own))
            return self._matchers[grammar, own]

    def _compiled(
        self, grammar: Grammar, tokenizer: PreTrainedTokenizerBase, ends: frozenset[int]
    ) -> Any:
        own = self._tokenizer(tokenizer, ends)
        matcher = _matcher(own, self._definition(grammar))
        with self._lock:
            self._matchers[grammar, own] = matcher
            while len(self._matchers) > _KEPT:
                self._matchers.popitem(last=False)
        return matcher

    def close(self) -> None:
        """Ends the process that checks grammars."""
        with self._compiling:
            if self._checker is not None:
                self._checker.end()
                self._checker = None

    def _definition(self, grammar: Grammar) -> str:
        """A grammar in llguidance's form; one that was refused is so again, at once."""
        if grammar not in self._checked:
            if self._checker is None or not self._checker.alive():
                self._checker = _started()
            try:
                self._checked[grammar] = _check(self._checker, grammar)
            except GrammarError as error:
                self._checked[grammar] = error
        self._checked.move_to_end(grammar)
        while len(self._checked) > _KEPT:
            self._checked.popitem(last=False)
        known = self._checked[grammar]
        if isinstance(known, GrammarError):
            raise GrammarError(str(known))
        return known

    def _tokenizer(self, tokenizer: PreTrainedTokenizerBase, ends: frozenset[int]) -> Any:
        """A tokenizer as llguidance knows it; those of like content share one."""
        if tokenizer not in self._tokenizers:
            backend = getattr(tokenizer, "backend_tokenizer", None)
            if backend is None:
                raise InputError(
                    "answers of a given form need a tokenizer of the tokenizers library, and "
                    f"{type(tokenizer).__name__} is none"
                )
            key = backend.to_str(), ends
            if key not in self._of_content:
                self._of_content[key] = _wrapped(tokenizer, ends, self._vocabulary)
            while len(self._of_content) > _TOKENIZERS:
                self._of_content.popitem(last=False)
            with self._lock:
                self._tokenizers[tokenizer] = self._of_content[key]
        return self._tokenizers[tokenizer]


def _wrapped(tokenizer: Any, ends: frozenset[int], vocabulary: int) -> Any:
    try:
        from llguidance.hf import from_tokenizer
    except ImportError as error:
        raise InputError(
            "answers of a given form need llguidance: pip install 'lorakit[serve]'"
        ) from error
    eos = sorted(ends) or None
    try:
        return from_tokenizer(tokenizer, n_vocab=max(vocabulary, len(tokenizer)), eos_token=eos)
    except BaseException as error:  # panics of Rust are no Exception
        raise InputError(
            f"llguidance cannot read this model's tokenizer: {one_line(str(error))}"
        ) from error


def _matcher(tokenizer: Any, definition: str) -> Any:
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(**LIMITS)
    matcher = LLMatcher(tokenizer, definition, log_level=0, limits=limits)
    if matcher.is_error():
        raise GrammarError(one_line(matcher.get_error()))
    return matcher


def _started() -> ScriptProcess:
    return ScriptProcess(grammar_worker.__file__, ["llguidance"], "checks grammars", _line)


def _line(stream: IO[bytes]) -> bytes | None:
    line = stream.readline()
    return line if line.endswith(b"\n") else None


def _check(checker: ScriptProcess, grammar: Grammar) -> str:
    """A grammar in llguidance's form.

    Raises:
        GrammarError: it has none, or that takes too long or too much memory.
    """
    request = json.dumps([grammar.kind, grammar.text]) + "\n"
    try:
        reply = json.loads(checker.ask(lambda pipe: pipe.write(request.encode()), SECONDS))
    except (TimeoutError, EOFError) as error:
        raise GrammarError(
            f"compiling takes over {SECONDS:g} s or {grammar_worker.MEMORY >> 20} MiB: "
            "use fewer alternatives and fewer levels"
        ) from error
    if "error" in reply:
        raise GrammarError(one_line(reply["error"]))
    return str(reply["definition"])
