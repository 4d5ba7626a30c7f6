"""A real browser for tests of pages, and what is asked of every page in it."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

LEAST_CONTRAST = 4.5  # WCAG 2.2, 1.4.3, level AA

# Every visible text with its contrast, where that is below `least`.
FAINT = """least => {
  const numbers = color => color.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map(c => c / 255)
    .map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const color = numbers(getComputedStyle(e).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const faint = [];
  let seen = 0;
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || !element.checkVisibility({visibilityProperty: true}))
      continue;
    seen += 1;
    const pair = [getComputedStyle(element).color, null].map((c, i) =>
      luminance(i ? behind(element) : numbers(c))).sort((a, b) => b - a);
    const ratio = (pair[0] + .05) / (pair[1] + .05);
    if (ratio < least) faint.push([texts.currentNode.data.trim(), ratio]);
  }
  return {seen, faint};
}"""


def started_browser(*options: str) -> Iterator[Any]:
    """A Chromium or Chrome that is on the path, until the iterator goes on; skips without one.

    `options` are of its command line.
    """
    reason = "playwright is not installed"
    playwright = pytest.importorskip("playwright.sync_api", reason=reason)
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no browser is installed: none of {', '.join(names)} is on the path")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox", *options])
        yield browser
        browser.close()
