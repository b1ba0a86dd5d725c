"""Compare the loader with each peer: images per second, ratios of neighbours in time, and memory.

    pip install -e '.[bench]' kornia
    python -m bench.data.paired --cifar10 DIR --imagenet DIR        # folders of JPEGs; one of them is enough

The cases are CIFAR-10 with SimCLR's two views and ImageNet with DINO's ten views, each with the published recipe. Ours
is the Loader with --threads threads. The peers are the transforms of lightly, torchvision (v2) and, if installed,
kornia, in torch's DataLoader with the same number of workers. Every side is a process of its own. One side works while
the others have read ahead and wait. A round measures each side once, and the first side of a round changes. A ratio is
our images per second divided by the peer's in the same round (above 1: ours is faster): the median over the rounds, and
their range. ``cpu_ratio`` compares CPU seconds per image, which a busy machine disturbs less. Memory is of the process
and its workers, with shared pages counted once. --memory IMAGES lists the memory of our side over that many images.
FFCV-SSL publishes figures for GPUs only.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import RESULTS, measure
from bench.data.side import Side
from bench.peers import OURS, NotRun, loaders

_OUTPUT = RESULTS / "data-cpu.json"


def main() -> None:
    options = _options()
    content: dict[str, Any] = {
        "machine": measure.machine() | {"threads": options.threads},
        "commit": measure.commit(),
        "settings": {"rounds": options.rounds, "seconds": options.seconds},
        "units": {"ratio": "our images per second by the peer's", "memory_mib": "MiB, workers included"},
        "results": {},
        "not_run": [],
    }
    print(measure.title(content["machine"]), flush=True)
    for number, case in enumerate(loaders.CASES):
        folder = getattr(options, case.folder)
        if folder is None:
            content["not_run"].append({"case": case.name, "reason": f"no folder; give --{case.folder}"})
            continue
        content["results"][case.name] = result = _compare(number, folder, options, content["not_run"])
        print(_table(case, result), flush=True)
        options.output.write_text(json.dumps(content, indent=1) + "\n")
    for entry in content["not_run"]:
        print("not run: " + ", ".join(entry.values()))


def _compare(case: int, folder: Path, options: argparse.Namespace, not_run: list[dict[str, str]]) -> dict[str, Any]:
    sides: dict[str, Side] = {}
    try:
        for who in loaders.CONTESTANTS:
            try:
                sides[who] = Side(who, case, folder, options.threads)
            except NotRun as reason:
                not_run.append({"case": loaders.CASES[case].name, "contestant": who, "reason": str(reason)})
        rounds = []
        for number in range(options.rounds):
            names = [*sides][number % len(sides) :] + [*sides][: number % len(sides)]
            rounds.append({who: sides[who].ask(str(options.seconds)) for who in names})
        result = {who: _summary(who, rounds) for who in sides}
        if options.memory:
            result[OURS]["memory_over_images"] = sides[OURS].ask(f"memory {options.memory}")
        return result
    finally:
        for side in sides.values():
            side.close()


def _summary(who: str, rounds: Sequence[dict[str, dict[str, float]]]) -> dict[str, Any]:
    rates = [one[who]["images"] / one[who]["seconds"] for one in rounds]
    cpu = [one[who]["cpu_seconds"] / one[who]["images"] for one in rounds]
    summary: dict[str, Any] = {
        "images_per_s": _spread(rates),
        "cpu_ms_per_image": _spread([1e3 * seconds for seconds in cpu]),
        "memory_mib": round(max(one[who]["memory_mib"] for one in rounds), 1),
        "others_part": _spread([one[who]["others_part"] for one in rounds]),
    }
    if who != OURS:
        ours = [one[OURS] for one in rounds]
        summary["ratio"] = _spread([o["images"] / o["seconds"] / rate for o, rate in zip(ours, rates, strict=True)])
        summary["cpu_ratio"] = _spread([c / (o["cpu_seconds"] / o["images"]) for o, c in zip(ours, cpu, strict=True)])
    return summary


def _spread(values: list[float]) -> dict[str, float]:
    return {k: float(f"{f(values):.4g}") for k, f in (("min", min), ("median", statistics.median), ("max", max))}


def _table(case: loaders.Case, result: dict[str, Any]) -> str:
    others = max(row["others_part"]["median"] for row in result.values())
    lines = [f"\n{case.name}, batch {case.batch}; others used {100 * others:.0f} % of the machine"]
    for who, row in result.items():
        line = (
            f"  {who:12} {row['images_per_s']['median']:9.1f} images/s {row['cpu_ms_per_image']['median']:8.3f} ms CPU"
        )
        line += f" {row['memory_mib']:7.0f} MiB"
        if "ratio" in row:
            line += "   ours {median:.2f} times as fast ({min:.2f}-{max:.2f})".format(**row["ratio"])
            line += ", {median:.2f} by CPU time".format(**row["cpu_ratio"])
        lines.append(line)
    if "memory_over_images" in result[OURS]:
        lines.append(
            "  memory of ours over {images} images, MiB: {memory_mib}".format(**result[OURS]["memory_over_images"])
        )
    return "\n".join(lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for case in loaders.CASES:
        parser.add_argument(f"--{case.folder}", type=Path, metavar="DIR", help=f"images of {case.name}")
    parser.add_argument("--threads", type=int, default=2, help="threads of our side, workers of the peers (2)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=5.0, help="seconds per round and side")
    parser.add_argument(
        "--memory",
        type=int,
        default=20_000,
        metavar="IMAGES",
        help="list our memory over these images (20000)",
    )
    parser.add_argument("--output", type=Path, default=_OUTPUT)
    return parser.parse_args()


if __name__ == "__main__":
    main()
