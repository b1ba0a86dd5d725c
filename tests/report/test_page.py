"""The page is self-contained, names what it leaves out, and escapes names."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from fasttrain.report import page
from fasttrain.report.runs import read_run, read_runs
from fasttrain.report.write import write_report

_VOID = {"meta", "link", "img", "br", "hr", "input"}


class Parsed(HTMLParser):
    """Parse all elements with their attributes, and the text. Fail if tags do not match."""

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
    path, size = write_report([simclr_run, dino_run], tmp_path_factory.mktemp("page") / "report.html")
    text = path.read_text()
    assert size == len(text.encode())
    return text


def test_page_loads_nothing_and_runs_nothing(both):
    parsed = Parsed(both)
    for tag, attributes in parsed.elements:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base")
        assert "style" not in attributes
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href", "srcset"):
            assert attributes.get(name, "#").startswith(("#", "data:image/webp;base64,"))
    css = re.search("<style>(.*?)</style>", both, re.DOTALL)[1]
    assert not re.search(r"url\(|@import", css)
    (policy,) = (m["content"] for m in parsed.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'")
    assert f"style-src 'sha256-{digest}'" in policy


def test_page_describes_every_picture_and_table(both):
    parsed = Parsed(both)
    images = parsed.all("img")
    # Neighbours of both; attention of the ViT: image, mean, three heads; its patches: image, components.
    assert len(images) == 2 * 8 * 7 + 6 * 5 + 6 * 2
    assert all(image["alt"] for image in images)
    drawings = [svg for svg in parsed.all("svg") if "aria-hidden" not in svg]
    assert len(drawings) == 2 + 11 + 4  # two bounds, curves, two maps per run
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in drawings)
    assert all(head.get("scope") in ("col", "row") for head in parsed.all("th"))
    identities = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(identities) == len(set(identities))
    assert {link["href"][1:] for link in parsed.all("a")} == set(identities)
    labels = " ".join(svg["aria-label"] for svg in drawings)
    assert all(line in labels for line in ("entropy from", "ceiling", "reconstruction from", "raw pixels"))


def test_page_has_commands_settings_and_curves(both, simclr_run, dino_run):
    text = Parsed(both).text
    assert "fasttrain train --method simclr --recipe cifar" in text
    assert "Settings that differ between the runs" in text
    assert f"fasttrain report {simclr_run} {dino_run}" in text
    assert (dino_run / "config.yaml").read_text().splitlines()[5] in text
    titles = "Loss|Information|Deficit|k-NN|Effective rank|Channel std|Learning rate|Data wait|torch"
    assert [title for title in titles.split("|") if title not in text] == []


def test_page_without_pictures_has_the_command_for_them(simclr_run):
    text = " ".join(Parsed(page.render(read_runs([simclr_run]))).text.split())
    assert re.search(r"nearest neighbours, attention and patches: fasttrain report", text)
    assert "Nearest neighbours" not in text


def _run(folder, config=None, summary=None, **values):
    """Write a run without a network."""
    folder.mkdir()
    lines = [{"step": n, "epoch": n / 2, "loss": 1.0 / n} | values for n in range(1, 5)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if config is not None:
        (folder / "config.yaml").write_text(config)
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_page_escapes_names(tmp_path):
    text = page.render(read_runs([_run(tmp_path / "<script>alert(1)<", "method: '</style><script>'\n")]))
    assert "<script" not in text
    assert "alert(1)" in Parsed(text).text


def test_warnings_about_runs_of_different_data(tmp_path, simclr_run):
    other = _run(tmp_path / "digits", "method: simclr\n")
    (warning, *_) = page.warnings(read_runs([simclr_run, other]))
    assert "different data" in warning
    assert "the embedded digits" in warning
    assert page.warnings(read_runs([simclr_run])) == []


def test_warnings_compare_data_in_memory_by_its_size(tmp_path):
    config = "method: simclr\ndata_path: 'in memory: array'\n"
    runs = [
        _run(tmp_path / name, config, summary)
        for name, summary in {"one": {"images": 4000}, "two": {"images": 70}, "three": None}.items()
    ]
    assert "different data (4,000 images; 70 images)" in page.warnings(read_runs(runs[:2]))[0]
    assert not any("different data" in line for line in page.warnings(read_runs(runs[1:])))


def test_page_of_a_run_without_a_bound(tmp_path):
    text = Parsed(page.render([read_run(_run(tmp_path / "bare", entropy=None), "bare")])).text
    assert "Left out: no step was logged" in text
    assert "Loss" in text


def test_images_of_many_runs_are_fewer():
    assert [page.images_of(runs, 1000) for runs in (1, 2, 50)] == [1000, 1000, 50]
    assert page.images_of(1, 10) == 10
