"""``fasttrain plan``: predict memory, traffic and time of a run. Takes the trainer's flags and the machines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..config.arguments import Parser, parse
from ..engine.zero import quiet_deepspeed
from ..errors import ConfigError
from ..flags import Count, FilePath, NonNegative, Positive, PositiveFraction, flag
from ..plan.forecast import Forecast, forecast, refusal
from ..plan.hardware import GIB, GPUS, Cluster, gpu_named
from ..plan.report import as_json, show
from . import fail
from .output import write_json

IMAGENET = 1_281_167
"""Images of ImageNet-1k's training set."""


@dataclass(frozen=True)
class PlanOptions:
    """The machines to plan for."""

    nodes: Count = flag(1, "machines")
    gpus_per_node: Count = flag(8, "GPUs per machine")
    gpu: str = flag("h100", f"one of {', '.join(GPUS)}")
    gpu_memory: Positive | None = flag(None, "memory per GPU in GiB, if it differs")
    images: Count = flag(IMAGENET, "images per epoch")
    output: FilePath | None = flag(None, "also write the forecast to this JSON file")
    reserve: NonNegative = flag(3.0, "memory per GPU in GiB that the run cannot use")
    flops_fraction: PositiveFraction = flag(0.5, "achieved fraction of the peak of matrix products")
    bandwidth_fraction: PositiveFraction = flag(0.8, "achieved fraction of the memory bandwidth")
    link_fraction: PositiveFraction = flag(0.8, "achieved fraction of the links' bandwidth")
    latency: NonNegative = flag(30.0, "microseconds to start a message")
    host_time: NonNegative = flag(18.3, "microseconds of the host per operator")
    nvlink: Positive | None = flag(None, "GB/s between GPUs of a node, per direction")
    network: Positive | None = flag(None, "GB/s out of a node of 8 GPUs, per direction, all adapters")


def main(arguments: Sequence[str]) -> int:
    """Print the forecast; return 0 if the run fits, and 2 if it does not or a flag is invalid."""
    quiet_deepspeed()
    prediction = planned(arguments)
    return 0 if prediction.chosen is not None else fail(refusal(prediction))


def planned(arguments: Sequence[str]) -> Forecast:
    """Return the forecast for a command line, after printing it and writing ``--output``.

    Raise ConfigError for anything invalid.
    """
    parser = Parser(
        "plan",
        "Predict what a run needs: memory per GPU, traffic, time. Takes every flag of fasttrain train. The recipe is "
        "imagenet without --recipe, --config or --data_path. Needs no GPU and no data.",
    )
    parser.add_settings("machines", PlanOptions)
    options, rest = parser.known_options(arguments, PlanOptions)
    if {argument.partition("=")[0] for argument in rest}.isdisjoint(("--recipe", "--config", "--data_path")):
        rest += ["--recipe", "imagenet"]
    config, _ = parse(rest)
    output = options.output
    if output is not None and not output.parent.is_dir():  # check it before the slow part
        raise ConfigError(f"--output {output}: cannot be written: there is no folder {output.parent}.")
    prediction = forecast(config, _cluster(options), options.images)
    show(prediction)
    if output is not None:
        write_json(output, as_json(prediction))
    return prediction


def _cluster(options: PlanOptions) -> Cluster:
    gpu = gpu_named(options.gpu)
    units = {"memory": (options.gpu_memory, GIB), "nvlink": (options.nvlink, 1e9), "network": (options.network, 1e9)}
    changes: dict[str, Any] = {name: value * unit for name, (value, unit) in units.items() if value is not None}
    return Cluster(
        replace(gpu, **changes),
        options.nodes,
        options.gpus_per_node,
        flops_fraction=options.flops_fraction,
        bandwidth_fraction=options.bandwidth_fraction,
        link_fraction=options.link_fraction,
        latency=options.latency * 1e-6,
        host=options.host_time * 1e-6,
        reserve=options.reserve * GIB,
    )
