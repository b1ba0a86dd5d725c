"""Print a forecast as tables, or return it as JSON."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from .forecast import Forecast, Stage
from .hardware import GIB

Cells = tuple[str, ...]


def show(prediction: Forecast) -> None:
    """Print the forecast."""
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False)
    for line in _heading(prediction):
        console.print(line)
    stages = [f"ZeRO {stage.stage}" for stage in prediction.stages]
    console.print(_table("GiB per GPU", stages, _memory(prediction)))
    chosen = prediction.chosen or min(prediction.stages, key=lambda stage: stage.bytes)
    if chosen.traffic:
        columns = ("operation", "MiB", "messages", "ms", "")
        console.print(_table(f"communication per step at ZeRO {chosen.stage}", columns, _traffic(prediction, chosen)))
    console.print(_table("predicted, not measured", stages, _times(prediction)))
    console.print("Assumptions:")
    for number, line in enumerate(assumptions(prediction), 1):
        console.print(f"{number:3}. {line}", soft_wrap=True)
    if prediction.chosen is not None:
        console.print(f"\nUse --zero_stage {prediction.chosen.stage}.")


def as_json(prediction: Forecast) -> dict[str, Any]:
    """Return the forecast as plain values: bytes, seconds, images."""
    cluster = prediction.cluster
    return {
        "method": prediction.config.method,
        "entropy": prediction.config.entropy,
        "recipe": prediction.config.recipe,
        "arch": prediction.config.train.arch,
        "optimizer": prediction.config.train.optimizer,
        "precision": prediction.precision,
        "cluster": asdict(cluster) | {"world": cluster.world, "usable_bytes": cluster.usable},
        "batch_size_per_gpu": prediction.config.train.batch_size_per_gpu,
        "global_batch": prediction.global_batch,
        "images": prediction.images,
        "epochs": prediction.config.train.epochs,
        "steps": prediction.steps,
        "parameters_trained": _count(prediction, teacher=False),
        "parameters_of_the_teacher": _count(prediction, teacher=True),
        "flops_per_micro_step": prediction.flops,
        "buffers": prediction.buffers,
        "stages": [_stage_as_json(prediction, stage) for stage in prediction.stages],
        "chosen_stage": None if prediction.chosen is None else prediction.chosen.stage,
        "assumptions": assumptions(prediction),
    }


def assumptions(prediction: Forecast) -> list[str]:
    """Return the assumptions of the forecast, one per line."""
    c, g = prediction.cluster, prediction.cluster.gpu
    peak = g.flops_fp32 if prediction.precision == "fp32" else g.flops
    lines = [
        "Nothing was measured on a GPU. Memory is counted from shapes, times are rooflines.",
        f"{g.name}: {g.memory / GIB:.1f} GiB. {c.reserve / GIB:.1f} (--reserve) are for the CUDA context, NCCL, "
        "workspaces of libraries, fragmentation and DALI's buffers.",
        f"Products run at {c.flops_fraction:.0%} (--flops_fraction) of {peak / 1e12:.0f} TFLOP/s (NVIDIA's data sheet, "
        f"dense), all else at {c.bandwidth_fraction:.0%} (--bandwidth_fraction) of {g.bandwidth / 1e12:.2f} TB/s.",
        f"Links run at {c.link_fraction:.0%} (--link_fraction) of NVLink's {g.nvlink / 1e9:.0f} GB/s per direction "
        f"within a node, and of {g.network / 1e9:.0f} GB/s of InfiniBand out of 8 GPUs (DGX). Rings go through all "
        f"GPUs. A message starts in {c.latency * 1e6:.0f} us (--latency), and waits at each GPU as in NCCL's model.",
        f"The host calls an operator in {c.host * 1e6:.0f} us (--host_time), and clips, steps and averages a tensor "
        f"in {c.host_update * 1e6:.0f} us, while the GPU computes. At stage 3, "
        f"DeepSpeed's hooks add {c.host_zero3 * 1e6:.0f} us per module, measured on a CPU.",
        "Saved activations are counted on torch's CPU operators. Attention saves queries, keys, values, its output and "
        "one value per row, like flash attention. Loss kernels are Triton's.",
        "All gradients exist together with all activations. This is an upper bound, because they replace each other.",
        "The loader is on the GPU with two batches prepared, and is never waited for. Operators are not fused (no "
        "torch.compile).",
        "k-NN takes the forward passes in fp32. A checkpoint stops the run for its copy to the host, at "
        f"{c.copy / 1e9:.0f} GB/s. Logging and reductions of single values are left out.",
        f"DeepSpeed is the installed version. Buckets of stage 1 have {prediction.bucket:,} elements. Stages 1 and 2 "
        "all-reduce gradients and gather the updated weights in fp32. Gradients are sent during the backward pass, "
        "except with --overlap_comm false at stages 1 and 2.",
    ]
    if prediction.config.train.offload_optimizer:
        lines.append("--offload_optimizer: the time excludes the update on the host and its transfers over PCIe.")
    if prediction.stages[-1].stage == 3:
        lines.append("At stage 3, autograd saves no gathered weight, and only bandwidth delays prefetching.")
    if prediction.cluster.world > 1 and prediction.synchronised:
        lines.append("BatchNorm is torch's SyncBatchNorm: per layer, a gather forward and a reduction backward.")
    return lines


def _heading(prediction: Forecast) -> list[str]:
    t, c = prediction.config.train, prediction.cluster
    name = prediction.config.method + ("+ER" if prediction.config.entropy else "")
    return [
        f"{name}, {t.arch}: {_count(prediction, teacher=False) / 1e6:.1f} M parameters trained, "
        f"{_count(prediction, teacher=True) / 1e6:.1f} M in the teacher; {t.optimizer}, {prediction.precision}",
        f"{c.nodes} x {c.gpus_per_node} {c.gpu.name}; {t.batch_size_per_gpu} images per GPU, "
        f"{prediction.global_batch:,} per step; {t.epochs} epochs of {prediction.images:,} images: "
        f"{prediction.steps:,} steps",
        f"{prediction.flops / t.batch_size_per_gpu / 1e9:,.1f} GFLOP per image, forward and backward, all views",
        "",
    ]


def _table(title: str, columns: tuple[str, ...] | list[str], rows: list[Cells]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    table.add_row()
    return table


def _memory(prediction: Forecast) -> list[Cells]:
    rows: list[Cells] = []
    for index, part in enumerate(prediction.stages[0].parts):
        at = [stage.parts[index] for stage in prediction.stages]
        if any(p.backward or p.update for p in at):
            rows.append((part.name, *(f"{max(p.backward, p.update) / GIB:.2f}" for p in at)))
    rows.append(("total, backward", *(f"{sum(p.backward for p in s.parts) / GIB:.2f}" for s in prediction.stages)))
    rows.append(("total, update", *(f"{sum(p.update for p in s.parts) / GIB:.2f}" for s in prediction.stages)))
    usable = f"usable: {prediction.cluster.usable / GIB:.1f}"
    rows.append((usable, *("fits" if prediction.fits(s) else "too much" for s in prediction.stages)))
    rows.append(("largest batch per GPU", *(str(s.largest_batch or "none") for s in prediction.stages)))
    return rows


def _traffic(prediction: Forecast, stage: Stage) -> list[Cells]:
    return [
        (
            t.about,
            t.kind.replace("_", "-"),
            f"{t.bytes / 2**20:,.2f}",
            f"{t.messages:,}",
            f"{1e3 * prediction.cluster.seconds(t.kind, t.bytes, t.messages):.2f}",
            "overlaps" if t.hidden else "",
        )
        for t in stage.traffic
    ]


def _times(prediction: Forecast) -> list[Cells]:
    def row(name: str, value: Any) -> Cells:
        return (name, *(value(stage) for stage in prediction.stages))

    return [
        row("forward and backward, ms", lambda s: f"{1e3 * s.time.operators:.1f}"),
        row("host's calls of operators, ms", lambda s: f"{1e3 * s.time.host:.1f}"),
        row("update, ms", lambda s: f"{1e3 * s.time.update:.1f}"),
        row("communication, ms", lambda s: f"{1e3 * s.time.sent:.1f}"),
        row("not overlapped, ms", lambda s: f"{1e3 * s.time.waited:.1f}"),
        row("step, ms", lambda s: f"{1e3 * s.time.total:.1f}"),
        row("images/s", lambda s: f"{prediction.global_batch / s.time.total:,.0f}"),
        row("k-NN in the whole run, s", lambda s: f"{s.pauses.evaluation:,.0f}"),
        row("copies of checkpoints, s", lambda s: f"{s.pauses.checkpoints:,.0f}"),
        row("days", lambda s: f"{prediction.hours(s) / 24:,.2f}"),
        row("GPU-hours", lambda s: f"{prediction.hours(s) * prediction.cluster.world:,.0f}"),
    ]


def _stage_as_json(prediction: Forecast, stage: Stage) -> dict[str, Any]:
    hours = prediction.hours(stage)
    return {
        "stage": stage.stage,
        "fits": prediction.fits(stage),
        "bytes": stage.bytes,
        "parts": [asdict(part) for part in stage.parts],
        "largest_batch_size_per_gpu": stage.largest_batch,
        "sent": [
            asdict(t) | {"seconds": prediction.cluster.seconds(t.kind, t.bytes, t.messages)} for t in stage.traffic
        ],
        "seconds": asdict(stage.time) | {"step": stage.time.total},
        "pauses": asdict(stage.pauses),
        "images_per_s": prediction.global_batch / stage.time.total,
        "days": hours / 24,
        "gpu_hours": hours * prediction.cluster.world,
    }


def _count(prediction: Forecast, *, teacher: bool) -> int:
    return sum(w.numel for w in prediction.weights if w.teacher == teacher and (teacher or w.group is not None))
