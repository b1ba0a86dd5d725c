"""Time the loader and the peers' transforms in torch's DataLoader.

    pytest bench/ --benchmark-only -k data --cifar10 DIR --imagenet DIR [--threads 2]

A round is ``SECONDS`` of steady state in a process of its own. Compare ``images_per_s`` in extra_info, next to the
memory of the process and its workers. For ratios on a machine whose speed drifts, use paired.py.
"""

from __future__ import annotations

from typing import Any

import pytest

from bench.data.side import Side
from bench.peers import NotRun, loaders

SECONDS = 4.0


@pytest.mark.parametrize("who", loaders.CONTESTANTS)
@pytest.mark.parametrize("case", range(len(loaders.CASES)), ids=[case.folder for case in loaders.CASES])
def test_data(benchmark: Any, request: pytest.FixtureRequest, not_run: Any, case: int, who: str) -> None:
    about, threads = loaders.CASES[case], request.config.getoption("--threads")
    folder = request.config.getoption(f"--{about.folder}")
    benchmark.group = f"{about.name}, {threads} threads"
    if folder is None:
        not_run("data", about.name, who, f"no folder; give --{about.folder}")
    try:
        side = Side(who, case, folder, threads)
    except NotRun as reason:
        not_run("data", about.name, who, str(reason))
    try:
        answers: list[dict[str, float]] = []
        benchmark.pedantic(lambda: answers.append(side.ask(str(SECONDS))), rounds=3)
    finally:
        side.close()
    rates = sorted(answer["images"] / answer["seconds"] for answer in answers)
    benchmark.extra_info |= {
        "contestant": who,
        "threads": threads,
        "images_per_s": round(rates[len(rates) // 2], 1),
        "memory_mib": round(max(answer["memory_mib"] for answer in answers), 1),
    }
