"""Someone at the server's page in a real browser, and the real server that they visit."""

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any
from urllib.parse import urlsplit

from lorakit.engine.engine import Engine
from lorakit.server.options import ServerOptions
from lorakit.server.run import DrainingServer, listen, make_server
from taught import CONTEXT, PROMPT

LONG = CONTEXT - 1000  # tokens: some seconds
WIDE, PHONE = (1280, 860), (360, 740)
BASE = "taught-base (base)"


@contextmanager
def serving(engine: Engine, **options: Any) -> Iterator[tuple[str, DrainingServer]]:
    """A server over `engine`, with its address."""
    options = {"port": 0, **options}
    addresses: list[str] = []
    ready = Event()
    with listen("127.0.0.1", options["port"]) as sock:
        server = make_server(
            engine,
            ServerOptions(**options),
            lambda address: (addresses.append(address), ready.set()),
        )
        thread = Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            assert ready.wait(60)
            yield addresses[0], server
        finally:
            server.should_exit = server.force_exit = True
            thread.join(60)


class Person:
    """Someone at the page, who sees what is visible and has hands.

    Attributes:
        asked: the bodies of the completions that the page asked for.
        expected: a pattern of what the console may say; it is to say nothing else.
    """

    def __init__(self, context: Any, address: str) -> None:
        self.page = context.new_page()
        self.address, self.asked, self.expected = address, [], ""
        self.said: list[str] = []
        self.elsewhere: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(f"error: {error}"))
        self.page.on("dialog", lambda dialog: self.said.append(f"dialog: {dialog.message}"))
        self.page.on("request", self._note)
        self.page.goto(address)

    def _note(self, request: Any) -> None:
        if urlsplit(request.url).netloc != urlsplit(self.address).netloc:
            self.elsewhere.append(request.url)
        if request.url.endswith("/v1/chat/completions"):
            self.asked.append(json.loads(request.post_data))

    def shown(self, selector: str) -> list[str]:
        """The texts of what is visible."""
        return self.page.locator(f"{selector}:visible").all_inner_texts()

    def choose(self, *labels: str) -> None:
        """Makes these models the columns."""
        columns = self.page.locator("#columns select")
        columns.first.wait_for()
        while columns.count() < len(labels):
            self.page.click("#add")
        while columns.count() > len(labels):
            self.page.locator(".remove").last.click()
        for column, label in zip(columns.all(), labels, strict=True):
            column.select_option(label=label)

    def set(self, **fields: Any) -> None:
        """Fills in settings."""
        self.page.click("#settings-button")
        for name, value in fields.items():
            self.page.fill(f"#settings-form [name={name}]", str(value))
        self.page.click("#settings-button")

    def ask(self, prompt: str = PROMPT) -> None:
        self.page.fill("#prompt", prompt)
        self.page.press("#prompt", "Enter")

    def wait(self) -> None:
        """Until no answer is coming any more."""
        self.page.wait_for_selector(".answer")
        self.page.wait_for_selector("#send:visible")

    def wait_for_text(self, model: str, text: str) -> None:
        """Until every answer of `model` has begun with `text`."""
        answers = self.page.locator(f".answer[aria-label='Answer of {model}'] .text")
        for answer in answers.all():
            answer.filter(has_text=re.compile(f"^{re.escape(text)}")).wait_for()


def until(true: Callable[[], bool], seconds: float = 30) -> bool:
    """Whether it becomes true within so many seconds."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True
