"""Measure the recipe photos-small on one's own photographs: SimCLR and DINO, base and twin, against raw pixels.

python -m bench.evidence.photos --data_path CLOTHING                 # a folder with train/ and val/ in class folders
"""

from __future__ import annotations

from bench.evidence.campaign import EVIDENCE, Row, Run, parser, run_all, summary, table

_NAMES = ("simclr", "simclr+er", "dino", "dino+er")
_FLAGS = ("--recipe", "photos-small", "--knn_every", "1000", "--num_workers", "1")


def runs(seeds: list[int], data: str) -> list[Run]:
    """Return all runs, ordered by seed, so that an interrupted campaign has all methods."""
    return [Run(name, seed, _FLAGS, data) for seed in seeds for name in _NAMES]


def report(rows: list[Row]) -> str:
    """Return a table with a line per run: each seed's k-NN, and the means of the references."""
    body = []
    for name in _NAMES:
        seeds = sorted((row for row in rows if row["run"] == name), key=lambda row: row["seed"])
        if seeds:
            each = ", ".join(f"{row['knn_top1']:.3f}" for row in seeds)
            keys = ("knn_top1", "knn_top1_untrained", "knn_top1_pixels")
            means = [f"{summary(rows, name, key)[0]:.3f}" for key in keys]
            body.append([name, each, *means, f"{summary(rows, name, 'seconds')[0]:.0f}"])
    return table(["run", "k-NN of each seed", "mean", "untrained", "raw pixels", "seconds"], body)


def main() -> None:
    """Train the missing runs and print the table."""
    flags_parser = parser(__doc__, seeds=(0, 1, 2))
    flags_parser.add_argument("--data_path", required=True, help="the photographs")
    options = flags_parser.parse_args()
    path = EVIDENCE / "photos-small.json"
    print(report(run_all(runs(options.seeds, options.data_path), path, show=options.show)))


if __name__ == "__main__":
    main()
