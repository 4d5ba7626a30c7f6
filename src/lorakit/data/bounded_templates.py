"""Chat templates rendered with a bound on time, and where others depend on it in own processes.

A template is a program that comes with a model or an adapter, and may loop, or fill the memory, on
some conversations only. Where many share a process (serving), it is rendered in another one
(`template_worker.py`), which is used again and again, and ended when a rendering takes too long or
too much memory. Where thousands of rows are rendered for one user, it is rendered here, with a
limit of time.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from threading import Lock, Semaphore, Timer
from typing import TYPE_CHECKING, Any

from lorakit.data import template_worker
from lorakit.data.template_clock import clock_stands
from lorakit.data.template_worker import read_exactly, write_frame
from lorakit.errors import LorakitError
from lorakit.time_limit import TimeLimitError, time_limit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 5.0
"""How long a conversation may take; ordinary ones take a millisecond."""
SECONDS_HERE = 20.0
"""How long it may take in this process."""
_SECONDS_TO_START = 60.0
_MOST = 4  # processes
_REASONING = ("reasoning_content", "thinking", "reasoning")


class TemplateFailedError(Exception):
    """What a template raised, in its own words."""


class TemplateTimeoutError(LorakitError):
    """A template takes too long for a conversation.

    It is no InputError, as those who try one conversation after the other go on after these.
    """

    exit_code = 2


_isolated: ContextVar[bool] = ContextVar("isolated", default=False)


@contextmanager
def isolated_templates() -> Iterator[None]:
    """Has `apply_template` render in other processes, in this thread or task."""
    before = _isolated.set(True)
    try:
        yield
    finally:
        _isolated.reset(before)


def apply_template(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[dict[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    **variables: Any,
) -> str:
    """What `tokenizer.apply_chat_template(messages, tokenize=False, …)` returns.

    A tokenizer with a method of its own in place of that one is asked itself: it is code that its
    user has trusted.

    Args:
        variables: more for the template, such as `enable_thinking`.

    Raises:
        TemplateTimeoutError: it takes too long.
        LorakitError: no process can be started.
        Exception: whatever the template raises.
    """
    from transformers import PreTrainedTokenizerBase

    shown_tools = list(tools) if tools else None
    own = type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template
    if own or not _isolated.get() or clock_stands():  # which another process does not know
        try:
            with time_limit(SECONDS_HERE):
                text = tokenizer.apply_chat_template(
                    list(messages),
                    tools=shown_tools,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    **variables,
                )
        except TimeLimitError as error:
            raise _too_long(SECONDS_HERE, messages) from error
        return str(text)
    if not messages:
        raise TemplateFailedError("there is no message")
    template = tokenizer.get_chat_template(None, shown_tools)
    given = {
        **tokenizer.special_tokens_map,
        **variables,
        "messages": [_shown(message) for message in messages],
        "tools": shown_tools,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        return rendered(template, given)
    except TemplateTimeoutError as error:
        raise _too_long(SECONDS, messages) from error


def _too_long(seconds: float, messages: Sequence[Mapping[str, Any]]) -> TemplateTimeoutError:
    begin = str(messages[0].get("content") if messages else "")[:60]
    return TemplateTimeoutError(
        f"the chat template takes more than {seconds:g} s for the conversation that begins "
        f"{begin!r}: it seems to loop forever; repair the template"
    )


def _shown(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as transformers gives it to templates: reasoning under both of its names."""
    shown = {key: value for key, value in message.items() if value is not None}
    reasoning = next((shown[name] for name in _REASONING if name in shown), None)
    if reasoning is not None:
        shown = {"thinking": reasoning, **shown, "reasoning_content": reasoning}
    return shown


def rendered(template: str, variables: Mapping[str, Any]) -> str:
    """A template's text with these variables, which are of JSON's kinds.

    Raises:
        TemplateTimeoutError, TemplateFailedError, LorakitError: as `apply_template`.
    """
    return _asked(template, dict(variables))


def free_variables(template: str) -> frozenset[str]:
    """The variables that a template reads and does not set itself, the conversation among them.

    Raises:
        TemplateTimeoutError, TemplateFailedError, LorakitError: as `apply_template`.
    """
    return frozenset(_asked(template, None).split())


def _asked(template: str, variables: dict[str, Any] | None) -> str:
    request = pickle.dumps((template, variables, SECONDS))
    with _pool().worker() as worker:
        reply = worker.ask(request)
    text = reply[1:].decode("utf-8", "surrogatepass")
    if reply[:1] == b"t":
        return text
    raise TemplateFailedError(text)


class _TemplateProcess:
    """One process. It is used by one thread at a time."""

    def __init__(self) -> None:
        script = str(Path(template_worker.__file__))
        places = {
            str(Path(found.origin).parent.parent)
            for name in ("jinja2", "markupsafe")
            if (found := importlib.util.find_spec(name)) is not None and found.origin
        }
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", script, *sorted(places)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except OSError as error:
            raise LorakitError(
                f"the process that renders chat templates cannot be started: {error}"
            ) from error
        self.late = False
        try:
            self._exchange(b"", _SECONDS_TO_START)
        except (OSError, EOFError) as error:
            self.end()
            raise LorakitError("the process that renders chat templates did not start") from error

    def ask(self, request: bytes) -> bytes:
        """The reply to a request.

        Raises:
            TemplateTimeoutError: it does not come in time. The process has ended then.
            TemplateFailedError: the process ended, as it does when the memory is at its end.
        """
        try:
            return self._exchange(request, SECONDS)
        except (OSError, EOFError) as error:
            self.end()
            if self.late:
                raise TemplateTimeoutError(f"it takes more than {SECONDS:g} s") from error
            raise TemplateFailedError("it ended the process that renders it") from error
        except BaseException:  # Ctrl-C: the reply is still to come
            self.end()
            raise

    def alive(self) -> bool:
        """Whether the process can be asked."""
        return self._process.poll() is None

    def end(self) -> None:
        """Ends the process, whatever it does."""
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                if stream is not None:
                    stream.close()
        self._process.wait()

    def _expire(self) -> None:
        self.late = True
        self._process.kill()  # so that who waits for the reply goes on

    def _exchange(self, request: bytes, seconds: float) -> bytes:
        inward, outward = self._process.stdin, self._process.stdout
        assert inward is not None
        assert outward is not None
        limit = Timer(seconds, self._expire)
        limit.daemon = True
        limit.start()
        try:
            if request:
                write_frame(inward, request)
            reply = read_exactly(outward)
        finally:
            limit.cancel()
        if reply is None:
            raise EOFError
        return reply


class _Pool:
    """The processes of this one, started when they are needed."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self._places = Semaphore(_MOST)
        self._idle: list[_TemplateProcess] = []
        self._busy: set[_TemplateProcess] = set()

    @contextmanager
    def worker(self) -> Iterator[_TemplateProcess]:
        """A process to ask, when one is free."""
        with self._places:
            worker = None
            with suppress(IndexError):
                worker = self._idle.pop()
            if worker is None or not worker.alive():
                worker = _TemplateProcess()
            self._busy.add(worker)
            try:
                yield worker
            finally:
                self._busy.discard(worker)
                if worker.alive():
                    self._idle.append(worker)


_the_pool: _Pool | None = None
_making = Lock()


def _pool() -> _Pool:
    """The pool of this process: one that was forked must not talk to its parent's."""
    global _the_pool
    with _making:
        if _the_pool is None or _the_pool.process != os.getpid():
            _the_pool = _Pool()
        return _the_pool
