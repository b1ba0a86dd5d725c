"""Sample images, each with the images that have the nearest features."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .pictures import data_uri
from .samples import Sample

QUERIES, NEIGHBOURS = 8, 6


@dataclass(frozen=True)
class Shown:
    """A picture with its text, and whether it has the first image's class (None without labels)."""

    uri: str
    alt: str
    caption: str = ""
    same: bool | None = None


def nearest(rows: Tensor, queries: list[int], count: int) -> tuple[Tensor, Tensor]:
    """Return cosines and numbers [Q, count] of the unit rows [N, D] nearest to each query's row, except itself."""
    cosines = rows[queries] @ rows.T
    for at, query in enumerate(queries):
        cosines[at, query] = -2
    return cosines.topk(min(count, len(rows) - 1), dim=1)


def choose(sample: Sample, count: int) -> list[int]:
    """Return ``count`` images: one of each class in turn if there are labels, else evenly spaced."""
    total = len(sample.source)
    if sample.labels is None:
        return sorted({total * k // count for k in range(count)})
    seen: dict[int, int] = {}
    turn = []
    for i, label in enumerate(sample.labels):
        turn.append((seen.setdefault(label, 0), label, i))
        seen[label] += 1
    return [i for *_, i in sorted(turn)[:count]]


def table(sample: Sample) -> list[list[Shown]]:
    """Return a row per image: the image, then its neighbours by descending cosine."""
    queries = choose(sample, QUERIES)
    cosines, indices = nearest(sample.rows, queries, NEIGHBOURS)
    shown = list(dict.fromkeys([*queries, *indices.flatten().tolist()]))
    uris = dict(zip(shown, map(data_uri, sample.pictures(shown)), strict=True))
    rows = []
    for query, near, angles in zip(queries, indices.tolist(), cosines.tolist(), strict=True):
        row = [Shown(uris[query], f"Image: {sample.describe(query)}", _class(sample, query))]
        for place, (i, cosine) in enumerate(zip(near, angles, strict=True), 1):
            alt = f"Neighbour {place}: {sample.describe(i)}, cosine {cosine:.3f}"
            same = None if sample.labels is None else sample.labels[i] == sample.labels[query]
            row.append(Shown(uris[i], alt, f"{cosine:.3f}", same))
        rows.append(row)
    return rows


def _class(sample: Sample, i: int) -> str:
    return "" if sample.labels is None else sample.class_of(sample.labels[i])
