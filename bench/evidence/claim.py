"""The paper's claim: with ER, smaller batches and a weaker EMA cost less. {SimCLR, BYOL, DINO} x {base, twin}, digits.

    python bench/evidence/claim.py

Every run of a method has the same flags but for the batch (B or B/8) or the teacher's momentum, which is constant
(0.996 or 0.8). The learning rate is the same number in every run of a method: it does not follow the batch. The drop is
the k-NN accuracy lost, in points, mean over seeds; the paper's is ImageNet top-1 (arXiv 2307.10907, Table 2).
"""

from __future__ import annotations

from campaign import DOCS, RESULTS, Row, Run, parser, run_all, summary, table
from picture import drops

_BATCH = 128
_SMALL = _BATCH // 8
_PEAK = 3e-3  # of the learning rate, whatever the batch
_EPOCHS = 30
_PAPER = {
    ("dino", "B/8"): (6.76, 2.35),
    ("dino", "EMA 0.8"): (8.25, 0.92),
    ("byol", "B/8"): (23.65, 2.35),
    ("byol", "EMA 0.8"): (2.63, 0.41),
    ("simclr", "B/8"): (2.17, 1.01),
}


def run(method: str, twin: str, change: str, seed: int) -> Run:
    """One cell of the design."""
    batch = _SMALL if change == "B/8" else _BATCH
    flags = ["--batch_size_per_gpu", str(batch), "--lr", f"{_PEAK * 256 / batch:g}"]
    flags += ["--epochs", str(_EPOCHS), "--knn_every", "0"]
    if method != "simclr":
        momentum = "0.8" if change == "EMA 0.8" else "0.996"
        flags += ["--momentum_teacher", momentum, "--momentum_teacher_end", momentum]
    return Run(f"{method}{twin} {change}", seed, tuple(flags))


def design(seeds: list[int]) -> list[Run]:
    """All cells, the seeds outermost."""
    changes = {method: ["as it is", *(c for m, c in _PAPER if m == method)] for method in ("simclr", "byol", "dino")}
    return [
        run(method, twin, change, seed)
        for seed in seeds
        for method, kinds in changes.items()
        for change in kinds
        for twin in ("", "+er")
    ]


def lost(rows: list[Row], method: str, change: str) -> tuple[float, float]:
    """Points of k-NN accuracy that base and twin lose by a change."""
    base, twin = (
        100 * (summary(rows, f"{method}{kind} as it is")[0] - summary(rows, f"{method}{kind} {change}")[0])
        for kind in ("", "+er")
    )
    return base, twin


def report(rows: list[Row]) -> str:
    """A line a change: accuracies, what is lost, and what the paper's lost."""
    body = []
    for (method, change), paper in _PAPER.items():
        ours = lost(rows, method, change)
        cells = [
            " to ".join(f"{summary(rows, f'{method}{kind} {c}')[0]:.3f}" for c in ("as it is", change))
            for kind in ("", "+er")
        ]
        numbers = [f"{value:.2f}" for value in (*ours, *paper)]
        body.append([f"{method}, {change}", *cells, *numbers])
    head = ["change", "base k-NN", "with ER", "base loses", "ER loses", "paper: base", "paper: ER"]
    return table(head, body)


def main() -> None:
    """Train what is missing, print the table, draw the picture."""
    options = parser(__doc__, seeds=(0, 1, 2)).parse_args()
    path = RESULTS / "claim.json"
    rows = run_all(design(options.seeds), path, show=options.show)
    print(report(rows))
    names = [f"{method}\n{change}" for method, change in _PAPER]
    drops(names, [lost(rows, *key) for key in _PAPER], list(_PAPER.values()), DOCS / "claim.svg")


if __name__ == "__main__":
    main()
