"""Are our views as good as lightly's? k-NN of SimCLR trained on either, everything else the same code.

    pip install -e '.[bench]'
    python -m bench.evidence.views --data_path CIFAR10 --epochs 10        # folders train/ and test/

Both sides are the command with the ``cifar`` recipe: network, loss, optimizer, schedules, order of the images, k-NN on
our evaluation views, and weights at the start. Lightly's side, a process of its own in which the trainer finds another
loader (``bench/trainer/sides/lightly_views.py``), decodes with PIL and cuts with lightly 1.6's ``SimCLRTransform``.

The same on both sides (``bench/tests/test_views.py`` asks the objects): size 32, area 0.08 to 1, ratio 3/4 to 4/3 with
torchvision's ten attempts, bilinear with antialiasing, flip 0.5, jitter 0.4, 0.4, 0.4, 0.1 with probability 0.8, grey
0.2, no blur, no rotation, no vertical flip, mean and deviation. What cannot be the same:

- the four jitters: torchvision's come in an order drawn for each view, with 8 bits after each; ours begin with hue,
  and the others are one matrix, with 8 bits at the end;
- the JPEG decoder: libjpeg-turbo by PIL there, DALI here;
- the numbers drawn: torch's generator there, our hash here.

Of 8,000 views of 4,000 images each, channel means differ by 0.04 and deviations by 0.003 (normalised units), 20.8 and
21.8 % are grey, and of ours 4.8 % of the values are at black or white, of lightly's 3.8 %. Decoded images are equal to
the last bit, crops to one level.
"""

from __future__ import annotations

import sys

from bench.evidence.campaign import EVIDENCE, Row, Run, parser, run_all, table

_OURS, _THEIRS = "simclr", "simclr lightly's views"


class LightlyRun(Run):
    """The same command in a trainer that has lightly's views."""

    @property
    def command(self) -> list[str]:
        """This file, asked to be lightly's side."""
        python, _, *flags = super().command
        return [python, "-m", "bench.evidence.views", "--side", *flags]


def design(seeds: list[int], epochs: int, data: str | None) -> list[Run]:
    """Both sides in turn, a seed after the other."""
    flags = ("--recipe", "cifar", "--epochs", str(epochs), "--knn_every", "0")
    pairs = ((Run, _OURS), (LightlyRun, _THEIRS))
    return [kind(name, seed, flags, data) for seed in seeds for kind, name in pairs]


def lightly_side(arguments: list[str]) -> int:
    """Train by the command, on lightly's views; returns its exit status."""
    from fasttrain.distributed.world import prepare_environment

    prepare_environment()
    from bench.trainer.sides.lightly_views import LightlySimCLR
    from fasttrain import run
    from fasttrain.training import trainer

    trainer.Loader = LightlySimCLR  # type: ignore[misc]
    return run.main(arguments)


def report(rows: list[Row]) -> str:
    """A line a seed that both sides have, and their mean: k-NN of both, and the points that ours is above."""
    found = {(row["run"], row["seed"]): row for row in rows}
    seeds = sorted(seed for name, seed in found if name == _OURS and (_THEIRS, seed) in found)
    pairs = [(found[_OURS, seed], found[_THEIRS, seed]) for seed in seeds]
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
    """Train what is missing, print the table."""
    made = parser(__doc__, seeds=(0,))
    made.add_argument("--data_path", help="CIFAR-10 as folders train/ and test/")
    made.add_argument("--epochs", type=int, default=10)
    made.add_argument("--side", nargs="...", help="be lightly's side of one training, with these flags")
    options = made.parse_args()
    if options.side:
        sys.exit(lightly_side(options.side))
    if options.data_path is None and not options.show:
        made.error("--data_path is missing: CIFAR-10 as folders train/ and test/")
    runs = design(options.seeds, options.epochs, options.data_path)
    print(report(run_all(runs, EVIDENCE / "views.json", show=options.show)))


if __name__ == "__main__":
    main()
