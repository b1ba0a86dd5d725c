"""The page holds everything itself, says what it leaves out, and takes no name for markup."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from fasttrain.cli.report import report
from fasttrain.report import page
from fasttrain.report.runs import read_run, read_runs

_VOID = {"meta", "link", "img", "br", "hr", "input"}


class Parsed(HTMLParser):
    """Every element with its attributes, and the text; fails for tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.text = [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def both(simclr_run, dino_run, tmp_path_factory):
    """The page of two runs, with all its pictures."""
    path, size = report([simclr_run, dino_run], tmp_path_factory.mktemp("page") / "report.html")
    text = path.read_text()
    assert size == len(text.encode())
    return text


def test_it_loads_nothing_and_runs_nothing(both):
    parsed = Parsed(both)
    for tag, attributes in parsed.elements:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base")
        assert "style" not in attributes
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href", "srcset"):
            assert attributes.get(name, "#").startswith(("#", "data:image/webp;base64,"))
    css = re.search("<style>(.*?)</style>", both, re.DOTALL)[1]
    assert "url(" not in css
    assert "@import" not in css
    (policy,) = (m["content"] for m in parsed.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")


def test_every_picture_and_table_says_what_it_is(both):
    parsed = Parsed(both)
    images = parsed.all("img")
    assert len(images) == 2 * 8 * 7 + 6 * 5  # neighbours of both, attention of the ViT: itself, mean, three heads
    assert all(image["alt"] for image in images)
    drawings = [svg for svg in parsed.all("svg") if "aria-hidden" not in svg]
    assert len(drawings) == 2 + 11 + 4  # a bound each, curves, two maps each
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in drawings)
    assert all(head.get("scope") in ("col", "row") for head in parsed.all("th"))
    identities = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(identities) == len(set(identities))
    assert {link["href"][1:] for link in parsed.all("a")} == set(identities)


def test_it_says_how_to_run_again_and_what_differs(both, simclr_run, dino_run):
    text = Parsed(both).text
    assert "fasttrain train --method simclr --recipe cifar" in text
    assert "Settings in which the runs differ" in text
    assert f"fasttrain report {simclr_run} {dino_run}" in text
    assert "torch" in text
    assert (dino_run / "config.yaml").read_text().splitlines()[5] in text


def test_every_curve_that_was_logged_is_there(both):
    text = Parsed(both).text
    for title in (
        "Loss",
        "Information",
        "Deficit",
        "k-NN",
        "Effective rank",
        "Channel std",
        "Learning rate",
        "Data wait",
    ):
        assert title in text
    labels = " ".join(svg.get("aria-label", "") for svg in Parsed(both).all("svg"))
    for line in ("entropy from", "ceiling", "reconstruction from", "raw pixels"):
        assert line in labels


def test_without_pictures_it_says_how_they_come(simclr_run):
    text = Parsed(page.render(read_runs([simclr_run]))).text
    assert "Nearest neighbours" not in text
    assert "With a map of the features, nearest neighbours and attention: fasttrain report" in " ".join(text.split())


def _made_up(folder, **values):
    folder.mkdir()
    lines = [{"step": n, "epoch": n / 2, "loss": 1.0 / n} | values for n in range(1, 5)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_names_are_no_markup(tmp_path):
    hostile = _made_up(tmp_path / "<script>alert(1)<")
    (hostile / "config.yaml").write_text("method: '</style><script>'\n")
    text = page.render(read_runs([hostile]))
    assert "<script" not in text
    assert "alert(1)" in Parsed(text).text


def test_runs_of_different_data_are_warned_of(tmp_path, simclr_run):
    other = _made_up(tmp_path / "digits")
    (other / "config.yaml").write_text("method: simclr\n")
    (warning, *_) = page.warnings(read_runs([simclr_run, other]))
    assert "different data" in warning
    assert "the embedded digits" in warning
    assert not any("different data" in line for line in page.warnings(read_runs([simclr_run])))


def test_as_many_images_in_memory_are_no_others(tmp_path):
    runs = [_made_up(tmp_path / name) for name in ("one", "two", "three")]
    for run, images in zip(runs, (4000, 70, None), strict=True):
        (run / "config.yaml").write_text("method: simclr\ndata_path: 'in memory: array'\n")
        if images:
            (run / "summary.json").write_text(json.dumps({"images": images}))
    assert "different data (4,000 images; 70 images)" in page.warnings(read_runs(runs[:2]))[0]
    assert not any("different data" in line for line in page.warnings(read_runs(runs[1:])))


def test_a_run_without_any_measure_of_the_bound(tmp_path):
    text = Parsed(page.render([read_run(_made_up(tmp_path / "bare", entropy=None), "bare")])).text
    assert "Left out: no step was logged" in text
    assert "Loss" in text


def test_maps_of_many_runs_have_fewer_dots():
    assert page.images_of(1, 1000) == page.images_of(2, 1000) == 1000
    assert page.images_of(50, 1000) == 50
    assert page.images_of(1, 10) == 10
