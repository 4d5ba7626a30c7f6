"""How far long work is and when it ends: one mechanism for every command.

Work reports with `task` or `track` wherever it is done; it is shown on standard error only while a
display is open (`showing`), so that the library is silent. A terminal or notebook gets a bar, a log
or pipe plain lines, the first after ten seconds.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from threading import Event, RLock, Thread
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")

FIRST = 10.0
"""Seconds to the first plain line and from each to the next, which grow with the work."""
TICK = 0.2  # seconds from one look to the next
_SHARE, _LONGEST = 0.1, 120.0  # of the time so far; seconds

_lock = RLock()
_display: _Display | None = None


class Task:
    """Work that is counted.

    Attributes:
        done: how much is done, in the unit of `total`; fractions are fine.
        total: how much there is; None where that is not known.
        status: what else is shown (a loss).
    """

    def __init__(self, what: str, total: float | None = None, done: float = 0) -> None:
        self.what, self.total, self.done = what, total, done
        self.status = ""
        self._first, self._began = done, time.monotonic()
        self._said = self._began
        self._any = False

    def advance(self, by: float = 1) -> None:
        """Counts `by` as done."""
        self.update(self.done + by)

    def update(self, done: float, total: float | None = None, status: str | None = None) -> None:
        """Sets what is done, and what is given of the rest."""
        self.done = done
        self.total = self.total if total is None else total
        self.status = self.status if status is None else status

    @property
    def left(self) -> float | None:
        """Seconds to the end at the speed so far; None while that is not known."""
        here = self.done - self._first
        if not self.total or here <= 0:
            return None
        return (time.monotonic() - self._began) / here * max(0.0, self.total - self.done)

    @property
    def clock_left(self) -> str:
        """`left` as `0:41`; nothing while it is not known."""
        return "" if self.left is None else _clock(self.left)

    @property
    def line(self) -> str:
        """`evaluating: 120 of 400 (30%), 0:41 left`."""
        so_far = _clock(time.monotonic() - self._began)
        parts = [so_far]
        if self.total:
            share = min(1.0, self.done / self.total)
            end = f"{self.clock_left} left" if self.left else so_far
            parts = [f"{self.done:,.0f} of {self.total:,.0f} ({share:.0%})", end]
        return f"{self.what}: {', '.join([*parts, *([self.status] if self.status else [])])}"

    def said(self) -> None:
        """Counts as a line: the caller has printed one of its own."""
        self._said, self._any = time.monotonic(), True

    def due(self) -> bool:
        """Whether it is time for another line."""
        now = time.monotonic()
        apart = min(_LONGEST, max(FIRST, _SHARE * (now - self._began)))
        return now - self._said >= apart


class _Display:
    """Shows the innermost task: its bar, or lines that a thread of its own prints in time."""

    def __init__(self, console: Console | None) -> None:
        self.tasks: list[Task] = []
        self._console = console
        self._closing = Event()
        self._bars: Any = None
        self._of: dict[int, Any] = {}
        self._thread: Thread | None = None

    @property
    def console(self) -> Console:
        """Where it is shown, made when it is first needed."""
        if self._console is None:
            from lorakit.console import open_console

            self._console = open_console(stderr=True, soft_wrap=True)
        return self._console

    @property
    def live(self) -> bool:
        """Whether it is shown as a bar."""
        return self.console.is_terminal or self.console.is_jupyter

    def begin(self, task: Task) -> None:
        with _lock:
            self.tasks.append(task)
            if self._thread is None and not self.console.quiet:
                self._thread = Thread(target=self._show, name="lorakit-progress", daemon=True)
                self._thread.start()
            if self.live:
                self._bar(task)

    def end(self, task: Task) -> None:
        with _lock:
            self.tasks.remove(task)
            if self.live:
                self._bars.remove_task(self._of.pop(id(task)))
                if not self._of:
                    self._bars.stop()
                    self._bars = None
            elif task._any and task.total and task.done >= task.total:
                self.console.print(task.line)

    def close(self) -> None:
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
        if self._bars:
            self._bars.stop()

    def _bar(self, task: Task) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        if self._bars is None:
            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[count]}"),
                TextColumn("{task.fields[status]}"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
                redirect_stdout=False,  # it is for other programs
                redirect_stderr=False,
            )
            self._bars.start()
        self._of[id(task)] = self._bars.add_task(task.what, total=None, count="", status="")
        self._move(task)

    def _move(self, task: Task) -> None:
        count = f"{task.done:,.0f}/{task.total:,.0f}" if task.total else ""
        self._bars.update(
            self._of[id(task)],
            completed=task.done,
            total=task.total,
            count=count,
            status=task.status,
        )

    def _show(self) -> None:
        while not self._closing.wait(TICK):
            with _lock:
                for task in self.tasks:
                    if self.live:
                        self._move(task)
                if not self.live and self.tasks and all(task.due() for task in self.tasks):
                    self.console.print(self.tasks[-1].line)
                    for task in self.tasks:
                        task.said()


@contextmanager
def showing(console: Console | None = None) -> Iterator[None]:
    """Shows progress while the block runs.

    Args:
        console: where, and nowhere if it is a quiet one; None is where it is shown already, or
            else standard error.
    """
    global _display
    outer = _display
    if outer is not None and console is None:
        yield
        return
    own = _display = _Display(console)
    try:
        yield
    finally:
        _display = outer
        own.close()


def innermost() -> Task:
    """The task that was begun last and is not at its end, or one that nobody sees."""
    with _lock:
        return _display.tasks[-1] if _display and _display.tasks else Task("")


@contextmanager
def task(what: str, total: float | None = None, done: float = 0) -> Iterator[Task]:
    """A task that is shown while the block runs, if there is a display.

    Args:
        what: what is done, as a participle (`merging`).
        total, done: how much there is, and how much of it was done before.
    """
    work, display = Task(what, total, done), _display
    if display is not None:
        display.begin(work)
    try:
        yield work
    finally:
        if display is not None:
            display.end(work)


def track(items: Iterable[T], what: str, total: float | None = None) -> Iterator[T]:
    """Yields `items`, as a task of so many."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with task(what, total) as work:
        for item in items:
            yield item
            work.advance()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
