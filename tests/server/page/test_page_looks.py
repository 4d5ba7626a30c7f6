"""How the page looks: on small and large screens, light and dark, and without motion."""

from collections.abc import Callable
from pathlib import Path

import pytest
from visitor import BASE, LONG, PHONE, WIDE, Person, serving

from browsers import FAINT, LEAST_CONTRAST
from lorakit.engine.engine import Engine
from lorakit.server.options import Limits
from matrix import few
from taught import ENDLESS_SAYS

SCREENS = {
    f"{name}-{scheme}": (size, scheme)
    for name, size in {"wide": WIDE, "middle": (800, 700), "phone": PHONE}.items()
    for scheme in ("light", "dark")
}


@pytest.mark.parametrize(("size", "scheme"), few(SCREENS, "phone-light", "wide-dark"))
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
        person.set(temperature=0, max_tokens=200, system="Be friendly. " * 9)
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
    person.wait_for_text("endless", ENDLESS_SAYS)
    assert person.page.evaluate("document.getAnimations().length") == 0
    person.page.emulate_media(reduced_motion="no-preference")
    assert person.page.evaluate("document.getAnimations({subtree: true}).length") == 1
    person.page.keyboard.press("Escape")
    person.wait()
