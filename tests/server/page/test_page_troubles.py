"""What goes wrong is told on the page, and can be made good there."""

import json
from collections.abc import Callable
from urllib.parse import urlsplit

from visitor import BASE, LONG, Person, serving, until

from lorakit.engine.engine import Engine
from lorakit.server.options import ApiKey, Limits
from taught import CONTEXT, ENDLESS_SAYS, SHOP_SAYS


def test_a_key_is_asked_for_where_the_server_wants_one(
    visit: Callable[..., Person], engine: Engine
):
    with serving(engine, api_keys=(ApiKey("right"),)) as (address, _):
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
    with serving(engine, api_keys=(ApiKey("new"),), port=urlsplit(address).port):
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
        person.set(max_tokens=8)  # else this one is as long
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
        person.wait_for_text("endless", ENDLESS_SAYS)
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
