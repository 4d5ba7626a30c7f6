"""Pictures on the page: chosen, dropped or pasted, sent with the prompt, and seen in the talk."""

import base64
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from visitor import Person, serving

from lorakit.engine.engine import Engine
from lorakit.engine.open_engine import open_engine
from tiny_pictures import save_pictures, save_tiny_idefics3

# Drops a file on an element, or pastes it.
GIVEN = """([selector, kind, name, type, data]) => {
  const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
  const given = new DataTransfer();
  given.items.add(new File([bytes], name, {type}));
  const options = {bubbles: true, cancelable: true};
  const event = kind === "paste"
    ? new ClipboardEvent("paste", {...options, clipboardData: given})
    : new DragEvent(kind, {...options, dataTransfer: given});
  return document.querySelector(selector).dispatchEvent(event);
}"""


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    base = save_tiny_idefics3(tmp_path_factory.mktemp("seeing") / "base")
    engine = open_engine(str(base), {}, dtype="float32", max_rows=2)
    yield engine
    engine.close()


def given(person: Person, kind: str, file: Path, where: str = "body", mime: str = "image/png"):
    data = base64.b64encode(file.read_bytes()).decode()
    return person.page.evaluate(GIVEN, [where, kind, file.name, mime, data])


def loaded(person: Person, selector: str) -> list[str]:
    """The names of pictures that the browser has decoded."""
    script = (
        "s => [...document.querySelectorAll(s)].filter(i => i.naturalWidth > 0).map(i => i.alt)"
    )
    return person.page.evaluate(script, selector)


def test_pictures_are_chosen_dropped_and_pasted_sent_and_shown(
    visit: Callable[..., Person], seeing: Engine, tmp_path: Path
):
    red, green, blue, _ = save_pictures(tmp_path / "shown")
    with serving(seeing) as (address, _server):
        person = visit(address)
        page = person.page
        page.wait_for_selector("#add-picture:visible")
        person.set(temperature=0, max_tokens=8)
        page.set_input_files("#picture-file", [red, green])
        page.wait_for_selector("#pictures li:nth-child(2) img")
        assert not given(person, "dragover", blue)  # taken over from the browser
        assert page.locator("#composer.over").count() == 1
        assert not given(person, "drop", blue)
        page.wait_for_selector("#pictures li:nth-child(3) img")
        assert page.locator("#composer.over").count() == 0
        page.wait_for_function("document.querySelector('#pictures img').complete")
        assert loaded(person, "#pictures img") == ["red-0.png", "green-0.png", "blue-0.png"]
        page.screenshot(path=tmp_path / "waiting.png")
        page.click("#pictures li:nth-child(2) button")
        person.ask("Which colors are these?")
        person.wait()
        assert page.locator("#pictures li").count() == 0
        [message] = person.asked[0]["messages"]
        *pictures, text = message["content"]
        assert text == {"type": "text", "text": "Which colors are these?"}
        for part, file in zip(pictures, (red, blue), strict=True):
            sent = part["image_url"]["url"].partition(",")[2]
            assert base64.b64decode(sent) == file.read_bytes()
        assert loaded(person, ".shown img") == ["red-0.png", "blue-0.png"]
        assert page.locator(".answer[data-state=done]").count() == 1
        assert page.locator(".answer .text").inner_text()
        given(person, "paste", green, "#prompt")
        page.wait_for_selector("#pictures img")
        page.press("#prompt", "Enter")  # a picture alone
        person.wait()
        history = person.asked[1]["messages"]
        assert [m["role"] for m in history] == ["user", "assistant", "user"]
        assert history[0] == message
        assert [part["type"] for part in history[2]["content"]] == ["image_url"]
        page.screenshot(path=tmp_path / "shown.png", full_page=True)


def test_what_is_no_picture_is_told_and_nothing_is_sent(
    visit: Callable[..., Person], seeing: Engine, address: str, tmp_path: Path
):
    text = tmp_path / "notes.txt"
    text.write_text("notes")
    [red, *_] = save_pictures(tmp_path / "shown")
    with serving(seeing) as (own, _server):
        person = visit(own)
        person.page.wait_for_selector("#add-picture:visible")
        given(person, "drop", text, mime="text/plain")
        assert "notes.txt is not a picture" in person.page.inner_text("#status")
        broken = tmp_path / "broken.png"
        broken.write_bytes(red.read_bytes()[:50])
        person.expected = "status of 400"
        person.page.set_input_files("#picture-file", [broken])
        person.page.wait_for_selector("#pictures li")
        person.ask("which?")
        person.page.wait_for_selector(".answer[data-state=failed]")
        assert "damaged" in person.page.inner_text(".answer .trouble")
    person = visit(address)  # a server of text alone
    person.page.wait_for_selector("#columns select")
    assert not person.shown("#add-picture")
    given(person, "drop", red)
    person.page.wait_for_function("document.querySelector('#status').innerText.includes('text')")
    assert person.page.locator("#pictures li").count() == 0
