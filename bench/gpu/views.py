"""Check the photometric kernel on a GPU, and measure the stages of the loader.

- checks: every use of tests/pipelines/photometric/stress.py against the fp64 reference, in every type
- alike: whole views, from nvJPEG on, against the CPU's views of the same draws, and against a repetition, to the bit
- data: generated JPEGs (ImageNet's 500 x 375 at 110 kB, and CIFAR's 32 x 32), decoded by nvJPEG on the GPU

Each stage of data contains the stage before: ``decode``; ``crops``, the DALI graph; ``loader``, the finished views. So
augmentation takes the time of the loader minus decode. ``kernel`` is the photometric kernel by the GPU's clock on all
views of a batch. Its roofline is the time of its bytes at the data sheet's bandwidth.
"""

from __future__ import annotations

import io
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bench import measure
from tests.pipelines.photometric import stress

from . import Row, Run, attempt, markdown, milliseconds, percent
from .checks import DTYPES, run_check


@dataclass(frozen=True)
class Check:
    """One call of ``stress.check``."""

    use: str
    dtype: str
    count: int
    size: int
    kind: str = "photometric"

    def __str__(self) -> str:
        return f"{self.kind}: {self.use}, {self.dtype}, {self.count} images of {self.size} pixels"

    def __call__(self, device: str) -> None:
        stress.check(self.use, self.count, self.size, DTYPES[self.dtype], device)


def checks() -> list[Check]:
    sizes = ((12, 224), (24, 96), (64, 33), (64, 3), (3, 1))
    return [Check(use, dtype, *size) for size in sizes for dtype in DTYPES for use in stress.USES]


def correctness(run: Run) -> None:
    for _, row in run.side_by_side(run_check, checks()):
        run.add(row)


# Alike

_METHODS = ("cmc", "dino", "infomin", "mocov3")  # Lab; multi-crop; RandAugment and jigsaw; solarisation
_LEVELS = 2.0  # of 255: allowed mean difference of two decoders and two resizers


def alike(run: Run) -> None:
    files = jpegs(32, 375, 500)
    for method in run.in_time(_METHODS):
        row, fault = attempt(lambda method=method: distance(recipe(Case(method, "imagenet", 32, 375, 500)), files))
        run.add({"method": method, "fault": fault, **(row or {})})


def distance(own: Any, files: list[bytes], device: str = "cuda") -> dict[str, Any]:
    """Return the difference of a batch's views from the CPU's, in levels of 8 bits, and whether they repeat."""
    ours, again, expected = (_first(own, files, place) for place in (device, device, "cpu"))
    levels = torch.tensor(own.std).view(-1, 1, 1) * (1 if own.color_space == "lab" else 255)  # Lab has its own units
    gaps = [((a - b).abs() * levels) for a, b in zip(ours, expected, strict=True)]
    values = torch.cat([group.flatten() for group in gaps])
    images = torch.cat([group.flatten(0, 1).mean((1, 2, 3)) for group in gaps])
    return {
        "mean_levels": float(f"{values.mean():.3g}"),
        "worst_image_levels": float(f"{images.max():.3g}"),
        "beyond_16_levels": float(f"{(values > 16).double().mean():.2g}"),
        "repeats": all(torch.equal(a, b) for a, b in zip(ours, again, strict=True)),
    }


def _first(own: Any, files: list[bytes], device: str) -> list[Tensor]:
    from fasttrain.pipelines import Loader

    loader = Loader(Files(files), own, len(files), device=device, shuffle=False)
    try:
        return [group.cpu() for group in next(loader.epoch(0)).views]
    finally:
        loader.close()


def alike_table(rows: list[Row]) -> str:
    names = ("mean_levels", "worst_image_levels", "beyond_16_levels", "repeats")
    body = [[row["method"], *(row.get(name, row["fault"]) for name in names)] for row in rows]
    return markdown(["of 255 levels", "mean", "worst image", "share beyond 16", "the same again"], body)


def alike_failures(rows: list[Row]) -> list[str]:
    """Return a line per recipe that failed, or with views that differ from the CPU's."""
    return [
        f"views of {row['method']}: {row['fault'] or str(row['mean_levels']) + ' levels from the CPU in the mean'}"
        for row in rows
        if row["fault"] or row["mean_levels"] > _LEVELS
    ]


# Data

_IMAGES = 512  # decoded repeatedly
_SECONDS, _WARM = 3.0, 8


@dataclass(frozen=True)
class Case:
    """A recipe with its batch and image size."""

    method: str
    recipe: str
    batch: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.method}, {self.recipe} recipe, batch {self.batch}"


CASES = (Case("dino", "imagenet", 256, 375, 500), Case("simclr", "cifar", 1024, 32, 32))
STAGES = ("decode", "crops", "loader", "kernel")


def jpegs(count: int, height: int, width: int) -> list[bytes]:
    """Return JPEG files of random coarse shapes with grain, in quality 95."""
    rng, files = np.random.default_rng(0), []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((width, height))
        grain = rng.normal(0, 9, (height, width, 3))
        pixels = np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=95)
        files.append(file.getvalue())
    return files


class Files:
    """A source of a million images from JPEGs in memory."""

    name, labels, classes, channels, encoded = "drawn", None, (), 3, True

    def __init__(self, files: list[bytes]) -> None:
        self.files = [np.frombuffer(file, np.uint8) for file in files]

    def __len__(self) -> int:
        return 10**6

    def read(self, i: int) -> Any:
        return self.files[i % len(self.files)]

    def describe(self, i: int) -> str:
        return f"drawn {i}"


def data(run: Run) -> None:
    for case in CASES:
        files = jpegs(_IMAGES, case.height, case.width)
        for stage in run.in_time([Stage(case, name) for name in STAGES]):
            seconds, fault = attempt(lambda stage=stage, files=files: stage.seconds(files))
            row: Row = {"case": str(case), "stage": stage.name, "seconds": seconds, "fault": fault}
            row["file_bytes"] = round(sum(map(len, files)) / len(files))
            row["images_per_s"] = None if seconds is None else round(case.batch / seconds, 1)
            if stage.name == "kernel":
                row["pct_of_roofline"] = percent(roofline_seconds(case, run.chip), seconds)
            run.add(row)


@dataclass(frozen=True)
class Stage:
    """A timed part of the loader."""

    case: Case
    name: str

    def __str__(self) -> str:
        return f"{self.case}: {self.name}"

    def seconds(self, files: list[bytes]) -> float:
        """Return seconds per batch in steady state."""
        if self.name == "kernel":
            return kernel_seconds(self.case)
        threads = min(16, os.cpu_count() or 1)
        if self.name == "loader":
            return _steady(_loaded(self.case, files, threads))
        return _steady(_graph(self.case, files, threads, crops=self.name == "crops"))


def recipe(case: Case) -> Any:
    from fasttrain.config.resolve import resolve

    return resolve(case.method, {"recipe": case.recipe, "data_path": "-"}).views


def roofline_seconds(case: Case, chip: Any) -> float | None:
    """Return the time of the bytes of a batch in seconds, or None for an unknown chip.

    Per value, a byte is read and fp32 written. Hue and blur write and read a byte, the mean for contrast reads one.
    """
    from bench.kernels.aot_photometric import BANDWIDTH
    from fasttrain.pipelines.views.recipe import sides

    if chip is None:
        return None
    views = recipe(case).each
    between = [2 * (view.jitter[3] > 0) + any(view.jitter) + 2 * (view.blur > 0) for view in views]
    moved = sum(3 * math.prod(sides(view.size)) * (5 + more) for view, more in zip(views, between, strict=True))
    return float(case.batch * moved / BANDWIDTH[chip.name])


def kernel_seconds(case: Case) -> float:
    """Return the seconds of the kernel on all views of a batch, launches included."""
    from fasttrain.pipelines.photometric.draws import Look, draws
    from fasttrain.pipelines.photometric.launch import finish
    from fasttrain.pipelines.views.draw import draw_parameters
    from fasttrain.pipelines.views.recipe import sides

    own, sizes = recipe(case), (np.full(case.batch, case.height), np.full(case.batch, case.width))
    drawn, look = draw_parameters(own, 0, 0, np.arange(case.batch), *sizes), Look.of(own)
    todo = [draws(view, 3, drawn, number) for number, view in enumerate(own.each)]
    shapes = [(case.batch, *sides(view.size), 3) for view in own.each]
    pixels = [torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda") for shape in shapes]
    out = [torch.empty(shape, device="cuda") for shape in shapes]

    def once() -> None:
        for k, one in enumerate(todo):
            finish(pixels[k], one, look, out=out[k])

    clock = measure.DeviceClock()
    return min(clock.seconds(once) for _ in range(10))


def _loaded(case: Case, files: list[bytes], threads: int) -> Iterator[Any]:
    from fasttrain.pipelines import Loader

    return Loader(Files(files), recipe(case), case.batch, device="cuda", threads=threads).epoch(0)


def _graph(case: Case, files: list[bytes], threads: int, *, crops: bool) -> Iterator[Any]:
    """Run the DALI graph alone. Without ``crops`` it decodes and crops one pixel."""
    from fasttrain.pipelines import View, dali
    from fasttrain.pipelines.views.draw import draw_parameters

    own = recipe(case) if crops else replace(recipe(case), views=(View(1),))
    images = [Files(files).read(i) for i in range(case.batch)]
    sizes = (np.full(case.batch, case.height), np.full(case.batch, case.width))
    fed = dali.feed(own, images, draw_parameters(own, 0, 0, np.arange(case.batch), *sizes), "cuda")
    pipeline = dali.build(own, case.batch, lambda: fed, encoded=True, device="cuda", threads=threads)
    while True:
        yield pipeline.run()


def _steady(batches: Iterator[Any], clock: Callable[[], float] = time.perf_counter) -> float:
    for _ in range(_WARM):
        next(batches)
    torch.cuda.synchronize()
    started, count = clock(), 0
    while clock() - started < _SECONDS:
        next(batches)
        count += 1
    torch.cuda.synchronize()
    return (clock() - started) / count


def data_table(rows: list[Row]) -> str:
    """Return a table with a line per stage, and the time that each adds to the stage before."""
    body, before = [], 0.0
    for row in rows:
        seconds = row["seconds"]
        separate = row["stage"] in ("decode", "kernel") or seconds is None
        more = None if separate else milliseconds(seconds - before)
        before = seconds or 0.0
        cells = [milliseconds(seconds) or row["fault"], more, row["images_per_s"], row.get("pct_of_roofline")]
        body.append([f"{row['case']}: {row['stage']}", *cells])
    return markdown(["loader", "ms per batch", "added to the stage before", "images/s", "% of roofline"], body)


def data_failures(rows: list[Row]) -> list[str]:
    """Return a line per stage that failed."""
    return [f"{row['case']}: {row['stage']}: {row['fault']}" for row in rows if row["fault"] not in (None, "OOM")]
