"""Check, tune and time the kernels on an NVIDIA GPU. The result is one JSON file and one page of tables.

    python -m bench.gpu                                # bench/results/<name of the GPU>.json, nine minutes
    python -m bench.gpu --budget 1500 --output PATH    # seconds
    python -m bench.gpu --parts correctness

1. environment   the GPU, its clocks, versions, commit, and the rates that it reaches in plain torch
2. correctness   every use, type and path against fp64, races, far offsets; the run ends here if a result is wrong. A
                 result beyond the tolerance but within ten times is "inaccurate": a failure that does not end the run
3. tiles         the shipped tiles (kernels/similarity/tiles.py) and their neighbours; no file is edited
4. losses        NT-Xent, InfoNCE, a queue, both directions, entropy; and eager torch, torch.compile and libraries
5. prototypes    cross-entropy, entropies and Sinkhorn against fp64, and races, as in 2
6. prototype_losses    DINO's class tokens and patches, as in 4
7. views         the photometric kernel against fp64, as in 2
8. alike         whole views compared with the CPU's from the same random draws
9. data          the loader: nvJPEG's decoding, the crops, the finished views, and the kernel alone
10. training     fasttrain/run.py on generated JPEGs: images/s, and the share of a step that waits for data

Times are by the GPU's clock with an empty L2 cache, and contestants alternate. A part starts no more work after its
share of the budget, and the report names the omitted items. The JSON is written during the run, so an interrupted run
leaves its rows. ``pct_of_roofline`` uses the data sheet in bench/kernels/aot.py, and is null for other GPUs. The report
names peers that are not installed (pip install -e '.[bench]'). Exit status: 0, 1 for a failure, 2 without an NVIDIA
GPU.

To add a family of kernels, write a module in bench/gpu/ and add its parts to ``parts()``.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench import RESULTS, ROOT, measure
from bench.gpu import Budget, Part, Run, chip_of, worker_count

_CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "temperature.gpu", "power.draw", "power.limit")


def parts() -> tuple[Part, ...]:
    """Return the parts in their order: correctness of the kernels, tiles, losses, then the loader and training."""
    from bench.gpu import checks, losses, prototypes, similarity, training, views

    return (
        Part(
            "correctness",
            similarity.correctness,
            checks.correctness_table,
            0.18,
            checks.check_failures,
            checks.is_wrong,
        ),
        Part("tiles", similarity.tiles, similarity.tile_table, 0.3),
        Part("losses", losses.losses, losses.losses_table, 0.45),
        Part(
            "prototypes",
            prototypes.correctness,
            checks.correctness_table,
            0.58,
            checks.check_failures,
            checks.is_wrong,
        ),
        Part("prototype_losses", prototypes.losses, prototypes.losses_table, 0.63),
        Part("views", views.correctness, checks.correctness_table, 0.66, checks.check_failures, checks.is_wrong),
        Part("alike", views.alike, views.alike_table, 0.7, views.alike_failures),
        Part("data", views.data, views.data_table, 0.8, views.data_failures),
        Part("training", training.training, training.training_table, 1.0, training.training_failures),
    )


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    os.environ.pop("TRITON_INTERPRET", None)  # otherwise interpreted kernels would be measured
    measure.prepare(threads=1)
    import torch

    if torch.version.cuda is None or not torch.cuda.is_available():
        print(f"bench.gpu: needs an NVIDIA GPU, torch {torch.__version__} found none", file=sys.stderr)
        return 2
    from bench.kernels.aot import CHIPS

    budget = Budget(options.budget)
    about = environment()
    path = options.output or RESULTS / f"{slug(about['device'])}.json"
    chip = chip_of(torch.cuda.get_device_capability(), CHIPS)
    run = Run(path, about, budget, chip=chip, workers=worker_count())
    print(environment_table(about), flush=True)
    return run_parts(run, [part for part in parts() if part.name in options.parts])


def run_parts(run: Run, selected: list[Part]) -> int:
    """Run the parts in turn, print their tables, and return the exit status."""
    status = 0
    run.content["failures"] = failures = []
    for part in selected:
        rows, error = run.start(part), None
        try:
            part.run(run)
        except Exception as fault:  # the report must be written
            error = f"{type(fault).__name__}: {fault}"
        lines = [f"{part.name}: {error}"] if error else []
        lines += part.failures(rows) if part.failures else []
        failures += lines
        left_out = run.finish(error)
        sections = [f"## {part.name}, {run.budget.elapsed():.0f} s", part.table(rows), _named("left out", left_out)]
        sections += [f"**{line}**" for line in lines]
        print("\n" + "\n\n".join(section for section in sections if section), flush=True)
        if lines:
            status = 1
        if part.stops and (error or part.stops(rows)):
            print(f"\nstopped after {part.name}: wrong kernels are not timed", file=sys.stderr)
            break
    print(f"\n{run.path}")
    return status


def environment() -> dict[str, Any]:
    """Return all properties of the machine that a figure depends on."""
    import torch

    gpu = torch.cuda.get_device_properties(0)
    return {
        **measure.machine("cuda"),
        "capability": f"{gpu.major}.{gpu.minor}",
        "multiprocessors": gpu.multi_processor_count,
        "memory_gib": round(gpu.total_memory / 2**30, 1),
        "free_gib": round(torch.cuda.mem_get_info()[0] / 2**30, 1),
        "l2_mib": round(getattr(gpu, "L2_cache_size", 0) / 2**20),
        "cuda": torch.version.cuda,
        "nvidia_smi": nvidia_smi(("driver_version", *_CLOCKS), gpu),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "reached": reached(),
        "nvidia_smi_after": nvidia_smi(_CLOCKS, gpu),
        "commit": measure.commit(),
        "kernels_sha256": sources_digest(ROOT / "kernels"),
        "pipelines_sha256": sources_digest(ROOT / "pipelines"),
    }


def nvidia_smi(fields: tuple[str, ...], gpu: Any) -> dict[str, str] | str:
    """Return the fields of nvidia-smi for this GPU, or its error. No setting is changed."""
    identifier = f"GPU-{gpu.uuid}" if hasattr(gpu, "uuid") else "0"
    command = ["nvidia-smi", f"--id={identifier}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"no answer: {error}"
    values = [value.strip() for value in process.stdout.strip().split(",")]
    if process.returncode or len(values) != len(fields):
        return f"no answer: {(process.stdout + process.stderr).strip()}"
    return dict(zip(fields, values, strict=True))


def reached() -> dict[str, float]:
    """Return TFLOP/s of a plain bf16 product, and TB/s of a copy, reads and writes together."""
    import torch

    clock, size = measure.DeviceClock(), 8192
    a, b = torch.randn(2, size, size, device="cuda", dtype=torch.bfloat16).unbind()
    source = torch.randn(1 << 29, device="cuda", dtype=torch.float16)
    target = torch.empty_like(source)
    product, copy = measure.in_turn(
        [lambda: clock.seconds(lambda: a @ b), lambda: clock.seconds(lambda: target.copy_(source))],
        fewest=5,
        most=5,
        seconds=0,
    )
    return {
        "bf16_product_tflops": round(2 * size**3 / min(product) / 1e12, 1),
        "copy_tb_s": round(2 * source.nbytes / min(copy) / 1e12, 3),
    }


def sources_digest(folder: Path) -> str:
    """Return a digest of the sources, which identifies them without git."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def slug(name: str) -> str:
    """Return a file name, for example nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def environment_table(about: dict[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in about.items())])


def _named(title: str, names: list[str], most: int = 10) -> str:
    """Return the first names as a list. The JSON has all of them."""
    if not names:
        return ""
    more = [f"- and {len(names) - most} more"] if len(names) > most else []
    return "\n".join([f"{title}, {len(names)}:\n", *(f"- {name}" for name in names[:most]), *more])


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=540, metavar="SECONDS", help="start no more work after (540)")
    parser.add_argument("--output", type=Path, metavar="PATH", help="the JSON file (bench/results/<GPU>.json)")
    names = ("correctness", "tiles", "losses", "prototypes", "prototype_losses", "views", "alike", "data", "training")
    parser.add_argument("--parts", nargs="+", choices=names, default=names, help="run only these")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
