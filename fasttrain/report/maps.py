"""Maps of a network's features in two dimensions: scikit-learn's PCA and t-SNE, drawn as SVG."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from ..errors import ConfigError
from .charts import picture
from .samples import Sample, class_name

COLOURS = 10
"""Number of classes with their own colour. The rarest classes are grey."""
_SIDE, _MARGIN = 330, 16
_LEAST = 6  # with fewer images, neighbourhoods have no meaning


@dataclass(frozen=True)
class Map:
    """Places [N, 2] of N images, and a description of the projection."""

    name: str
    places: NDArray[np.float64]
    how: str


def project(sample: Sample) -> list[Map]:
    """Return PCA and t-SNE of the sample's unit-norm features.

    Raise ConfigError without scikit-learn, with too few images, or if all features are the same.
    """
    try:
        from sklearn.decomposition import PCA
        from sklearn.manifold import TSNE
    except ImportError:
        raise ConfigError("the map needs scikit-learn. Type: pip install scikit-learn") from None
    rows = sample.rows.double().numpy()
    if len(rows) < _LEAST:
        raise ConfigError(f"the map needs at least {_LEAST} images, got {len(rows)}")
    if rows.std(0).max() < 1e-6:
        raise ConfigError("all images have the same features (a collapse)")
    pca = PCA(2, random_state=0) if rows.shape[1] > 1 else PCA(1)
    places = pca.fit_transform(rows)
    places = np.pad(places, ((0, 0), (0, 2 - places.shape[1])))
    explained = 100 * pca.explained_variance_ratio_.sum()
    maps = [Map("PCA", places, f"The two directions of greatest variance, {explained:.0f} % of the total.")]
    perplexity = min(30, (len(rows) - 1) // 3)
    tsne = TSNE(perplexity=perplexity, init="random" if rows.shape[1] < 2 else "pca", random_state=0)
    how = f"Perplexity {perplexity}. It shows neighbourhoods; distances between groups have no meaning."
    return [*maps, Map("t-SNE", tsne.fit_transform(rows), how)]


def draw(map_: Map, sample: Sample) -> Markup:
    """Draw a dot per image, with its class's colour if there are labels, and its name on hover."""
    low, high = map_.places.min(0), map_.places.max(0)
    scale = (_SIDE - 2 * _MARGIN) / max(float((high - low).max()), 1e-12)
    spots = _SIDE / 2 + (map_.places - (low + high) / 2) * scale * (1, -1)
    labels = sample.labels or [0] * len(spots)
    colours = colours_of(labels) if sample.labels else {}
    groups: dict[int | None, list[str]] = {}
    for i, ((x, y), label) in enumerate(zip(spots, labels, strict=True)):
        title = escape(sample.describe(i))
        dot = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6"><title>{title}</title></circle>'
        groups.setdefault(colours.get(label), []).append(dot)
    parts = [
        f'<g class="{"other" if colour is None else f"k{colour}"}">{"".join(dots)}</g>'
        for colour, dots in sorted(groups.items(), key=lambda item: -1 if item[0] is None else item[0])
    ]
    for label, colour in colours.items():
        x, y = np.median(spots[np.array(labels) == label], axis=0)
        name = class_name(sample.source.classes, label)
        text = escape(name if len(name) <= 14 else name[:13] + "…")
        parts.append(f'<text class="name k{colour}" x="{x:.1f}" y="{y + 5:.1f}" text-anchor="middle">{text}</text>')
    classes = f" of {len(set(labels))} classes" if sample.labels else ""
    return picture(f"{map_.name} of {len(spots)} images{classes}", "".join(parts), _SIDE, _SIDE)


def colours_of(labels: Sequence[int]) -> dict[int, int]:
    """Return the colour numbers of the most frequent classes. Among equally frequent ones, the first are chosen."""
    frequent = sorted(Counter(labels).items(), key=lambda item: (-item[1], item[0]))[:COLOURS]
    return {label: colour for colour, label in enumerate(sorted(label for label, _ in frequent))}
