"""Measure the time and memory to open a data set of ImageNet's size, before the first image is read.

    taskset -c 1 python -m bench.data.index            # folder, tar, tfrecord; --images 128000 for a tenth of it

The folder has one empty file per ImageNet image, in 1,000 classes. The shards are one file of 1,000 samples (headers,
labels, and holes for images of 110 kB) under 1,281 names. So the time is our work and the system calls on a warm cache.
On a cold cache every sample costs one read of 4 kB from storage. Each case runs in a process of its own. Use
``cpu_seconds`` where other processes use the cores. The figures are for one rank; each rank has its own index.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench import RESULTS, ROOT

IMAGES, CLASSES, SHARD, IMAGE_BYTES = 1_281_167, 1_000, 1_000, 110_000
MIB = 2**20


def make_folder(folder: Path, images: int) -> Path:
    """Write empty files with the names of ImageNet's training set."""
    for label in range(CLASSES):
        name = f"n{1440764 + 4321 * label:08}"
        (folder / name).mkdir()
        for k in range(label, images, CLASSES):
            os.close(os.open(folder / name / f"{name}_{k}.JPEG", os.O_CREAT | os.O_WRONLY))
    return folder


def make_tars(folder: Path, images: int) -> Path:
    """Write shards as webdataset does, with label and image of a sample next to each other."""
    with (folder / "one").open("wb") as file:
        for k in range(SHARD):
            for name, size in ((f"{k:06}.cls", 3), (f"{k:06}.jpg", IMAGE_BYTES)):
                info = tarfile.TarInfo(name)
                info.size = size
                file.write(info.tobuf(tarfile.USTAR_FORMAT))
                if size == 3:
                    file.write(b"%03d" % (k % CLASSES))
                file.seek(-(-file.tell() // 512) * 512 if size == 3 else -(-(file.tell() + size) // 512) * 512)
        file.write(bytes(1024))
    return _linked(folder, images, "{:06}.tar")


def make_records(folder: Path, images: int) -> Path:
    """Write shards as TensorFlow's ImageNet scripts do, with the image as one of ten features."""
    from tests.pipelines.sources.shard_files import example, write_tfrecord

    def records() -> Iterator[bytes]:
        for k in range(SHARD):
            yield example(
                image__height=375,
                image__width=500,
                image__colorspace=b"RGB",
                image__channels=3,
                image__class__label=k % CLASSES + 1,
                image__class__synset=b"n01440764",
                image__class__text=b"tench, Tinca tinca",
                image__format=b"JPEG",
                image__filename=b"n01440764_10026.JPEG",
                image__encoded=bytes(IMAGE_BYTES),
            )

    write_tfrecord(folder / "one", records())
    return _linked(folder, images, "train-{:05}-of-01281")


def _linked(folder: Path, images: int, name: str) -> Path:
    (folder / "shards").mkdir()
    for k in range(-(-images // SHARD)):
        os.link(folder / "one", folder / "shards" / name.format(k))
    return folder / "shards"


CASES: dict[str, Callable[[Path, int], Path]] = {"folder": make_folder, "tar": make_tars, "tfrecord": make_records}


def measure(path: str, cache: str | None) -> dict[str, float]:
    """Open a data set in this process. Memory is measured beyond the memory of the imports."""
    import psutil

    from fasttrain.pipelines import open_source
    from fasttrain.pipelines.views.draw import epoch_order

    process = psutil.Process()
    before, started, computed = process.memory_info().rss, time.perf_counter(), time.process_time()
    source = open_source(path, cache=Path(cache) if cache else None).train
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - computed
    resident = process.memory_info().rss
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    started = time.perf_counter()
    order = epoch_order(0, 0, len(source))
    shuffle, started = time.perf_counter() - started, time.perf_counter()
    for i in order[:2000]:
        source.read(int(i))
    return {
        "images": len(source),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "held_mib": (resident - before) / MIB,
        "peak_mib": (peak - before) / MIB,
        "epoch_order_seconds": shuffle,
        "read_microseconds": (time.perf_counter() - started) / 2000 * 1e6,
    }


def measure_in_process(*arguments: str) -> dict[str, float]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "bench.data.index", "--measure", *arguments]
    process = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    figures: dict[str, float] = json.loads(process.stdout.splitlines()[-1])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--output", type=Path, default=RESULTS / "data-index.json")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        path, cache = (*options.measure, None)[:2]
        print(json.dumps(measure(path, cache)))
        return
    results: dict[str, object] = {"cores": len(os.sched_getaffinity(0))}
    for name in options.cases:
        with tempfile.TemporaryDirectory() as folder:
            path = CASES[name](Path(folder), options.images)
            results[name] = measure_in_process(str(path))
            if name != "folder":
                measure_in_process(str(path), folder + "/index")  # writes the cached index
                results[f"{name}, index kept"] = measure_in_process(str(path), folder + "/index")
        print(name, json.dumps(results[name], indent=1), flush=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
