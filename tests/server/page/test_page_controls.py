"""The page's settings, columns and keys."""

from collections.abc import Callable

from visitor import BASE, Person

from lorakit.engine.engine import Engine


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
