"""The clock and the dice of chat templates: which templates read them, and a clock that stands.

Llama 3.1's and gpt-oss's templates write the date of the day into every prompt, so that the same
rows are other tokens tomorrow. A run renders all of its rows at one time, which is recorded, and
is made again at that time. What a template names is found in its syntax tree, not in its text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache

from lorakit.models.template_files import Templates

CLOCK = "strftime_now"
"""The one function through which transformers lets a template read the clock."""


class StandingClock:
    """A clock that always shows one time.

    Attributes:
        time: what it shows, local time.
        was_read: whether a template has asked for it.
    """

    def __init__(self, time: datetime | None = None) -> None:
        self.time = time or datetime.now().replace(microsecond=0)
        self.was_read = False

    def strftime_now(self, format: str) -> str:
        """The time in this form, as `datetime.strftime` has it."""
        self.was_read = True
        return self.time.strftime(format)


@dataclass(frozen=True)
class Rendering:
    """How an earlier run made text of its rows, for one that is to make the same.

    `templates` take the place of the tokenizer's, `time` that of the present; None leaves either.
    """

    templates: Templates | None = None
    time: datetime | None = None


_clock: ContextVar[StandingClock | None] = ContextVar("clock of chat templates", default=None)


@contextmanager
def at(clock: StandingClock) -> Iterator[None]:
    """Within the block, templates that read the clock read this one."""
    before = _clock.set(clock)
    try:
        yield
    finally:
        _clock.reset(before)


def clock_stands() -> bool:
    """Whether templates that are rendered in this process read a clock that stands."""
    return _clock.get() is not None


def show_clock(template: str) -> None:
    """Lets a template that names the clock read the one in force when it is rendered."""
    if template and _clock.get() is not None and reads_clock(template):
        from transformers.utils.chat_template_utils import _compile_jinja_template

        # Functions are no arguments of a template: transformers makes text of what it is given.
        _compile_jinja_template(template).environment.globals[CLOCK] = _strftime_now


def _strftime_now(format: str) -> str:
    clock = _clock.get()
    return datetime.now().strftime(format) if clock is None else clock.strftime_now(format)


def reads_clock(template: str) -> bool:
    """Whether the template names the clock; it may still not read it on some conversations."""
    return CLOCK in _names(template)


def draws_at_random(templates: Templates | None) -> bool:
    """Whether a template picks something at random, so that no rendering is like the other."""
    named = templates.values() if isinstance(templates, dict) else [templates]
    return any({"random", "lipsum"} & _names(template) for template in named if template)


def time_in(texts: Iterable[Callable[[], str]], clock: StandingClock) -> datetime | None:
    """The time of `clock`, if a text would be another one at another time.

    A template may read the clock for a system message that a conversation brings itself.

    Args:
        texts: each renders a conversation.
    """
    if not clock.was_read:
        return None
    other = StandingClock(clock.time + timedelta(days=400, hours=7, minutes=13, seconds=17))
    for write in texts:
        with at(clock):
            text = write()
        with at(other):
            if write() != text:
                return clock.time
    return None


def notices_of_rendering(time: datetime | None, templates: Templates) -> list[str]:
    """What to say of rows in which `time` stands, rendered with `templates`."""
    notices = []
    if time is not None:
        notices.append(
            f"the chat template writes the date into rows: it is {time:%Y-%m-%d} in all of "
            "them, and the present one whenever the model is asked later. The record keeps it, "
            "and lorakit reproduce uses it again"
        )
    if draws_at_random(templates):
        notices.append(
            "the chat template draws at random: no two runs have the same rows, and none can be "
            "made again to the bit"
        )
    return notices


@lru_cache(maxsize=16)
def _names(template: str) -> frozenset[str]:
    """The variables, functions and filters that a template names.

    Nothing where it is no template at all: whoever renders it is told why.
    """
    from jinja2 import TemplateError, nodes
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        tree = _compile_jinja_template(template).environment.parse(template)
    except (TemplateError, RecursionError):
        return frozenset()
    return frozenset(found.name for found in tree.find_all((nodes.Name, nodes.Filter)))
