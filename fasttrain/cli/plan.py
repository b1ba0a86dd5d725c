"""The command ``fasttrain plan``: the trainer's flags, and the machines to plan for."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..config.arguments import Parser, parse, underscored
from ..errors import ConfigError
from ..plan.forecast import Forecast, forecast, refusal
from ..plan.hardware import GIB, GPUS, Cluster, gpu_named
from ..plan.report import as_json, show

IMAGENET = 1_281_167

_WHAT = (
    "Say what a run will need before it starts: memory a GPU, traffic, time. Takes every flag of fasttrain train; "
    "without --recipe, --config or --data_path the recipe is imagenet. Needs no GPU and no data."
)


def main(arguments: Sequence[str]) -> int:
    """Print the forecast; 0 if the run fits, 2 if it does not, or something given cannot be used."""
    try:
        found = planned(arguments)
    except ConfigError as error:
        return _fail(str(error))
    return 0 if found.chosen is not None else _fail(refusal(found))


def planned(arguments: Sequence[str]) -> Forecast:
    """The forecast that a command line asks for, printed and written where it says.

    Raises ConfigError for anything that cannot be used.
    """
    own, rest = _parser().parse_known_args([underscored(argument) for argument in arguments])
    if {argument.partition("=")[0] for argument in rest}.isdisjoint(("--recipe", "--config", "--data_path")):
        rest += ["--recipe", "imagenet"]
    config, _ = parse(rest)
    for name in ("nodes", "gpus_per_node", "images"):
        if getattr(own, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, got {getattr(own, name)}")
    gpu = gpu_named(own.gpu)
    changes = {"memory": own.gpu_memory and own.gpu_memory * GIB, "nvlink": own.nvlink and own.nvlink * 1e9}
    changes["network"] = own.network and own.network * 1e9
    gpu = replace(gpu, **{name: value for name, value in changes.items() if value is not None})
    cluster = Cluster(
        gpu,
        own.nodes,
        own.gpus_per_node,
        flops_fraction=own.flops_fraction,
        bandwidth_fraction=own.bandwidth_fraction,
        link_fraction=own.link_fraction,
        latency=own.latency * 1e-6,
        reserve=own.reserve * GIB,
    )
    if own.output is not None and not own.output.parent.is_dir():  # before what takes a while
        raise ConfigError(f"--output {own.output} cannot be written: there is no folder {own.output.parent}")
    found = forecast(config, cluster, own.images)
    show(found)
    if own.output is not None:
        _write(own.output, found)
    return found


def _write(path: Path, found: Forecast) -> None:
    try:
        path.write_text(json.dumps(as_json(found), indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"--output {path} cannot be written: {error.strerror}") from None


def _parser() -> Parser:
    parser = Parser(prog="fasttrain plan", description=_WHAT, allow_abbrev=False)
    add = parser.add_argument
    add("--nodes", type=int, default=1, metavar="N", help="machines (default: 1)")
    add("--gpus_per_node", type=int, default=8, metavar="G", help="GPUs in each (default: 8)")
    add("--gpu", default="h100", metavar="NAME", help=f"one of {', '.join(GPUS)} (default: h100)")
    add("--gpu_memory", type=_positive, metavar="GIB", help="its memory, if it is another")
    add("--images", type=int, default=IMAGENET, metavar="N", help=f"images of an epoch (default: {IMAGENET})")
    add("--output", type=Path, metavar="FILE.json", help="write everything there too")
    add("--reserve", type=_at_least_0, default=3.0, metavar="GIB", help="memory that is not the run's (default: 3)")
    for name, default, of in (
        ("flops", 0.5, "the peak of products"),
        ("bandwidth", 0.8, "the memory's bandwidth"),
        ("link", 0.8, "the links' bandwidth"),
    ):
        add(f"--{name}_fraction", type=_fraction, default=default, metavar="X", help=f"of {of} (default: {default})")
    add("--latency", type=_at_least_0, default=30.0, metavar="US", help="microseconds a message (default: 30)")
    add("--nvlink", type=_positive, metavar="GB/S", help="between GPUs of a node, a direction")
    add("--network", type=_positive, metavar="GB/S", help="out of a node of 8 GPUs, a direction, all adapters")
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _at_least_0(text: str) -> float:
    return 0.0 if float(text) == 0 else _positive(text)


def _fraction(text: str) -> float:
    value = _positive(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text} is above 1")
    return value


def _fail(message: str) -> int:
    print(f"fasttrain: {message}", file=sys.stderr)
    return 2
