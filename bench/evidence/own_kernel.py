"""Measure the effect of each row's own kernel on SimCLR's twin, at batches of 128 and 16 with as many updates, digits.

    python -m bench.evidence.own_kernel

The paper's estimate of the entropy counts the kernel of a row on itself. In a spread-out batch this kernel is most of
the density. It has no gradient, so it removes most of the gradient of the entropy. ``--entropy_leave_one_out`` leaves
it out.
"""

from __future__ import annotations

from dataclasses import replace

from bench.evidence.campaign import EVIDENCE, Row, Run, knn_of, parser, run_all, summary, table
from bench.evidence.claim import run

_WITHOUT = "+er without own kernel"


def design(seeds: list[int]) -> list[Run]:
    """Return base, twin, and the twin without the rows' own kernels."""
    runs = []
    for seed in seeds:
        for change in ("B/8", "as it is"):
            base, twin = (run("simclr", kind, change, seed) for kind in ("", "+er"))
            other = replace(
                twin, name=f"simclr{_WITHOUT} {change}", flags=(*twin.flags, "--entropy_leave_one_out", "true")
            )
            runs += [base, twin, other]
    return runs


def report(rows: list[Row]) -> str:
    """Return a table with a line per objective."""
    body = []
    for kind in ("", "+er", _WITHOUT):
        cells = []
        for change in ("as it is", "B/8"):
            name = f"simclr{kind} {change}"
            cells += [knn_of(rows, name), f"{summary(rows, name, 'deficit')[0]:.2f}"]
        body.append([f"simclr{kind}", *cells])
    return table(["", "B: k-NN (seeds)", "deficit, nats", "B/8: k-NN", "deficit"], body)


def main() -> None:
    """Train the missing runs and print the table."""
    options = parser(__doc__, seeds=(0, 1, 2)).parse_args()
    print(report(run_all(design(options.seeds), EVIDENCE / "own-kernel.json", show=options.show)))


if __name__ == "__main__":
    main()
