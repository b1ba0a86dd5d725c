"""The page in a real browser: complete, self-contained, readable on a phone and in the dark."""

import shutil

import pytest

from fasttrain.report.write import write_report

sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
_BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_BROWSER is None, reason="needs Chromium; apt-get install chromium"),
]


@pytest.fixture(scope="module")
def path(simclr_run, dino_run, tmp_path_factory):
    path, size = write_report([simclr_run, dino_run], tmp_path_factory.mktemp("browser") / "report.html")
    assert size < 5e6
    return path


@pytest.fixture(scope="module")
def open_page(path):
    """Return a function that opens the report in a page with these options, and collects requests and problems."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=_BROWSER, args=["--no-sandbox"])

        def open_page(width=1280, **options):
            page = browser.new_page(viewport={"width": width, "height": 800}, **options)
            page.requests, page.problems = [], []
            page.on("request", lambda request: page.requests.append(request.url))
            page.on("console", lambda message: page.problems.append(message.text))
            page.on("pageerror", lambda error: page.problems.append(str(error)))
            page.goto(path.resolve().as_uri())
            return page

        yield open_page
        browser.close()


def test_page_shows_everything_and_loads_nothing(open_page, path):
    page = open_page()
    assert [url for url in page.requests if not url.startswith("data:")] == [path.resolve().as_uri()]
    assert page.problems == []
    assert page.evaluate("document.images.length") == 2 * 8 * 7 + 6 * 5 + 6 * 2
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert page.evaluate("[...document.querySelectorAll('svg[role=img]')].every(s => s.clientHeight > 100)")
    # The page's own policy accepts its style sheet.
    assert page.evaluate("getComputedStyle(document.querySelector('.line.c1')).strokeDasharray") != "none"


@pytest.mark.parametrize("width", [320, 375, 768, 1280])
def test_page_fits_the_width_of_the_screen(open_page, width):
    page = open_page(width)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    sizes = "[...document.querySelectorAll('p, td, th, li')].map(e => parseFloat(getComputedStyle(e).fontSize))"
    assert min(page.evaluate(sizes)) >= 11


_CONTRAST = """
names => {
  const canvas = new OffscreenCanvas(1, 1).getContext('2d');
  const light = (colour) => {
    canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map(v => v / 255)
      .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const value = (name) => light(getComputedStyle(document.documentElement).getPropertyValue(name).trim());
  const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  return Math.min(...names.flatMap(n => ['--paper', '--panel'].map(g => ratio(value(n), value(g)))));
}
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_colours_have_enough_contrast(open_page, scheme):
    """WCAG 2: text 4.5 to 1, lines 3 to 1. Dots of classes need 2 to 1, because the classes' names are next to them."""
    page = open_page(color_scheme=scheme)
    for names, least in (
        (["--ink", "--faint", "--link"], 4.5),
        ([f"--c{i}" for i in range(6)], 3),
        ([f"--k{i}" for i in range(10)], 2),
    ):
        assert page.evaluate(_CONTRAST, names) >= least
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
