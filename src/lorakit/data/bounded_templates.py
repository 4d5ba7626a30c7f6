"""Chat templates rendered with a bound on time, and where others depend on it in own processes.

A template is a program that comes with a model or an adapter, and may loop, or fill the memory, on
some conversations only. Where many share a process (serving), it is rendered in another one
(`template_worker.py`), which is used again and again, and ended when a rendering takes too long or
too much memory. Where thousands of rows are rendered for one user, it is rendered here, with a
limit of time.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from threading import Lock, Semaphore
from typing import TYPE_CHECKING, Any

from lorakit.data import template_worker
from lorakit.data.script_process import ScriptProcess
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
        try:
            reply = worker.ask(lambda pipe: write_frame(pipe, request), SECONDS)
        except TimeoutError as error:
            raise TemplateTimeoutError(f"it takes more than {SECONDS:g} s") from error
        except EOFError as error:  # as it does when the memory is at its end
            raise TemplateFailedError("it ended the process that renders it") from error
    text = reply[1:].decode("utf-8", "surrogatepass")
    if reply[:1] == b"t":
        return text
    raise TemplateFailedError(text)


def _started() -> ScriptProcess:
    packages = "jinja2", "markupsafe"
    task = "renders chat templates"
    return ScriptProcess(template_worker.__file__, packages, task, read_exactly)


class _Pool:
    """The processes of this one, started when they are needed."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self._places = Semaphore(_MOST)
        self._idle: list[ScriptProcess] = []
        self._busy: set[ScriptProcess] = set()

    @contextmanager
    def worker(self) -> Iterator[ScriptProcess]:
        """A process to ask, when one is free."""
        with self._places:
            worker = None
            with suppress(IndexError):
                worker = self._idle.pop()
            if worker is None or not worker.alive():
                worker = _started()
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
