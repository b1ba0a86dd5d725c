"""The map is scikit-learn's, and a dot is where its image belongs."""

import builtins
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from fasttrain.errors import ConfigError
from fasttrain.report.maps import Map, colours_of, draw, project


def _sample(rows, labels=None, classes=()):
    source = SimpleNamespace(classes=classes)
    return SimpleNamespace(rows=rows, labels=labels, source=source, describe=lambda i: f"image {i} <x>")


def _rows(count, width=6):
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.normalize(rows, dim=1)


def test_pca_is_the_two_directions_of_greatest_variance():
    rows = _rows(40)
    first, second = project(_sample(rows))
    expected = PCA(2).fit(rows.numpy())
    np.testing.assert_allclose(np.abs(first.places), np.abs(expected.transform(rows.numpy())), atol=1e-5)
    assert f"{100 * expected.explained_variance_ratio_.sum():.0f} %" in first.how
    assert (first.name, second.name) == ("PCA", "t-SNE")
    assert second.places.shape == (40, 2)
    np.testing.assert_array_equal(second.places, project(_sample(rows))[1].places)  # the same every time


def test_groups_that_are_apart_stay_apart():
    centres = torch.eye(3).repeat_interleave(20, 0)
    rows = torch.nn.functional.normalize(centres + 0.01 * torch.randn(60, 3), dim=1)
    places = project(_sample(rows))[1].places
    means = np.stack([places[20 * k : 20 * k + 20].mean(0) for k in range(3)])
    nearest = ((places[:, None] - means) ** 2).sum(-1).argmin(1)
    assert nearest.tolist() == [0] * 20 + [1] * 20 + [2] * 20


@pytest.mark.parametrize(
    ("rows", "message"),
    [(_rows(5), "5 images are too few"), (torch.ones(20, 4) / 2, "a collapse"), (_rows(1), "1 images are too few")],
)
def test_what_cannot_be_mapped_is_said(rows, message):
    with pytest.raises(ConfigError, match=message):
        project(_sample(rows))


def test_one_dimension_is_enough():
    assert project(_sample(torch.linspace(-1, 1, 20)[:, None]))[0].places.shape == (20, 2)


def test_without_scikit_learn_the_line_says_what_to_type(monkeypatch):
    real = builtins.__import__

    def without(name, *more):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match="needs scikit-learn; type: pip install scikit-learn"):
        project(_sample(_rows(20)))


def test_dots_are_coloured_named_and_in_their_places():
    places = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 5.0]])
    svg = draw(Map("PCA", places, ""), _sample(None, [1, 1, 0], ("cat", "a dog of a long name")))
    groups = dict(re.findall(r'<g class="(\w+)">(.*?)</g>', svg))
    assert groups.keys() == {"k0", "k1"}
    spots = {n: (float(x), float(y)) for x, y, n in re.findall(r'cx="(.*?)" cy="(.*?)" .*?<title>image (\d)', svg)}
    assert spots["1"][0] - spots["0"][0] == pytest.approx(2 * (spots["0"][1] - spots["2"][1]), abs=0.3)
    assert "&lt;x&gt;" in svg
    assert ">cat</text>" in svg
    assert ">a dog of a lo…</text>" in svg


def test_without_labels_there_are_no_colours():
    svg = draw(Map("PCA", np.random.default_rng(0).normal(size=(5, 2)), ""), _sample(None))
    assert re.findall(r'<g class="(\w+)">', svg) == ["other"]
    assert "<text" not in svg


def test_the_most_frequent_classes_get_the_colours():
    labels = [*range(30), *range(15, 25)]
    assert colours_of(labels) == {label: colour for colour, label in enumerate(range(15, 25))}
