"""Measure the seconds that the host needs per operator, tensor and module of ZeRO 3, for ``fasttrain plan``.

    python -m bench.scale.host_time [--json]

On this machine: a ViT of 12 blocks of 24 channels gets images of few patches, so that the CPU has almost nothing to
compute. What is left is Python, autograd, autocast and torch's dispatch. The fewest CPU seconds of forward and backward
are divided by the operators that the plan counts. The seconds of the update are divided by the trained tensors. At
ZeRO 3, DeepSpeed's hooks add time at every call of a module with weights.

On the machine of an H100: the results of ``bench.gpu`` have the time in which eager torch launches five losses, forward
and backward. The slope over their numbers of operators is the time per operator with its launches. The seconds per
tensor are scaled by the ratio of both machines.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

from bench import RESULTS
from bench.measure import machine

_H100 = RESULTS / "nvidia-h100-80gb-hbm3.json"
_LAUNCHED = 4096
"""Batches above this one wait for memory during the launches."""
_STEPS = 60
_SIZES = {"global_crops_size": 32, "local_crops_size": 16, "out_dim": 64, "hidden_dim": 32, "bottleneck_dim": 8}
_VALUES = {"recipe": "imagenet", "arch": "vit_tiny", "batch_size_per_gpu": 1, "precision": "bf16", **_SIZES}


def measure(stage: int) -> dict[str, Any]:
    """Return the fewest CPU seconds of a micro-step, and what the plan counts in it."""
    import torch

    from fasttrain.config.resolve import resolve
    from fasttrain.distributed.world import World, initialise
    from fasttrain.engine.build import build_method
    from fasttrain.engine.engine import Engine
    from fasttrain.pipelines import Batch, sides
    from fasttrain.plan.trace import trace

    world = World.from_environment()
    initialise(world)
    config = resolve("dino", _VALUES | {"zero_stage": stage, "data_path": "."})
    torch.manual_seed(0)
    method = build_method(config, images=64, world_size=1, network=_narrow)
    counted = trace(method, config.views, 1, precision="bf16", world=1, stage=stage)
    engine = Engine(config, method, world, steps_per_epoch=2)
    views = tuple(torch.randn(n, 1, 3, *sides(size)) for size, n in config.views.groups)
    micro_steps, updates = [], []
    for index in range(_STEPS):
        step = engine.step_at(index % 2, measure=False)
        started = time.thread_time()
        engine.micro_step(Batch(views, None, torch.arange(1)), step)
        middle = time.thread_time()
        engine.update(step)
        micro_steps.append(middle - started)
        updates.append(time.thread_time() - middle)
    tensors = sum(parameter.requires_grad for parameter in method.parameters())
    engine.close()
    return {
        "micro_step_s": min(micro_steps),
        "update_s": min(updates),
        "operators": counted.calls,
        "modules": len(counted.uses),
        "tensors": tensors,
    }


def _narrow(channels: int) -> Any:
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "num_heads": 3, "num_classes": 0}
    return VisionTransformer(**sizes, in_chans=channels, drop_path_rate=0.1, dynamic_img_size=True)


def launched_operators() -> list[dict[str, Any]]:
    """Return the operators of eager losses, forward and backward, with the H100's seconds to launch them."""
    import torch

    from bench.peers import Case
    from bench.peers.similarity import BIDIRECTIONAL, INFO_NCE, INFO_NCE_QUEUE, NT_XENT, VMF_ENTROPY
    from fasttrain.plan.ledger import Ledger

    operations = {o.name: o for o in (BIDIRECTIONAL, INFO_NCE, INFO_NCE_QUEUE, NT_XENT, VMF_ENTROPY)}
    parts = json.loads(_H100.read_text())["parts"].values()
    rows = []
    for row in (row for part in parts for row in part["rows"] if row.get("operation") in operations):
        seconds = row["contestants"].get("eager", {}).get("host_seconds")
        if seconds and row["batch"] <= _LAUNCHED:
            operation = operations[row["operation"]]
            case = Case("small", 16, row["dim"], 32 if row["columns"] else 0, device="cpu", dtype=torch.bfloat16)
            step = operation.step("eager", case, operation.draw(case), wait=False)
            step()
            with Ledger(()) as ledger:
                step()
            rows.append({"loss": operation.name, "operators": ledger.calls, "seconds": seconds})
    return rows


def slope_of(x: list[int], y: list[float]) -> float:
    """Return the slope of the line through points by least squares; what is constant, such as a start, drops out."""
    return statistics.linear_regression(x, y)[0]


def main() -> None:
    """Measure both stages in this process and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="write bench/results/host-time.json")
    options = parser.parse_args()
    from fasttrain.distributed.world import prepare_environment
    from fasttrain.engine.zero import quiet_deepspeed

    prepare_environment()
    quiet_deepspeed()
    whole, sharded = measure(0), measure(3)
    operator = whole["micro_step_s"] / whole["operators"]
    tensor = whole["update_s"] / whole["tensors"]
    launched = launched_operators()
    with_launches = slope_of([row["operators"] for row in launched], [row["seconds"] for row in launched])
    result = {
        "machine": machine(),
        "zero_0": whole,
        "zero_3": sharded,
        "h100": launched,
        "seconds_per_operator": operator,
        "seconds_per_tensor": tensor,
        "seconds_per_module": (sharded["micro_step_s"] - whole["micro_step_s"]) / sharded["modules"],
        "seconds_per_operator_h100": with_launches,
        "seconds_per_tensor_h100": tensor * with_launches / operator,
    }
    print(json.dumps(result, indent=1))
    if options.json:
        (RESULTS / "host-time.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
