"""Compare the step time of ``fasttrain plan`` with published runs and with the own one on an H100.

    python -m bench.scale.plan_public            # writes bench/results/plan-public.json, then run bench.tables

The published runs train DINOv2 or DINOv3, which fasttrain does not have. So the plan takes DINO with their network,
views, prototypes and stochastic depth, and their patch objective is counted here: a head for the masked patches of
student and teacher, Sinkhorn's scaling and the cross-entropy with logits, operator by operator, as their code has it.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from typing import Any

from bench import RESULTS

_RESULT = RESULTS / "plan-public.json"
_COMMON = ("--method", "dino", "--drop_path_subset", "--local_crops_number", "8")
_MASKED = 0.5 * 0.3
"""Masked part of the patches: half of the images, 30 % of each on average."""


@dataclass(frozen=True)
class Case:
    """A published run."""

    name: str
    seconds: float
    """Seconds of a step."""
    source: str
    flags: tuple[str, ...]
    patches: int = 0
    """Patches of a global view; 0: no patch objective."""
    prototypes: int = 65536
    width: int = 1024
    bottleneck: int = 256


def _run(gpu: str, nodes: int, batch: int, *more: str) -> tuple[str, ...]:
    return (*_COMMON, "--gpu", gpu, "--nodes", str(nodes), "--batch_size_per_gpu", str(batch), *more)


_L16 = ("--arch", "vit_large", "--drop_path_rate", "0.3")
_P14 = ("--patch_size", "14", "--local_crops_size", "98", "--drop_path_rate", "0.4", "--out_dim", "131072")
_P14 += ("--bottleneck_dim", "384", "--images", "14197122")
CASES = (
    Case(
        "DINOv3 ViT-L/16, 32 H100",
        14 * 3600 / 125_000,
        "README: about 14 hours for 100 epochs of 1,250 steps",
        _run("h100", 4, 64, *_L16),
        patches=196,
    ),
    Case(
        "DINOv3 ViT-L/16, 32 A100",
        0.57,
        "comment in vitl_im1k_lin834.yaml, tested on RSC, a cluster of A100",
        _run("a100-80", 4, 64, *_L16),
        patches=196,
    ),
    Case(
        "DINOv2 ViT-L/16, 32 A100",
        24 * 3600 / 125_000,
        "README: about 1 day for 100 epochs of 1,250 steps",
        _run("a100-80", 4, 64, *_L16),
        patches=196,
    ),
    Case(
        "DINOv2 ViT-L/14, 96 A100",
        3.3 * 24 * 3600 / 625_000,
        "README: about 3.3 days for 500 epochs of 1,250 steps",
        _run("a100-80", 12, 32, "--arch", "vit_large", *_P14),
        patches=256,
        prototypes=131072,
        bottleneck=384,
    ),
    Case(
        "DINOv2 ViT-g/14, 256 A100",
        22_000 * 3600 / 256 / 625_000,
        "model card: 22,000 GPU-hours for 625,000 steps",
        _run("a100-80", 32, 12, "--arch", "vit_giant_patch14_dinov2", *_P14[2:]),
        patches=256,
        prototypes=131072,
        width=1536,
        bottleneck=384,
    ),
    Case(
        "fasttrain, DINO ViT-S/16, one H100",
        64 / 583.7 * (1 - 0.1079),
        "bench/results/nvidia-h100-80gb-hbm3-training.json: 583.7 images/s, without the 10.8 % that it waited for data",
        ("--method", "dino", "--arch", "vit_small", "--gpu", "h100", "--gpus_per_node", "1"),
    ),
)


def patch_objective(case: Case, batch: int, cluster: Any) -> float:
    """Return the seconds of heads, Sinkhorn's three iterations and cross-entropy over the masked patches of a rank."""
    import torch
    from torch import nn
    from torch._subclasses.fake_tensor import FakeTensorMode

    from fasttrain.models.heads import projection_mlp
    from fasttrain.plan.ledger import Ledger
    from fasttrain.plan.trace import drop_values

    rows = int(2 * batch * case.patches * _MASKED)
    dims = (case.width, 2048, 2048, case.bottleneck)
    heads = [
        nn.Sequential(
            projection_mlp(dims, batch_norm=False, activation=nn.GELU),
            nn.Linear(case.bottleneck, case.prototypes, bias=False),
        )
        for _ in range(2)
    ]
    with FakeTensorMode(), Ledger(()) as ledger, torch.autocast("cpu", torch.bfloat16):
        for head in heads:
            drop_values(head)
        with torch.no_grad():
            target = (heads[0](torch.empty(rows, case.width)).float() / 0.07).exp().t()
            for _ in range(3):
                target = target / target.sum(1, keepdim=True) / case.prototypes
                target = target / target.sum(0, keepdim=True) / rows
            target = (target * rows).t()
        logits = heads[1](torch.empty(rows, case.width)).float() / 0.1
        loss = -(target * logits.log_softmax(1)).sum(1).mean()
        loss.backward()
    return sum(cluster.roofline(work.flops, work.bytes, "bf16") for work in ledger.work)


def compare(case: Case) -> dict[str, Any]:
    """Return the published and the planned seconds of a step, by term."""
    from fasttrain.cli.plan import planned

    prediction = planned(case.flags)
    stage = prediction.chosen or prediction.stages[3]
    batch = prediction.config.train.batch_size_per_gpu
    patches = patch_objective(case, batch, prediction.cluster) if case.patches else 0.0
    time = stage.time
    step = max(time.operators + time.update + patches, time.host) + time.waited
    return {
        "name": case.name,
        "source": case.source,
        "flags": " ".join(case.flags),
        "published_s": case.seconds,
        "zero_stage": stage.stage,
        "terms_s": asdict(time) | {"patch_objective": patches},
        "step_s": step,
        "ratio": step / case.seconds,
    }


def main() -> None:
    """Compare all cases; exit with 1 if one differs by more than 1.4 times."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = [compare(case) for case in CASES]
    _RESULT.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    for row in rows:
        print(f"{row['name']}: published {row['published_s']:.3f} s, plan {row['step_s']:.3f} s, {row['ratio']:.2f}")
    if any(not 1 / 1.4 <= row["ratio"] <= 1.4 for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
