"""The page of the training service: who trains what, and a chat with what was saved."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from visitor import PHONE, WIDE, Person, serving, until

from browsers import FAINT, LEAST_CONTRAST
from lorakit.engine.engine import Engine
from lorakit.server.options import ApiKey
from matrix import few
from taught import PROMPT

tinker = pytest.importorskip("tinker")

SCREENS = {
    f"{name}-{scheme}": (size, scheme)
    for name, size in {"wide": WIDE, "phone": PHONE}.items()
    for scheme in ("light", "dark")
}


@pytest.fixture
def address(engine: Engine, tmp_path: Path) -> Iterator[str]:
    keys = ApiKey("tml-ann", "ann"), ApiKey("tml-bob", "bob")
    options = {"api_keys": keys, "admin_key": "tml-admin", "training_state": tmp_path / "state"}
    with serving(engine, **options) as (address, _):
        yield address


@pytest.fixture
def train(address: str) -> Iterator[Callable[..., Any]]:
    """Makes a run of a key's and some steps of it."""
    stack = ExitStack()

    def train(key: str, name: str, steps: int = 3) -> Any:
        client = stack.enter_context(tinker.ServiceClient(base_url=address, api_key=key))
        run = client.create_lora_training_client(
            "taught-base", rank=4, seed=1, user_metadata={"name": name}
        ).result()
        for _ in range(steps):
            step(run)
        return run

    with stack:
        yield train


def step(run: Any) -> None:
    ids = [5, 9, 13, 60, 61, 7, 3, 44, 8]
    row = tinker.types.Datum(
        model_input=tinker.types.ModelInput.from_ints(ids[:-1]),
        loss_fn_inputs={
            "target_tokens": tinker.types.TensorData(data=ids[1:], dtype="int64", shape=[8])
        },
    )
    run.forward_backward([row], "cross_entropy")
    run.optim_step(tinker.types.AdamParams(learning_rate=1e-3)).result()


def use_key(person: Person, key: str) -> None:
    if not person.page.locator("#key").is_visible():
        person.page.click("#change-key")
    person.page.fill("#key", key)
    person.page.press("#key", "Enter")
    person.page.wait_for_selector("#runs:visible")


def test_a_key_sees_its_runs_as_they_go_and_chats_with_what_is_saved(
    visit: Callable[..., Person], address: str, train: Callable[..., Any], tmp_path: Path
):
    run = train("tml-ann", "parrot")
    train("tml-bob", "secret-run")
    path = run.save_state("third").result().path
    person = visit(f"{address}/training")
    person.expected = "status of 401"
    page = person.page
    page.wait_for_selector("#key-form:visible")
    use_key(person, "tml-ann")
    assert person.shown("#runs .name") == ["parrot"]
    assert person.shown("#runs .step") == ["3"]
    assert person.shown("#runs .state") == ["training"]
    assert person.shown("#whose") == ["Key ann"]
    assert person.shown("#run-title") == ["parrot"]
    assert "secret-run" not in page.content()
    first, last = (float(text) for text in _losses(page))
    assert last < first
    assert page.locator("#chart .line").count() == 1
    assert person.shown("#checkpoints .path")[1] == path
    step(run)  # it shows by itself
    assert until(lambda: person.shown("#runs .step") == ["4"])

    for place in (0, 1):  # the run as it is now, and what was saved
        page.locator("#checkpoints .talk").nth(place).click()
        page.fill("#prompt", PROMPT)
        page.press("#prompt", "Enter")
        page.wait_for_selector(".answer[data-state=done]")
        assert len(person.shown("#turns .answer .text")[0]) > 5
    assert [body["model"] for body in person.asked] == [path.rsplit("/", 2)[0], path]
    page.fill("#prompt", "And now?")
    page.click("#send")
    assert until(lambda: page.locator(".answer[data-state=done]").count() == 2)
    assert [m["role"] for m in person.asked[-1]["messages"]] == ["user", "assistant", "user"]

    use_key(person, "tml-admin")
    assert until(lambda: len(person.shown("#runs .name")) == 2)
    assert sorted(person.shown("#runs .key")) == ["ann", "bob"]
    page.get_by_role("button", name="secret-run", exact=True).click()
    assert person.shown("#run-title") == ["secret-run"]
    use_key(person, "tml-bob")
    assert until(lambda: len(person.shown("#runs .name")) == 1)
    assert person.shown("#runs .name") == ["secret-run"]


def _losses(page: Any) -> list[str]:
    """The first and the last loss, as the chart tells those who do not see it."""
    words = page.locator("#chart svg").get_attribute("aria-label").split()
    return [words[1], words[words.index("step") + 2]]


@pytest.mark.parametrize(("size", "scheme"), few(SCREENS, "phone-light", "wide-dark"))
def test_the_page_fits_the_screen_and_can_be_read(
    visit: Callable[..., Person],
    address: str,
    train: Callable[..., Any],
    size: tuple[int, int],
    scheme: str,
    tmp_path: Path,
):
    name = "pirate answers, second try with a lower rate"
    run = train("tml-ann", name, steps=6)
    run.save_state("kept", ttl_seconds=7200).result()
    train("tml-bob", "arithmetic", steps=4)
    person = visit(f"{address}/training", size, scheme)
    person.expected = "status of 401"
    page = person.page
    use_key(person, "tml-admin")
    page.get_by_role("button", name=name, exact=True).click()
    page.locator("#checkpoints .talk").first.click()
    page.fill("#prompt", PROMPT)
    page.press("#prompt", "Enter")
    page.wait_for_selector(".answer[data-state=done]")
    page.screenshot(path=tmp_path / "training.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") == size[0]
    found = page.evaluate(FAINT, LEAST_CONTRAST)
    assert found["seen"] > 30
    assert found["faint"] == []


def test_without_keys_the_usual_one_is_tried_and_another_can_be_given(
    visit: Callable[..., Person], engine: Engine, tmp_path: Path
):
    with (
        serving(engine, training_state=tmp_path / "open") as (address, _),
        tinker.ServiceClient(base_url=address, api_key="tml-local") as client,
    ):
        client.create_lora_training_client("taught-base", rank=2).result()
        person = visit(address)
        person.page.click("#to-training")  # the pages lead to each other
        person.page.wait_for_selector("#runs:visible")
        assert len(person.shown("#runs .name")) == 1
        assert person.shown("#chart") == ["No step has been made yet."]
        person.page.click("#change-key")
        person.page.fill("#key", "tml-other")
        person.page.press("#key", "Enter")
        person.page.wait_for_selector("#empty:visible")
        assert person.shown("#empty") == ["This key has no runs yet."]
        person.page.get_by_role("link", name="Compare models").click()
        person.page.wait_for_selector("#columns select:visible")


def test_without_the_service_there_is_neither_its_page_nor_a_link_to_it(
    visit: Callable[..., Person], engine: Engine
):
    with serving(engine) as (address, _):
        person = visit(address)
        person.page.wait_for_selector("#columns select >> nth=0")
        assert person.shown("#to-training") == []
        assert httpx.get(f"{address}/training").status_code == 404
