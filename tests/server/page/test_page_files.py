"""The page's files: served whole, with headers that let a browser run nothing else."""

import re
from pathlib import Path

import httpx
import pytest
from visitor import Person

from lorakit.server.page import FOLDER

FILES = sorted(path.name for path in FOLDER.iterdir())


@pytest.mark.parametrize("name", ["", *FILES])
def test_every_file_is_served_under_a_strict_policy(address: str, name: str):
    response = httpx.get(f"{address}/page/{name}" if name else address)
    assert response.status_code == 200
    assert response.content == Path(FOLDER, name or "index.html").read_bytes()
    policy = response.headers["Content-Security-Policy"].split("; ")
    assert {"default-src 'none'", "script-src 'self'", "connect-src 'self'"} <= set(policy)
    assert {"frame-ancestors 'none'", "require-trusted-types-for 'script'"} <= set(policy)
    assert "unsafe" not in str(policy)
    assert response.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("name", FILES)
def test_no_file_names_another_host(name: str):
    text = (FOLDER / name).read_text().replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|//\w+\.\w+/", text)


def test_text_that_became_markup_would_be_stopped_by_the_browser(person: Person):
    person.expected = "TrustedHTML"
    refused = person.page.evaluate(
        """() => {
          try {
            document.body.innerHTML = "<img src=x onerror=alert(1)>";
            return "";
          } catch (error) {
            return error.name;
          }
        }"""
    )
    assert refused == "TypeError"
