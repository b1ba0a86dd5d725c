"""Compare the memory and traffic of ``fasttrain plan`` with the storages and messages of two ranks on the CPU.

    python -m bench.scale.plan_check [--output bench/results/plan.json]      # exit status 1 if a figure differs

Every case is a run of its own: two processes, gloo, DeepSpeed, three steps. The storages of rank 0 are summed by
purpose; the memory of the process is not used. The purposes are:

- parameters, teacher, buffers, the optimizer's state and master weights
- gradients, just before or just after their reduction, whichever is more
- tensors that autograd saves in a real forward pass, counted by a hook
- ZeRO's buckets, and the parameters that ZeRO-3 has fetched at the worst call of a module

Bytes sent are the bytes passed to ``torch.distributed``. The plan's functions must match: memory within 10 %, traffic
to the byte.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import RESULTS
from bench.scale.environments import run_ranks
from bench.scale.plan_rank import BATCH, IMAGES, Case, resolved

RANKS = 2
TOLERANCE = 0.1
_VIT = {"arch": "vit_tiny", "patch_size": 8}
_DINO = {**_VIT, "out_dim": 512}


def case(method: str, stage: int, entropy: bool = False, **values: Any) -> Case:
    return {"method": method, "stage": stage, "entropy": entropy, "values": values}


TINY = [case("byol", stage, arch="conv_small", optimizer="lars") for stage in range(4)]
"""Cases that are small enough for a test."""
CASES = [
    *TINY,
    *(case("dino", stage, **_DINO) for stage in range(4)),
    *(case("dino", stage, **_DINO, precision="bf16") for stage in range(4)),
    *(case("moco", stage, arch="conv_small", optimizer="lamb", queue_length=64) for stage in (0, 2, 3)),
    case("simclr", 1, True, arch="resnet18", optimizer="sgd"),
    case("mocov3", 3, **_VIT),
    case("dino", 1, **_DINO, gradient_accumulation_steps=2),
    case("dino", 2, **_DINO, gradient_accumulation_steps=2),
]


def predict(one: Case) -> dict[str, Any]:
    """Return the same figures from the plan's functions."""
    import torch

    from fasttrain.engine.build import build_method
    from fasttrain.plan.communication import traffic
    from fasttrain.plan.memory import gradient_bytes, parts
    from fasttrain.plan.trace import trace
    from fasttrain.plan.update import trace_update
    from fasttrain.plan.weights import gathers, weights_of, zero_of

    config = resolved(one)
    train = config.train
    precision = "fp32" if train.precision == "auto" else train.precision
    accumulation = train.gradient_accumulation_steps
    with torch.device("meta"):
        method = build_method(config, images=IMAGES, world_size=RANKS)
    weights = weights_of(method, train, precision)
    traced = trace(method, config.views, BATCH, precision=precision, world=RANKS, stage=one["stage"], on_gpu=False)
    update = trace_update(method, train, world=RANKS)
    zero = zero_of(train, one["stage"], RANKS, precision, weights, on_gpu=False)
    buffers = sum(buffer.nbytes for buffer in method.buffers())
    planned = {p.name: p.backward for p in parts(weights, buffers, traced, update, zero, accumulation=accumulation)}
    sizes = {
        "parameters": planned["parameters"],
        "teacher": planned["teacher"],
        "method's buffers": planned["buffers"],
        "optimizer": planned["optimizer"],
        "gradients": gradient_bytes(weights, zero, rank=0),
        "activations": planned["activations"] + planned["loss"] + planned["weights in low precision"],
        "buckets": parts(weights, buffers, traced, update, zero)[-2].update,
        "fetched": gathers(weights, traced.uses, zero).peak,
    }
    sent = {"gradients": 0, "weights": 0, "BatchNorm, loss, centre": 0}
    for t in traffic(weights, traced, update, zero, accumulation=accumulation):
        what = "weights" if "parameters" in t.about else t.about
        sent[what if what in sent else "BatchNorm, loss, centre"] += t.bytes
    return {"held": sizes, "sent": sent}


def compare(one: Case, real: dict[str, Any], plan: dict[str, Any]) -> dict[str, Any]:
    """Return measured and planned bytes by purpose, and whether they match: memory within 10 %, traffic exactly."""
    sent = purposes(real["sent"])
    rows = [
        *(
            _row(f"holds: {name}", real["held"].get(name, 0), planned, TOLERANCE)
            for name, planned in plan["held"].items()
        ),
        *(_row(f"sends: {name}", sent[name], planned, 0) for name, planned in plan["sent"].items()),
    ]
    return {**one, "rows": rows, "holds besides": real["held"]["anything else"]}


def _row(what: str, measured: int, planned: int, tolerance: float) -> dict[str, Any]:
    return {
        "what": what,
        "measured_bytes": measured,
        "planned_bytes": planned,
        "ratio": round(planned / measured, 4) if measured else None,
        "holds": abs(planned - measured) <= tolerance * measured,
    }


def purposes(sent: dict[str, int]) -> dict[str, int]:
    """Return bytes by purpose, without the all-reduces in the update: norms, which the plan leaves out."""
    totals = {"gradients": 0, "weights": 0, "BatchNorm, loss, centre": 0}
    for name, size in sent.items():
        owner, moment, kind = name.split()
        if moment == "update" and kind == "all_reduce":
            continue
        if owner == "reduction":
            totals["gradients"] += size
        elif owner == "fasttrain":
            totals["BatchNorm, loss, centre"] += size
        else:
            totals["weights" if kind == "all_gather" else "gradients"] += size
    return totals


def check(cases: list[Case]) -> list[dict[str, Any]]:
    """Compare every case with the plan, one after another, each on two ranks of its own."""
    results = []
    for one in cases:
        results.append(compare(one, on_two_ranks([one])[0], predict(one)))
        print(summary(results[-1]), flush=True)
    return results


def on_two_ranks(cases: list[Case]) -> list[dict[str, Any]]:
    """Return the measurements of rank 0, case by case, all in one pair of processes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "measured.json"
        run_ranks(RANKS, "bench.scale.plan_rank", [json.dumps(cases), str(path)], seconds=600)
        measured: list[dict[str, Any]] = json.loads(path.read_text())
    return measured


def summary(result: dict[str, Any]) -> str:
    """Return a line with the figure of a case that differs most from the plan."""
    name = f"{result['method']}{'+ER' if result['entropy'] else ''} ZeRO {result['stage']} {result['values']}"
    bad = [row["what"] for row in result["rows"] if not row["holds"]]
    worst = max((row for row in result["rows"] if row["ratio"]), key=lambda row: abs(row["ratio"] - 1))
    verdict = f"DIFFERS in {bad}" if bad else "ok"
    return f"{name}: {verdict}; largest difference: {worst['what']}, x {worst['ratio']}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "plan.json")
    options = parser.parse_args()
    from fasttrain.distributed.world import prepare_environment

    prepare_environment()
    import deepspeed
    import timm
    import torch

    results = check(CASES)
    versions = {"torch": torch.__version__, "deepspeed": deepspeed.__version__, "timm": timm.__version__}
    settings = {"ranks": RANKS, "batch_size_per_gpu": BATCH, "memory_tolerance": TOLERANCE, "traffic_tolerance": 0}
    content = {"versions": versions, "settings": settings, "cases": results}
    options.output.write_text(json.dumps(content, indent=1) + "\n")
    return 0 if all(row["holds"] for one in results for row in one["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
