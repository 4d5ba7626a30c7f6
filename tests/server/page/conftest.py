"""The page's server over taught models, and its visitors."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from visitor import BASE, WIDE, Person, serving

from lorakit.engine.engine import Engine
from lorakit.engine.open_engine import open_engine
from taught import save_taught_models


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    base, adapters = save_taught_models(tmp_path_factory.mktemp("models"))
    engine = open_engine(str(base), adapters, dtype="float32", max_rows=2)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def address(engine: Engine) -> Iterator[str]:
    with serving(engine) as (address, _):
        yield address


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
        context.set_default_timeout(60_000)
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
