"""Measure k-NN of every method and its twin, next to the untrained network and raw pixels.

python -m bench.evidence.learns                                      # the embedded digits, 3 seeds
python -m bench.evidence.learns --data_path CIFAR10 --seeds 0        # CIFAR-10 as folders train/ and test/
python -m bench.evidence.learns --data_path CIFAR10 --methods simclr byol dino
"""

from __future__ import annotations

from bench.evidence.campaign import DOCS, EVIDENCE, Row, Run, knn_of, parser, run_all, summary, table
from fasttrain import methods

_CIFAR_EPOCHS = "20"


def runs(names: list[str], seeds: list[int], data: str | None) -> list[Run]:
    """Return base and twin of every method, ordered by seed, so that an interrupted campaign has all methods."""
    flags: tuple[str, ...] = ("--knn_every", "1000")  # only at the start and at the end
    if data is not None:
        flags += ("--recipe", "cifar", "--epochs", _CIFAR_EPOCHS)
    return [Run(name + twin, seed, flags, data) for seed in seeds for name in names for twin in ("", "+er")]


def report(rows: list[Row], names: list[str]) -> str:
    """Return a table with a line per method: base, twin and untrained network."""
    body = []
    for name in names:
        cells = []
        for kind in (name, name + "+er"):
            cells += [knn_of(rows, kind), f"{summary(rows, kind, 'deficit')[0]:.2f}"]
        untrained = summary(rows, name, "knn_top1_untrained")[0]
        body.append([name, *cells, f"{untrained:.3f}", f"{summary(rows, name, 'knn_top1_pixels')[0]:.3f}"])
    head = ["method", "k-NN (seeds)", "deficit, nats", "with ER", "deficit", "untrained", "pixels"]
    return table(head, body)


def main() -> None:
    """Train the missing runs, print the table, and draw the picture."""
    flags_parser = parser(__doc__, seeds=(0, 1, 2))
    flags_parser.add_argument("--data_path", help="CIFAR-10; without it, the embedded digits")
    twins = [name for name in methods.names() if methods.load(name).space is not None]  # only they have a deficit
    flags_parser.add_argument("--methods", nargs="+", default=twins, choices=twins)
    options = flags_parser.parse_args()
    from bench.evidence.picture import bars  # needs matplotlib, unlike the table

    data = "digits" if options.data_path is None else "cifar"
    path = EVIDENCE / f"learns-{data}.json"
    rows = run_all(runs(options.methods, options.seeds, options.data_path), path, show=options.show)
    print(report(rows, options.methods))
    bars(rows, options.methods, DOCS / f"learns-{data}.svg", title=f"k-NN accuracy, {data}")


if __name__ == "__main__":
    main()
