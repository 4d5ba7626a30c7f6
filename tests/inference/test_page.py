"""The page of the server: driven in a real browser, on the real server with taught models."""

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any
from urllib.parse import urlsplit

import pytest
from taught import BASE_SAYS, CONTEXT, ENDLESS_SAYS, PROMPT, SHOP_SAYS, save_taught_models

from browsers import FAINT, LEAST_CONTRAST
from lorakit.inference.engine import Engine
from lorakit.inference.open import open_engine
from lorakit.inference.server.options import Limits, ServerOptions
from lorakit.inference.server.run import DrainingServer, listen, make_server

LONG = CONTEXT - 1000  # tokens: some seconds
WIDE, PHONE = (1280, 860), (360, 740)
BASE = "taught-base (base)"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    base, adapters = save_taught_models(tmp_path_factory.mktemp("models"))
    engine = open_engine(str(base), adapters, dtype="float32", max_rows=2)
    yield engine
    engine.close()


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
            assert ready.wait(10)
            yield addresses[0], server
        finally:
            server.should_exit = server.force_exit = True
            thread.join(10)


@pytest.fixture(scope="module")
def address(engine: Engine) -> Iterator[str]:
    with serving(engine) as (address, _):
        yield address


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
        return [text.inner_text() for text in self.page.locator(f"{selector}:visible").all()]

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

    def wait_for_text(self, model: str) -> None:
        """Until the newest answer of `model` has begun."""
        answer = self.page.locator(f".answer[aria-label='Answer of {model}'] .text").last
        answer.filter(has_text=re.compile(r"\S")).wait_for()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Person]]:
    """Opens the page at an address as someone new; greedy, as the models were taught.

    At the end nothing was asked of another origin, and the console has said nothing unexpected.
    """
    people: list[Person] = []

    def visit(
        address: str, size: tuple[int, int] = WIDE, scheme: str = "light", **options: Any
    ) -> Person:
        viewport = {"width": size[0], "height": size[1]}
        context = browser.new_context(viewport=viewport, color_scheme=scheme, **options)
        context.set_default_timeout(10_000)
        people.append(Person(context, address))
        return people[-1]

    yield visit
    for person in people:
        person.page.context.close()
        said = [text for text in person.said if not re.search(person.expected or "$^", text)]
        assert said == []
        assert person.elsewhere == []


@pytest.fixture
def person(visit: Callable[..., Person], address: str) -> Person:
    """Someone who compares the adapter `shop` with the base."""
    person = visit(address)
    person.choose("shop", BASE)
    person.set(temperature=0)
    return person


def until(true: Callable[[], bool], seconds: float = 5) -> bool:
    """Whether it becomes true within so many seconds."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def test_an_adapter_and_the_base_answer_side_by_side_as_text(person: Person):
    person.ask()
    person.wait()
    assert person.shown(".prompt") == [PROMPT]
    texts = person.page.locator(".answer .text")
    assert texts.all_text_contents() == [SHOP_SAYS, BASE_SAYS]  # marks of HTML are letters
    assert texts.first.inner_text() == SHOP_SAYS  # with its line break and spaces
    assert person.page.locator(".text *").count() == 0
    assert person.page.evaluate("document.scripts.length") == 1
    left, right = (answer.bounding_box() for answer in person.page.locator(".answer").all())
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] < right["x"]
    for head, answer in zip(person.page.locator("#columns li").all(), (left, right), strict=True):
        assert head.bounding_box()["x"] == answer["x"]


def test_answers_stream_and_are_measured(person: Person):
    person.choose("endless", BASE)
    person.ask()
    person.page.wait_for_selector(".answer[data-state=done]")  # the base's; the other goes on
    length = "document.querySelector('.answer .text').textContent.length"
    first = person.page.evaluate(length)
    assert until(lambda: person.page.evaluate(length) > first)
    assert person.page.get_attribute(".answer .text", "aria-busy") == "true"
    assert person.shown("#stop")
    assert not person.shown("#send")
    person.wait()
    endless, base = person.shown(".figures")
    for figures, tokens, end in (
        (endless, "512 tokens", "cut at max tokens"),
        (base, f"{len(BASE_SAYS) + 1} tokens", "complete"),  # one token ends it
    ):
        assert re.match(r"\d+(\.\d)? tokens/s\s+first token \d+\.\d\d s\s", figures)
        assert figures.endswith(end)
        assert tokens in figures
    assert person.page.get_attribute(".answer .text", "aria-busy") == "false"


def test_each_column_goes_on_with_its_own_history(person: Person):
    person.set(system="Be short.", max_tokens=200)
    for prompt in (PROMPT, "And then?"):
        person.ask(prompt)
        person.wait()
    system = {"role": "system", "content": "Be short."}
    second, (texts, models) = person.asked[2:], answers_to_first(person)
    assert [body["model"] for body in second] == models
    for body, text in zip(second, texts, strict=True):
        assert body["messages"] == [
            system,
            {"role": "user", "content": PROMPT},
            {"role": "assistant", "content": text},
            {"role": "user", "content": "And then?"},
        ]
    assert person.shown(".prompt") == [PROMPT, "And then?"]
    person.page.click("#clear")
    assert not person.shown(".turn")
    person.ask()
    person.wait()
    assert all(len(body["messages"]) == 2 for body in person.asked[4:])


def answers_to_first(person: Person) -> tuple[list[str], list[str]]:
    turn = person.page.locator(".turn").first
    return turn.locator(".text").all_text_contents(), [body["model"] for body in person.asked[:2]]


@pytest.mark.parametrize("how", ["button", "Escape", "removal", "clearing"])
def test_stopping_keeps_what_came_and_frees_the_rows(person: Person, engine: Engine, how: str):
    person.choose("endless", "endless")
    person.set(max_tokens=LONG)
    person.ask()
    person.wait_for_text("endless")
    assert engine.running() == 2
    if how == "button":
        person.page.click("#stop")
    elif how == "Escape":
        person.page.keyboard.press("Escape")
    elif how == "removal":
        person.page.locator(".remove").last.click()
        assert until(lambda: engine.running() == 1)
        person.page.locator(".remove").wait_for(state="hidden")
        person.page.keyboard.press("Escape")
    else:
        person.page.click("#clear")
    assert until(lambda: engine.running() == 0)
    person.page.wait_for_selector("#send:visible")
    if how != "clearing":
        assert all(figures.endswith("stopped by you") for figures in person.shown(".figures"))
        assert all(text.startswith(ENDLESS_SAYS) for text in person.shown(".text"))
        person.choose("shop")
        person.page.click(".retry >> nth=0")
        person.page.wait_for_selector(".answer[data-state=done]")
        assert person.shown(".text") == [SHOP_SAYS]


def test_a_key_is_asked_for_where_the_server_wants_one(
    visit: Callable[..., Person], engine: Engine
):
    with serving(engine, api_key="right") as (address, _):
        person = visit(address)
        person.expected = "status of 401"
        page = person.page
        page.wait_for_selector("#key:focus")
        assert person.shown("#key-why") == ["The server asks for an API key."]
        for key in ("wrong", "right"):
            page.keyboard.type(key)
            page.keyboard.press("Enter")
            if key == "wrong":
                page.locator("#key-why", has_text="doesn't accept this API key").wait_for()
        page.wait_for_selector("#columns select")
        assert not person.shown("#key-form")
        person.set(temperature=0)
        person.choose("shop")
        person.ask()
        person.wait()
        assert person.shown(".text") == [SHOP_SAYS]
        page.reload()
        page.wait_for_selector("#columns select")  # this tab remembers the key
        kept = page.evaluate("[Object.values(localStorage), Object.values(sessionStorage)]")
        assert "right" not in json.dumps(kept[0])
        assert "right" in json.dumps(kept[1])
    with serving(engine, api_key="new", port=urlsplit(address).port):
        person.ask()
        page.wait_for_selector("#key:focus")
        page.keyboard.type("new")
        page.keyboard.press("Enter")
        page.wait_for_selector(".answer[data-state=done]")  # what was refused is asked anew
        assert person.shown(".text") == [SHOP_SAYS]


def test_a_busy_server_and_a_long_prompt_are_told_in_the_column(
    visit: Callable[..., Person], engine: Engine
):
    with serving(engine, limits=Limits(waiting=0)) as (address, _):
        person = visit(address)
        person.expected = "status of 4(29|00)"
        person.choose("endless", "endless", BASE)
        person.set(temperature=0, max_tokens=LONG)
        person.ask()
        person.page.wait_for_selector(".answer[data-state=failed] .trouble")
        (told,) = person.shown(".answer .trouble")
        assert told.startswith("The server is busy. Try again in 1\u00a0s.")
        assert "answers are under way" in told
        person.page.keyboard.press("Escape")
        assert until(lambda: engine.running() == 0)
        person.page.click(".answer[data-state=failed] .retry")
        person.page.wait_for_selector(".answer[data-state=done]")
        assert not person.shown(".answer .trouble")
        person.choose(BASE)
        person.ask("x" * CONTEXT)
        person.page.get_by_text("The server refused this.").wait_for()
        assert str(CONTEXT) in person.shown(".answer .trouble")[0]


def test_a_lost_connection_is_told_and_can_be_made_good(
    visit: Callable[..., Person], engine: Engine
):
    with serving(engine) as (address, server):
        person = visit(address)
        person.expected = "net::ERR"
        person.choose("endless")
        person.set(temperature=0, max_tokens=LONG)
        person.ask()
        person.wait_for_text("endless")
        for connection in list(server.server_state.connections):
            server._loop.call_soon_threadsafe(connection.transport.abort)
        person.page.get_by_text("The connection was lost before the answer ended.").wait_for()
        (kept,) = person.shown(".text")
        assert kept
        assert (ENDLESS_SAYS * LONG).startswith(kept)
        assert until(lambda: engine.running() == 0)
    person.choose("shop")
    person.page.click(".retry")
    person.page.get_by_text("The server can't be reached.").wait_for()
    with serving(engine, port=urlsplit(address).port):
        person.page.click(".retry")
        person.page.wait_for_selector(".answer[data-state=done]")
        assert person.shown(".text") == [SHOP_SAYS]


def test_settings_are_sent_and_remembered(person: Person):
    chosen = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "max_tokens": 7,
        "seed": 12,
        "repetition_penalty": 1.1,
    }
    person.set(**chosen)
    for _ in range(2):
        person.ask()
        person.wait()
        assert chosen.items() <= person.asked[-1].items()
        person.page.reload()
        person.page.wait_for_selector("#columns select")
    (first, again) = person.asked[0], person.asked[2]
    assert first == again
    assert "temperature 0.5" in person.shown("#settings-set")[0]
    person.set(top_p=2)
    person.ask()
    assert person.page.evaluate("document.activeElement.name") == "top_p"  # shown, and not sent
    assert len(person.asked) == 4
    person.page.click("#reset")
    person.ask()
    person.wait()
    assert set(person.asked[-1]) == {
        "model", "messages", "max_tokens", "stream", "stream_options",
    }  # fmt: skip


def test_differences_are_marked_and_answers_copied_without_marks(person: Person):
    person.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    person.choose("shop", "shop", BASE)
    person.ask()
    person.wait()
    person.page.check("#differences")
    same, other = person.page.locator(".answer").nth(1), person.page.locator(".answer").nth(2)
    assert same.locator("mark").count() == 0
    assert other.locator("mark").count() > 0
    marked = " ".join(other.locator("mark").all_text_contents())
    assert "script" in marked
    assert other.locator(".text").text_content() == BASE_SAYS
    other.locator(".copy").click()
    other.get_by_text("Copied").wait_for()
    assert person.page.evaluate("navigator.clipboard.readText()") == BASE_SAYS
    person.page.uncheck("#differences")
    assert person.page.locator("mark").count() == 0


def test_columns_are_one_to_four_and_are_remembered(person: Person, engine: Engine):
    page = person.page
    person.choose("shop", BASE, "endless", "shop")
    assert not person.shown("#add")
    page.reload()
    page.wait_for_selector("#columns select")
    chosen = "[...document.querySelectorAll('#columns select')].map(s => s.selectedOptions[0].text)"
    assert page.evaluate(chosen) == ["shop", BASE, "endless", "shop"]
    person.choose("endless")
    assert not person.shown(".remove")
    page.reload()
    page.wait_for_selector("#columns select")
    assert page.evaluate(chosen) == ["endless"]


def test_a_model_that_is_gone_is_told(person: Person, engine: Engine):
    person.expected = "status of 404"
    folder = next(info.folder for info in engine.pool.infos() if info.name == "shop")
    engine.pool.unregister("shop")
    try:
        person.ask()
        person.page.get_by_text("The server doesn't serve this model now.").wait_for()
        option = person.page.locator("#columns option", has_text="shop (not served now)")
        option.first.wait_for(state="attached")
    finally:
        engine.pool.register("shop", folder)


def test_the_keyboard_is_enough(visit: Callable[..., Person], address: str):
    person = visit(address)
    page = person.page
    page.wait_for_selector("#prompt:focus")
    person.choose("shop", BASE)
    page.focus(".skip")
    names = []
    for _ in range(9):
        focused = page.evaluate(
            """(e => [e.getAttribute("aria-label") ?? e.labels?.[0]?.innerText ?? e.innerText,
              getComputedStyle(e).outlineStyle])(document.activeElement)"""
        )
        assert focused[1] == "solid", f"it is not to be seen that {focused[0]} has the focus"
        names.append(focused[0])
        page.keyboard.press("Tab")
    assert names == [
        "Skip to the prompt", "Settings", "Add a model",
        "Model of column 1", "Remove column 1, shop", "Model of column 2",
        f"Remove column 2, {BASE}", "Prompt", "Send",
    ]  # fmt: skip
    page.focus("#settings-button")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.type("0")  # the temperature, after the system message
    page.focus("#prompt")
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    person.wait()
    assert [body["messages"][-1]["content"] for body in person.asked] == ["one\ntwo"] * 2
    assert person.asked[0]["temperature"] == 0
    assert page.input_value("#prompt") == ""
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.press("Shift+Tab")  # the last answer's button
    assert page.evaluate("document.activeElement.className") == "retry"
    with page.expect_request("**/v1/chat/completions"):
        page.keyboard.press("Enter")
    person.wait()
    assert len(person.asked) == 3


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, (800, 700), PHONE], ids=["wide", "middle", "phone"])
def test_everything_fits_the_screen_and_can_be_read(
    visit: Callable[..., Person],
    engine: Engine,
    size: tuple[int, int],
    scheme: str,
    tmp_path: Path,
):
    touch = {"is_mobile": True, "has_touch": True} if size == PHONE else {}
    with serving(engine, limits=Limits(waiting=0)) as (address, _):
        person = visit(address, size, scheme, **touch)
        person.expected = "status of 429"
        page = person.page
        person.choose("shop", BASE)
        page.screenshot(path=tmp_path / "empty.png")
        person.set(temperature=0, system="Be friendly. " * 9)
        person.ask()
        person.wait()
        page.check("#differences")
        person.choose("endless", "shop", BASE)
        person.ask("W" * 300 + " and where?")  # a word that is wider than the screen
        page.wait_for_selector(".answer[data-state=failed]")
        page.screenshot(path=tmp_path / "streaming.png")
        person.wait()
        page.screenshot(path=tmp_path / "answers.png", full_page=True)
        page.evaluate("scrollTo(0, 0)")
        page.click("#settings-button")
        page.screenshot(path=tmp_path / "settings.png")
        assert page.evaluate("document.documentElement.scrollWidth") == size[0]
        parts = page.locator("button, select, textarea, input, .prompt, .text, .trouble, .figures")
        for part in parts.locator("visible=true").all():
            box = part.bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= size[0]
            if touch and part.evaluate("e => e.tagName") == "BUTTON":
                assert min(box["width"], box["height"]) >= 36
        found = page.evaluate(FAINT, LEAST_CONTRAST)
        assert found["seen"] > 40
        assert found["faint"] == []


def test_nothing_moves_for_who_wants_no_motion(visit: Callable[..., Person], address: str):
    person = visit(address, reduced_motion="reduce")
    person.choose("endless")
    person.set(temperature=0, max_tokens=LONG)
    person.ask()
    person.wait_for_text("endless")
    assert person.page.evaluate("document.getAnimations().length") == 0
    person.page.emulate_media(reduced_motion="no-preference")
    assert person.page.evaluate("document.getAnimations({subtree: true}).length") == 1
    person.page.keyboard.press("Escape")
    person.wait()
