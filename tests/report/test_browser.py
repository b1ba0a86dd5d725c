"""The page in a real browser: all there, nothing loaded or refused, readable on a phone and in the dark."""

import pytest

from fasttrain.cli.report import report
from tests.report import chromium

pytestmark = pytest.mark.skipif(chromium.find() is None, reason="no Chromium here; apt-get install chromium")


@pytest.fixture(scope="module")
def browser():
    page = chromium.Page()
    yield page
    page.close()


@pytest.fixture(scope="module")
def path(simclr_run, dino_run, tmp_path_factory):
    path, size = report([simclr_run, dino_run], tmp_path_factory.mktemp("browser") / "report.html")
    assert size < 5e6
    return path


def test_it_shows_everything_and_asks_for_nothing(browser, path):
    browser.open(path)
    asked = [e["params"]["request"]["url"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [path.resolve().as_uri()]
    assert [e for e in browser.events if e.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown")] == []
    assert browser.evaluate("document.images.length") == 2 * 8 * 7 + 6 * 5
    assert browser.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert browser.evaluate("[...document.querySelectorAll('svg[role=img]')].every(s => s.clientHeight > 100)")
    style = "getComputedStyle(document.querySelector('.line.c1')).strokeDasharray"
    assert browser.evaluate(style) != "none"  # the style sheet passed the page's own policy


@pytest.mark.parametrize("width", [320, 375, 768, 1280])
def test_it_is_as_wide_as_the_screen(browser, path, width):
    browser.open(path, width=width, height=700)
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    sizes = "[...document.querySelectorAll('p, td, th, li')].map(e => parseFloat(getComputedStyle(e).fontSize))"
    assert min(browser.evaluate(sizes)) >= 11


_CONTRAST = """
(() => {
  const canvas = new OffscreenCanvas(1, 1).getContext('2d');
  const light = (colour) => {
    canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map(v => v / 255)
      .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const value = (name) => light(getComputedStyle(document.documentElement).getPropertyValue(name).trim());
  const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  const names = NAMES;
  return Math.min(...names.flatMap(n => GROUNDS.map(g => ratio(value(n), value(g)))));
})()
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_stand_out(browser, path, scheme):
    """WCAG 2: text 4.5 to 1, lines 3 to 1; the dots of classes carry their names too, and come at 2 to 1."""
    browser.open(path, scheme=scheme)
    grounds = str(["--paper", "--panel"])
    for names, least in (
        (["--ink", "--faint", "--link"], 4.5),
        ([f"--c{i}" for i in range(6)], 3),
        ([f"--k{i}" for i in range(10)], 2),
    ):
        assert browser.evaluate(_CONTRAST.replace("NAMES", str(names)).replace("GROUNDS", grounds)) >= least
    dark = browser.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert dark == (scheme == "dark")
    body = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (body == "rgb(255, 255, 255)") != dark
