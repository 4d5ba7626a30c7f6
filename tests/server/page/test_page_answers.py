"""Answers on the page: side by side, streamed, measured, stopped and compared."""

import re

import pytest
from visitor import BASE, LONG, Person, until

from lorakit.engine.engine import Engine
from matrix import few
from taught import BASE_SAYS, ENDLESS_SAYS, PROMPT, SHOP_SAYS


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
    person.wait_for_text("endless", ENDLESS_SAYS)
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


def test_a_page_that_is_closed_frees_its_rows(person: Person, engine: Engine):
    person.choose("endless", "endless")
    person.set(max_tokens=LONG)
    person.ask()
    person.wait_for_text("endless", ENDLESS_SAYS)
    assert engine.running() == 2
    person.page.goto("about:blank")
    assert until(lambda: engine.running() == 0)


@pytest.mark.parametrize("size", few([1, 2, 3, 5, 1000], 1))
def test_events_are_read_whatever_chunks_they_come_in(person: Person, size: int):
    stream = ': a comment\n\ndata: {"ä": "€ 🙂"}\r\n\r\ndata:one\ndata:  two\n\nid: 3\n\ndata: cut'
    events = person.page.evaluate(
        """async ([bytes, size]) => {
          const { eventsOf } = await import("/page/events.js");
          const body = new ReadableStream({
            start(controller) {
              for (let i = 0; i < bytes.length; i += size)
                controller.enqueue(new Uint8Array(bytes.slice(i, i + size)));
              controller.close();
            },
          });
          const events = [];
          for await (const data of eventsOf(body)) events.push(data);
          return events;
        }""",
        [list(stream.encode()), size],
    )
    assert events == ['{"ä": "€ 🙂"}', "one\n two"]  # what was cut off is no event
