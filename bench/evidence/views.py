"""Compare our views with lightly's: k-NN of SimCLR trained on either, with the same code for everything else.

    pip install -e '.[bench]'
    python -m bench.evidence.views --data_path CIFAR10 --epochs 10        # folders train/ and test/

Both sides are the command with the ``cifar`` recipe: network, loss, optimizer, schedules, order of the images, k-NN on
our evaluation views, and initial weights. Lightly's side is a process of its own with another loader
(``bench/trainer/sides/lightly_views.py``). It decodes with PIL and cuts with lightly 1.6's ``SimCLRTransform``.

Both sides share these settings (``bench/tests/test_views.py`` compares the objects): size 32, area 0.08 to 1, ratio 3/4
to 4/3 with torchvision's ten attempts, bilinear with antialiasing, flip 0.5, jitter 0.4, 0.4, 0.4, 0.1 with probability
0.8, grey 0.2, no blur, no rotation, no vertical flip, mean and deviation. The sides differ in:

- the four jitters. torchvision draws their order per view and rounds to 8 bits after each. Ours begin with hue, and the
  others are one matrix with 8 bits at the end.
- the JPEG decoder: libjpeg-turbo through PIL in lightly, DALI in ours.
- the random numbers: torch's generator in lightly, our hash in ours.

On 8,000 views of 4,000 images per side, channel means differ by 0.04 and deviations by 0.003 (normalised units). 20.8 %
of our views and 21.8 % of lightly's are grey. 4.8 % of our values and 3.8 % of lightly's are black or white. Decoded
images are equal to the last bit, crops to one level.
"""

from __future__ import annotations

import sys

from bench.evidence.campaign import EVIDENCE, Row, Run, parser, run_all, table

_OURS, _THEIRS = "simclr", "simclr lightly's views"


class LightlyRun(Run):
    """The same command in a trainer with lightly's views."""

    @property
    def command(self) -> list[str]:
        """Return the command of this module as lightly's side."""
        python, _, *flags = super().command
        return [python, "-m", "bench.evidence.views", "--side", *flags]


def design(seeds: list[int], epochs: int, data: str | None) -> list[Run]:
    """Return the runs of both sides, ordered by seed."""
    flags = ("--recipe", "cifar", "--epochs", str(epochs), "--knn_every", "1000")
    pairs = ((Run, _OURS), (LightlyRun, _THEIRS))
    return [kind(name, seed, flags, data) for seed in seeds for kind, name in pairs]


def lightly_side(arguments: list[str]) -> int:
    """Train with the command on lightly's views, and return its exit status."""
    from fasttrain.distributed.world import prepare_environment

    prepare_environment()
    from bench.trainer.sides.lightly_views import LightlySimCLR
    from fasttrain import run
    from fasttrain.training import trainer

    trainer.Loader = LightlySimCLR  # type: ignore[misc]
    return run.main(arguments)


def report(rows: list[Row]) -> str:
    """Return a table with a line per seed of both sides, and their mean. "points above" is ours minus lightly's."""
    by_key = {(row["run"], row["seed"]): row for row in rows}
    seeds = sorted(seed for name, seed in by_key if name == _OURS and (_THEIRS, seed) in by_key)
    pairs = [(by_key[_OURS, seed], by_key[_THEIRS, seed]) for seed in seeds]
    keys = ("knn_top1", "knn_top1_untrained", "rankme", "images_per_s")
    body = [
        [f"seed {seed}", *_cells(*([side[key] for key in keys] for side in pair))]
        for seed, pair in zip(seeds, pairs, strict=True)
    ]
    if len(pairs) > 1:
        means = ([sum(pair[side][key] for pair in pairs) / len(pairs) for key in keys] for side in (0, 1))
        body.append(["mean", *_cells(*means)])
    head = ["", "k-NN, ours", "lightly's", "points above", "untrained", "RankMe, ours", "lightly's"]
    return table([*head, "images/s, ours", "lightly's"], body)


def _cells(ours: list[float], theirs: list[float]) -> list[str]:
    points = f"{100 * (ours[0] - theirs[0]):+.2f}"
    spectra, speeds = (f"{ours[2]:.1f}", f"{theirs[2]:.1f}"), (f"{ours[3]:,.0f}", f"{theirs[3]:,.0f}")
    return [f"{ours[0]:.4f}", f"{theirs[0]:.4f}", points, f"{ours[1]:.4f}", *spectra, *speeds]


def main() -> None:
    """Train the missing runs and print the table."""
    flags_parser = parser(__doc__, seeds=(0,))
    flags_parser.add_argument("--data_path", help="CIFAR-10 as folders train/ and test/")
    flags_parser.add_argument("--epochs", type=int, default=10)
    flags_parser.add_argument("--side", nargs="...", help="train one run on lightly's views, with these flags")
    options = flags_parser.parse_args()
    if options.side:
        sys.exit(lightly_side(options.side))
    if options.data_path is None and not options.show:
        flags_parser.error("--data_path: is missing. Give CIFAR-10 as folders train/ and test/.")
    runs = design(options.seeds, options.epochs, options.data_path)
    print(report(run_all(runs, EVIDENCE / "views.json", show=options.show)))


if __name__ == "__main__":
    main()
