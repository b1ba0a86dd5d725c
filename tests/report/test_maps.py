"""The map is scikit-learn's, and dots are in their places."""

import re
import sys
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


def test_project_returns_scikit_learn_s_pca_and_repeatable_tsne():
    rows = _rows(40)
    pca, tsne = project(_sample(rows))
    expected = PCA(2).fit(rows.numpy())
    np.testing.assert_allclose(np.abs(pca.places), np.abs(expected.transform(rows.numpy())), atol=1e-5)
    assert f"{100 * expected.explained_variance_ratio_.sum():.0f} %" in pca.how
    assert (pca.name, tsne.name, tsne.places.shape) == ("PCA", "t-SNE", (40, 2))
    np.testing.assert_array_equal(tsne.places, project(_sample(rows))[1].places)


def test_project_keeps_groups_apart():
    noise = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    rows = torch.nn.functional.normalize(torch.eye(3).repeat_interleave(20, 0) + 0.01 * noise, dim=1)
    places = project(_sample(rows))[1].places
    means = np.stack([places[20 * k : 20 * k + 20].mean(0) for k in range(3)])
    assert ((places[:, None] - means) ** 2).sum(-1).argmin(1).tolist() == [0] * 20 + [1] * 20 + [2] * 20


@pytest.mark.parametrize(("rows", "problem"), [(_rows(5), "got 5"), (torch.ones(20, 4) / 2, "collapse")])
def test_project_refuses_few_or_equal_rows(rows, problem):
    with pytest.raises(ConfigError, match=problem):
        project(_sample(rows))


def test_project_of_one_dimension_has_two():
    assert project(_sample(torch.linspace(-1, 1, 20)[:, None]))[0].places.shape == (20, 2)


def test_project_without_scikit_learn_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.decomposition", None)
    with pytest.raises(ConfigError, match="pip install scikit-learn"):
        project(_sample(_rows(20)))


def test_draw_colours_and_names_the_classes():
    places = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 5.0]])
    svg = draw(Map("PCA", places, ""), _sample(None, [1, 1, 0], ("cat", "a dog of a long name")))
    assert set(re.findall(r'<g class="(\w+)">', svg)) == {"k0", "k1"}
    spots = {n: (float(x), float(y)) for x, y, n in re.findall(r'cx="(.*?)" cy="(.*?)" .*?<title>image (\d)', svg)}
    assert spots["1"][0] - spots["0"][0] == pytest.approx(2 * (spots["0"][1] - spots["2"][1]), abs=0.3)
    assert all(text in svg for text in ("&lt;x&gt;", ">cat</text>", ">a dog of a lo…</text>"))
    plain = draw(Map("PCA", places, ""), _sample(None))
    assert re.findall(r'<g class="(\w+)">', plain) == ["other"]
    assert "<text" not in plain


def test_colours_go_to_the_most_frequent_classes():
    labels = [*range(30), *range(15, 25)]
    assert colours_of(labels) == {label: colour for colour, label in enumerate(range(15, 25))}
