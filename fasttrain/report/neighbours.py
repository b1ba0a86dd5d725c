"""What a network takes for alike: sample images, each with those whose features are nearest."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .pictures import data_uri
from .samples import Sample

QUERIES, NEIGHBOURS = 8, 6


@dataclass(frozen=True)
class Shown:
    """A picture with its text, and whether it is of the class that was asked for (None without labels)."""

    uri: str
    alt: str
    caption: str = ""
    same: bool | None = None


def nearest(rows: Tensor, queries: list[int], count: int) -> tuple[Tensor, Tensor]:
    """Cosines and numbers [Q, count] of the rows [N, D], of unit norm, nearest to those of ``queries``, not itself."""
    cosines = rows[queries] @ rows.T
    for at, query in enumerate(queries):
        cosines[at, query] = -2
    return cosines.topk(min(count, len(rows) - 1), dim=1)


def choose(sample: Sample, count: int) -> list[int]:
    """``count`` images that differ: one of each class in turn where there are labels, else evenly spread."""
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
    """A row an image: itself, then its nearest by cosine, the nearest first."""
    queries = choose(sample, QUERIES)
    cosines, found = nearest(sample.rows, queries, NEIGHBOURS)
    wanted = list(dict.fromkeys([*queries, *found.flatten().tolist()]))
    uris = dict(zip(wanted, map(data_uri, sample.pictures(wanted)), strict=True))
    rows = []
    for query, near, angles in zip(queries, found.tolist(), cosines.tolist(), strict=True):
        row = [Shown(uris[query], f"Image: {sample.describe(query)}", _class(sample, query))]
        for place, (i, cosine) in enumerate(zip(near, angles, strict=True), 1):
            alt = f"Neighbour {place}: {sample.describe(i)}, cosine {cosine:.3f}"
            same = None if sample.labels is None else sample.labels[i] == sample.labels[query]
            row.append(Shown(uris[i], alt, f"{cosine:.3f}", same))
        rows.append(row)
    return rows


def _class(sample: Sample, i: int) -> str:
    return "" if sample.labels is None else sample.class_of(sample.labels[i])
