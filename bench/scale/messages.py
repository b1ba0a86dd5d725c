"""Count the collectives of one steady step on two gloo ranks, by cause: every method and its twin, at ZeRO 0 and 3.

    python -m bench.scale.messages [--label after]        # two CPU processes, for many minutes

Every case is a run of the trainer on 512 embedded digits, 8 per rank. Its third step is counted, which is neither
logged nor the end of an epoch. A collective is a call into torch's process group, from Python or C++. The networks are
conv_small with the views of the recipe ``demo``, and a ViT-tiny with 8 local crops more, except for CMC, which compares
2 views. InfoMin's patches of an image are too small for the ViT. The result is stored in
``bench/results/messages.json`` under the label. Other labels stay.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from bench import RESULTS
from bench.measure import commit
from bench.scale.environments import run_ranks

CAUSES = ("BatchNorm", "loss", "gradient", "guard", "data flag", "clip, norm", "parameters")
_RESULT = RESULTS / "messages.json"
_NETWORKS = {"conv_small": {"arch": "conv_small"}, "ViT-tiny": {"arch": "vit_tiny", "patch_size": 7}}
_COUNTED, _LAST = 2, 4  # a step that is not logged
_FILES = {  # of the innermost caller in fasttrain
    "fasttrain/models/batchnorm.py": "BatchNorm",
    "fasttrain/training/guard.py": "guard",
    "fasttrain/distributed/lockstep.py": "data flag",
    "fasttrain/engine/clipping.py": "clip, norm",
    "fasttrain/optim/layerwise.py": "clip, norm",
}
Row = dict[str, Any]


def cases() -> list[Row]:
    """Return the cases: every method, base and twin, both networks, ZeRO 0 and 3.

    At ZeRO 3 the ViT has DINO's twin only: a step takes seconds, and ZeRO's messages depend on the network.
    """
    from fasttrain.methods.registry import BUILT_IN, load

    made = []
    for network, method in itertools.product(_NETWORKS, BUILT_IN):
        if (network, method) == ("ViT-tiny", "infomin") or (network == "conv_small" and load(method).needs_patches):
            continue
        twins = [False, True] if load(method).space else [False]
        for entropy, stage in itertools.product(twins, (0, 3)):
            if network == "conv_small" or stage == 0 or (method, entropy) == ("dino", True):
                made.append({"method": method, "entropy": entropy, "network": network, "stage": stage})
    return made


def count(one: Row, folder: Path) -> Counter[str]:
    """Return the collectives of a step of this rank, by cause. Collective."""
    from fasttrain.config.resolve import resolve
    from fasttrain.distributed.world import World, initialise
    from fasttrain.pipelines import ArraySource, Splits, View, open_source
    from fasttrain.training.guard import Guard
    from fasttrain.training.trainer import train

    world = World.from_environment()
    initialise(world)
    values = {"batch_size_per_gpu": 8, "knn_every": 0, "limit_steps": _LAST, "log_every": 100, "num_workers": 1}
    values |= {"recipe": "demo", "entropy": one["entropy"], "zero_stage": one["stage"], "output_dir": str(folder)}
    config = resolve(one["method"], values | _NETWORKS[one["network"]])
    if one["network"] == "ViT-tiny" and one["method"] != "cmc":
        crops = View(size=14, count=8, scale=(0.05, 0.6), local=True)
        config = dataclasses.replace(
            config, views=dataclasses.replace(config.views, views=(*config.views.views, crops))
        )
    digits: Any = open_source(None).train
    source = ArraySource(digits.images[:512], digits.labels[:512], digits.classes, "digits")
    causes, original = Counter[str](), Guard.step

    def step(self: Guard, batches: Any, at: Any, *status: Any) -> Any:
        with counting(causes) if at.index == _COUNTED else nullcontext():
            return original(self, batches, at, *status)

    Guard.step = step  # type: ignore[method-assign]
    try:
        train(config, world, Splits("digits", source, None))
    finally:
        Guard.step = original  # type: ignore[method-assign]
    return causes


@contextmanager
def counting(causes: Counter[str]) -> Iterator[None]:
    """Count torch's collectives by cause. Every call into a process group passes torch's dispatcher."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Collectives(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function.namespace == "c10d":
                causes[_cause(function.__name__)] += 1
            return function(*args, **(kwargs or {}))

    with Collectives():
        yield


def _cause(operation: str) -> str:
    """Return the cause of a collective, from its innermost caller in fasttrain or DeepSpeed.

    The backward pass of a function has no such caller, so its context remembers the cause of the forward pass.
    """
    frame, context = sys._getframe(2), None
    while frame is not None:
        path, code = frame.f_code.co_filename, frame.f_code
        if context is None and code.co_name in ("forward", "backward") and "ctx" in frame.f_locals:
            context = frame.f_locals["ctx"]
            if code.co_name == "backward" and hasattr(context, "cause"):
                return str(context.cause)
        cause = next((cause for file, cause in _FILES.items() if path.endswith(file)), None)
        if cause is None and "/deepspeed/" in path and "/deepspeed/comm/" not in path:
            cause = _of_deepspeed(frame, operation)
        if cause is None and ("/fasttrain/methods/" in path or "/fasttrain/losses/" in path):
            cause = "loss"
        if cause is not None:
            if context is not None and frame.f_code.co_name != "backward":
                context.cause = cause
            return cause
        frame = frame.f_back
    return "loss"


def _of_deepspeed(frame: Any, operation: str) -> str:
    """Return the cause of a collective of DeepSpeed: parameters are gathered, gradients are reduced in backward."""
    if "gather" in operation or "broadcast" in operation:
        return "parameters"
    while frame is not None:
        if frame.f_code.co_name in ("backward", "allreduce_gradients"):
            return "gradient"
        frame = frame.f_back
    return "clip, norm"


def measure(output: Path) -> None:
    """Count every case on this rank. Rank 0 writes the rows."""
    from fasttrain.distributed.world import World, prepare_environment

    prepare_environment()
    rows = []
    main = World.from_environment().is_main
    for one in cases():
        causes = count(one, output.parent / str(len(rows)))
        rows.append({**one, "all": sum(causes.values()), "causes": dict(causes)})
        if main:
            print(rows[-1], flush=True)
    if main:
        output.write_text(json.dumps(rows))


def on_two_ranks() -> list[Row]:
    """Return the rows of all cases from one pair of processes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        run_ranks(2, "bench.scale.messages", ["--rank", str(path)], seconds=3600)
        rows: list[Row] = json.loads(path.read_text())
    return rows


def main() -> None:
    """Count all cases and store them under a label."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--label", choices=["before", "after"], default="after")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        measure(options.rank)
        return
    content = json.loads(_RESULT.read_text()) if _RESULT.is_file() else {}
    content[options.label] = {"commit": commit(), "rows": on_two_ranks()}
    _RESULT.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
