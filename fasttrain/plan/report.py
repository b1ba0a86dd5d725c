"""What a forecast says, as tables and as JSON."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from .forecast import Forecast, Stage
from .hardware import GIB

Cells = tuple[str, ...]


def show(found: Forecast) -> None:
    """Print everything that is known about the run."""
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False)
    for line in _heading(found):
        console.print(line)
    stages = [f"ZeRO {stage.stage}" for stage in found.stages]
    console.print(_table("GiB on each GPU", stages, _memory(found)))
    chosen = found.chosen or min(found.stages, key=lambda stage: stage.bytes)
    if chosen.traffic:
        columns = ("operation", "MiB a step", "messages", "ms", "")
        console.print(_table(f"sent in a step at ZeRO {chosen.stage}", columns, _traffic(found, chosen)))
    console.print(_table("predicted, not measured", stages, _times(found)))
    console.print("Taken for granted:")
    for number, line in enumerate(assumptions(found), 1):
        console.print(f"{number:3}. {line}", soft_wrap=True)
    if found.chosen is not None:
        console.print(f"\nRun it with --zero_stage {found.chosen.stage}.")


def as_json(found: Forecast) -> dict[str, Any]:
    """Everything as plain numbers: bytes, seconds, images."""
    cluster = found.cluster
    return {
        "method": found.config.method,
        "entropy": found.config.entropy,
        "recipe": found.config.recipe,
        "arch": found.config.train.arch,
        "optimizer": found.config.train.optimizer,
        "precision": found.precision,
        "cluster": asdict(cluster) | {"world": cluster.world, "usable_bytes": cluster.usable},
        "batch_size_per_gpu": found.config.train.batch_size_per_gpu,
        "global_batch": found.global_batch,
        "images": found.images,
        "epochs": found.config.train.epochs,
        "steps": found.steps,
        "parameters_trained": _count(found, teacher=False),
        "parameters_of_the_teacher": _count(found, teacher=True),
        "flops_per_micro_step": found.flops,
        "buffers": found.buffers,
        "stages": [_stage_as_json(found, stage) for stage in found.stages],
        "chosen_stage": None if found.chosen is None else found.chosen.stage,
        "assumptions": assumptions(found),
    }


def assumptions(found: Forecast) -> list[str]:
    """What the figures stand on, a line each."""
    c, g = found.cluster, found.cluster.gpu
    peak = g.flops_fp32 if found.precision == "fp32" else g.flops
    lines = [
        "nothing here was measured on a GPU; shapes are counted, times are rooflines",
        f"{g.name}: {g.memory / GIB:.1f} GiB, of which {c.reserve / GIB:.1f} (--reserve) are for the CUDA context, "
        "NCCL, libraries' workspaces, the allocator's gaps and DALI's buffers",
        f"products at {c.flops_fraction:.0%} (--flops_fraction) of {peak / 1e12:.0f} TFLOP/s (NVIDIA's data sheet, "
        f"dense), all else at {c.bandwidth_fraction:.0%} (--bandwidth_fraction) of {g.bandwidth / 1e12:.2f} TB/s",
        f"links at {c.link_fraction:.0%} (--link_fraction) of NVLink's {g.nvlink / 1e9:.0f} GB/s a direction within a "
        f"node and {g.network / 1e9:.0f} GB/s of InfiniBand out of 8 GPUs (DGX); rings through all GPUs; "
        f"{c.latency * 1e6:.0f} us (--latency) a message",
        "what is kept for the backward pass is counted on torch's operators for the CPU; attention keeps queries, "
        "keys, values, its output and a number a row, as flash attention does; loss kernels are the Triton ones",
        "all gradients are held beside all activations, though they come as those go: more than is ever held",
        "the loader is on the GPU with two batches ahead, and is never waited for; operators are not fused "
        "(no torch.compile), and none waits for Python",
        "evaluation, checkpoints, logging and single numbers that are reduced are left out",
        f"DeepSpeed as installed: buckets of {found.bucket:,} elements, at stage 3 an eighth of it; stages 1 and 2 "
        "all-reduce gradients and gather the updated weights in fp32; only stage 3 and --overlap_comm send beside the "
        "products",
    ]
    if found.config.train.offload_optimizer:
        lines.append("--offload_optimizer: neither the host's update nor the way to it over PCIe is in the time")
    if found.stages[-1].stage == 3:
        lines.append("at stage 3 autograd keeps no gathered weight, and fetching ahead is never late but for bandwidth")
    if found.cluster.world > 1 and found.synchronised:
        lines.append("BatchNorm is torch's SyncBatchNorm: a gather forward and a reduction backward for every layer")
    return lines


def _heading(found: Forecast) -> list[str]:
    t, c = found.config.train, found.cluster
    name = found.config.method + ("+ER" if found.config.entropy else "")
    return [
        f"{name}, {t.arch}: {_count(found, teacher=False) / 1e6:.1f} M parameters trained, "
        f"{_count(found, teacher=True) / 1e6:.1f} M of the teacher; {t.optimizer}, {found.precision}",
        f"{c.nodes} x {c.gpus_per_node} {c.gpu.name}; {t.batch_size_per_gpu} images a GPU, {found.global_batch:,} a "
        f"step; {t.epochs} epochs of {found.images:,} images: {found.steps:,} steps",
        f"{found.flops / t.batch_size_per_gpu / 1e9:,.1f} GFLOP an image, forward and backward, all views",
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


def _memory(found: Forecast) -> list[Cells]:
    rows: list[Cells] = []
    for index, part in enumerate(found.stages[0].parts):
        at = [stage.parts[index] for stage in found.stages]
        if any(p.backward or p.update for p in at):
            rows.append((part.name, *(f"{max(p.backward, p.update) / GIB:.2f}" for p in at)))
    rows.append(("backward, together", *(f"{sum(p.backward for p in s.parts) / GIB:.2f}" for s in found.stages)))
    rows.append(("update, together", *(f"{sum(p.update for p in s.parts) / GIB:.2f}" for s in found.stages)))
    usable = f"of {found.cluster.usable / GIB:.1f}"
    rows.append((usable, *("fits" if found.fits(s) else "too much" for s in found.stages)))
    rows.append(("largest batch a GPU", *(str(s.largest_batch or "none") for s in found.stages)))
    return rows


def _traffic(found: Forecast, stage: Stage) -> list[Cells]:
    return [
        (
            t.about,
            t.kind.replace("_", "-"),
            f"{t.bytes / 2**20:,.2f}",
            f"{t.messages:,}",
            f"{1e3 * found.cluster.seconds(t.kind, t.bytes, t.messages):.2f}",
            "beside the products" if t.hidden else "",
        )
        for t in stage.traffic
    ]


def _times(found: Forecast) -> list[Cells]:
    def row(name: str, value: Any) -> Cells:
        return (name, *(value(stage) for stage in found.stages))

    return [
        row("forward and backward, ms", lambda s: f"{1e3 * s.time.operators:.1f}"),
        row("update, ms", lambda s: f"{1e3 * s.time.update:.1f}"),
        row("sent, ms", lambda s: f"{1e3 * s.time.sent:.1f}"),
        row("of it waited for, ms", lambda s: f"{1e3 * s.time.waited:.1f}"),
        row("step, ms", lambda s: f"{1e3 * s.time.total:.1f}"),
        row("images/s", lambda s: f"{found.global_batch / s.time.total:,.0f}"),
        row("days", lambda s: f"{found.hours(s) / 24:,.2f}"),
        row("GPU-hours", lambda s: f"{found.hours(s) * found.cluster.world:,.0f}"),
    ]


def _stage_as_json(found: Forecast, stage: Stage) -> dict[str, Any]:
    hours = found.hours(stage)
    return {
        "stage": stage.stage,
        "fits": found.fits(stage),
        "bytes": stage.bytes,
        "parts": [asdict(part) for part in stage.parts],
        "largest_batch_size_per_gpu": stage.largest_batch,
        "sent": [asdict(t) | {"seconds": found.cluster.seconds(t.kind, t.bytes, t.messages)} for t in stage.traffic],
        "seconds": asdict(stage.time) | {"step": stage.time.total},
        "images_per_s": found.global_batch / stage.time.total,
        "days": hours / 24,
        "gpu_hours": hours * found.cluster.world,
    }


def _count(found: Forecast, *, teacher: bool) -> int:
    return sum(w.numel for w in found.weights if w.teacher == teacher and (teacher or w.group is not None))
