"""Run the binary test: DINO without centring collapses; without centring but with --entropy it trains.

    python -m bench.evidence.collapse

All three runs have the same flags: EMA 0.9 to 1, 256 prototypes, batch 128, 12 epochs of the embedded digits, and no
BatchNorm on the projection.
"""

from __future__ import annotations

from bench.evidence.campaign import EVIDENCE, Row, Run, parser, run_all, summary, table

FLAGS = ["--out_dim", "256", "--momentum_teacher", "0.9", "--momentum_teacher_end", "1"]
# The published head. The demo's BatchNorm on the projection alone keeps some entropy.
FLAGS += ["--use_bn_at_bottleneck", "false"]
FLAGS += ["--batch_size_per_gpu", "128", "--epochs", "12", "--knn_every", "1000"]
_CASES = {
    "dino without centring": ("--no_centering", "true"),
    "dino centred": ("--no_centering", "false"),
    "dino+er without centring": ("--no_centering", "true"),
}


def report(rows: list[Row]) -> str:
    """Return a table with a line per case."""
    keys = ("knn_top1", "knn_top1_untrained", "entropy", "reconstruction", "information")
    body = [[name, *(f"{summary(rows, name, key)[0]:.3f}" for key in keys)] for name in _CASES]
    return table(["run", "k-NN", "untrained", "entropy of 5.545", "reconstruction", "information"], body)


def main() -> None:
    """Train the missing runs and print the table."""
    options = parser(__doc__, seeds=(0, 1, 2)).parse_args()
    runs = [Run(name, seed, (*FLAGS, *more)) for seed in options.seeds for name, more in _CASES.items()]
    print(report(run_all(runs, EVIDENCE / "collapse.json", show=options.show)))


if __name__ == "__main__":
    main()
