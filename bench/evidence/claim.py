"""Test the paper's claim on the digits: with ER, smaller batches and a weaker EMA lose less accuracy.

    python -m bench.evidence.claim

The runs are {SimCLR, BYOL, DINO} x {base, twin}. All runs of a method have the same flags except the batch (B or B/8)
or the teacher's momentum, which is constant (0.996 or 0.8). The learning rate of a method is the same in all its runs
and does not follow the batch. B/8 has two forms. With the same number of updates, only the data per batch changes. With
the same number of epochs, as in the paper, a run makes 8 times as many updates. On 4,000 digits 930 updates do not
train any method to the end, so the additional updates help more than the smaller batch harms. The loss is k-NN accuracy
in points, as a mean over seeds. The paper's is ImageNet top-1 (arXiv 2307.10907, Table 2).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import mean

from bench.evidence.campaign import DOCS, EVIDENCE, Row, Run, parser, run_all, table

_BATCH = 128
_SMALL = _BATCH // 8
_PEAK = 3e-3  # learning rate, for every batch
_EPOCHS, _WARMUP = 30, 2
_UPDATES, _EPOCHS_TOO = "B/8", "B/8 epochs"
PAPER = {
    ("dino", "B/8"): (6.76, 2.35),
    ("dino", "EMA 0.8"): (8.25, 0.92),
    ("byol", "B/8"): (23.65, 2.35),
    ("byol", "EMA 0.8"): (2.63, 0.41),
    ("simclr", "B/8"): (2.17, 1.01),
}
_CHANGES = [*PAPER, *((method, _EPOCHS_TOO) for method in ("dino", "byol", "simclr"))]


def run(method: str, twin: str, change: str, seed: int) -> Run:
    """Return one run of the design."""
    batch = _SMALL if change in (_UPDATES, _EPOCHS_TOO) else _BATCH
    flags = ["--batch_size_per_gpu", str(batch), "--lr", f"{_PEAK * 256 / batch:g}"]
    if change == _UPDATES:  # 30 epochs of 31 steps, 4 of 250
        flags += ["--epochs", str(math.ceil(_EPOCHS / 8)), "--warmup_epochs", str(_WARMUP / 8), "--knn_every", "1000"]
    else:
        flags += ["--epochs", str(_EPOCHS), "--knn_every", "1000"]
    if method != "simclr":
        momentum = "0.8" if change == "EMA 0.8" else "0.996"
        flags += ["--momentum_teacher", momentum, "--momentum_teacher_end", momentum]
    return Run(f"{method}{twin} {change}", seed, tuple(flags))


def design(seeds: list[int]) -> list[Run]:
    """Return all runs, ordered by seed. Runs with the same number of epochs come last."""
    methods = dict.fromkeys(method for method, _ in _CHANGES)
    first = [*((method, "as it is") for method in methods), *PAPER]
    return [
        run(method, twin, change, seed)
        for cells in (first, _CHANGES[len(PAPER) :])
        for seed in seeds
        for method, change in cells
        for twin in ("", "+er")
    ]


def both(rows: list[Row], name: str, change: str) -> tuple[float, float, int]:
    """Return the mean k-NN accuracy before and after a change over the seeds with both, and the number of seeds."""
    before, after = (
        {row["seed"]: row["knn_top1"] for row in rows if row["run"] == f"{name} {c}"} for c in ("as it is", change)
    )
    seeds = before.keys() & after.keys()
    if not seeds:
        return math.nan, math.nan, 0
    return mean(before[s] for s in seeds), mean(after[s] for s in seeds), len(seeds)


def lost(rows: list[Row], method: str, change: str) -> tuple[float, float]:
    """Return the points of k-NN accuracy that base and twin lose by a change."""
    (b0, b1, _), (t0, t1, _) = (both(rows, method + kind, change) for kind in ("", "+er"))
    return 100 * (b0 - b1), 100 * (t0 - t1)


def report(rows: list[Row], changes: Iterable[tuple[str, str]] = _CHANGES) -> str:
    """Return a line per change: accuracies, points lost here, and points lost in the paper."""
    body = []
    for method, change in changes:
        pairs = [both(rows, method + kind, change) for kind in ("", "+er")]
        cells = [f"{before:.3f} to {after:.3f} ({seeds})" for before, after, seeds in pairs]
        points = [*lost(rows, method, change), *PAPER.get((method, change.removesuffix(" epochs")), ())]
        name = {_UPDATES: "B/8, as many updates", _EPOCHS_TOO: "B/8, as many epochs"}.get(change, change)
        body.append([f"{method}, {name}", *cells, *(f"{value:.2f}" for value in points)])
    head = ["change", "base k-NN (seeds)", "with ER", "base loses", "ER loses", "paper: base", "paper: ER"]
    return table(head, body)


def main() -> None:
    """Train the missing runs, print the table, and draw the picture."""
    options = parser(__doc__, seeds=(0, 1, 2)).parse_args()
    from bench.evidence.picture import drops  # needs matplotlib, unlike the table

    path = EVIDENCE / "claim.json"
    rows = run_all(design(options.seeds), path, show=options.show)
    print(report(rows))
    names = [f"{method}\n{change}" for method, change in PAPER]
    drops(names, [lost(rows, *key) for key in PAPER], list(PAPER.values()), DOCS / "claim.svg")


if __name__ == "__main__":
    main()
