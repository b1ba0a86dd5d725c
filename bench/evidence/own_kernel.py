"""What a row's kernel on itself costs SimCLR's twin in small batches: batch B = 128 and B/8, as many updates, digits.

    python -m bench.evidence.own_kernel

The paper's estimate of the entropy counts it. In a batch that is spread out it is most of the density, and as it has no
gradient, it takes most of the force out of the entropy; ``--entropy_leave_one_out`` leaves it out.
"""

from __future__ import annotations

from dataclasses import replace

from bench.evidence.campaign import EVIDENCE, Row, Run, knn_of, parser, run_all, summary, table
from bench.evidence.claim import run

_WITHOUT = "+er without own kernel"


def design(seeds: list[int]) -> list[Run]:
    """Base, twin, and the twin without rows' own kernels."""
    found = []
    for seed in seeds:
        for change in ("B/8", "as it is"):
            base, twin = (run("simclr", kind, change, seed) for kind in ("", "+er"))
            other = replace(
                twin, name=f"simclr{_WITHOUT} {change}", flags=(*twin.flags, "--entropy_leave_one_out", "true")
            )
            found += [base, twin, other]
    return found


def report(rows: list[Row]) -> str:
    """A line an objective."""
    body = []
    for kind in ("", "+er", _WITHOUT):
        cells = []
        for change in ("as it is", "B/8"):
            name = f"simclr{kind} {change}"
            cells += [knn_of(rows, name), f"{summary(rows, name, 'deficit')[0]:.2f}"]
        body.append([f"simclr{kind}", *cells])
    return table(["", "B: k-NN (seeds)", "deficit, nats", "B/8: k-NN", "deficit"], body)


def main() -> None:
    """Train what is missing, print the table."""
    options = parser(__doc__, seeds=(0, 1, 2)).parse_args()
    print(report(run_all(design(options.seeds), EVIDENCE / "own-kernel.json", show=options.show)))


if __name__ == "__main__":
    main()
