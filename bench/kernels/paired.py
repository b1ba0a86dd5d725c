"""Compare the kernels with each peer in one process: ratios of neighbours in time.

    pip install -e '.[bench]'
    python -m bench.kernels.paired --output bench/results/kernels-cpu.json

A round times ours and one peer; the first one alternates. Each time is a forward and backward pass from the same
tensors, repeated to last at least 10 ms. Before timing, both must agree on the loss and the gradients. A ratio is the
peer's seconds divided by ours in the same round (above 1: ours is faster): the median over the rounds, and their range.
Memory is the peak beyond the inputs, measured separately (see bench/measure.py). Three more figures:

- sgemm       NT-Xent against plain fp32 products of 4096 x 4096: the share of the processor's rate that its operations
              reach, as best of ours by best of the products, and as the median of the rounds
- overhead    microseconds of NT-Xent at 2B = 128 from unit rows, minus the same maths in the fewest torch calls
- others_part share of the machine that other processes used; above a few percent the figures are not reliable
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import measure

_FEWEST = 3
_SHORTEST = 0.01  # least seconds per side of a round
Step = Callable[[], Any]


def main() -> None:
    options = _options()
    measure.prepare(options.threads)
    from bench.peers import OURS, prototypes, regularisers, similarity

    sgemm = measure.Sgemm(options.device)
    content: dict[str, Any] = {
        "machine": measure.machine(options.device),
        "commit": measure.commit(),
        "settings": {"rounds": options.rounds, "seconds": options.seconds, "only": options.only},
        "units": {"seconds": "one forward and backward", "ratio": "the peer's seconds by ours", "peak_bytes": "bytes"},
        "results": {},
        "not_run": [],
    }
    print(measure.title(content["machine"]), flush=True)
    for operation in (*similarity.OPERATIONS, *prototypes.OPERATIONS, *regularisers.OPERATIONS):
        for case in operation.cases:
            label = f"{operation.name} {case.name}"
            if options.only and not any(text in label for text in options.only):
                continue
            case = replace(case, device=options.device)
            result, not_run = _compare(operation, case, options)
            if operation is similarity.NT_XENT:
                ours = operation.step(OURS, case)
                result["sgemm"] = _against_sgemm(ours, sgemm, operation.flops(case), options)
            content["results"][label] = result
            content["not_run"] += not_run
            print(_table(label, result, not_run), flush=True)
            _write(options.output, content)
    if not options.only or "overhead" in options.only:
        content["overhead"] = _overhead(options)
        print("\n" + "overhead: {ours_us} us, {plain_us} us in plain torch, {us} us more".format(**content["overhead"]))
    content["sgemm_gflops"] = [round(rate / 1e9, 1) for rate in sgemm.rates]
    content["targets"] = _targets(content)
    print(_target_table(content["targets"]))
    _write(options.output, content)


def _compare(operation: Any, case: Any, options: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Return ours against every peer that runs, and the reasons of the other peers."""
    from bench.peers import OURS, NotRun, check_agreement

    ours = operation.step(OURS, case)
    expected = ours()
    peak, results = measure.peak_bytes(ours, case.device), sum(x.nbytes for x in expected)
    result: dict[str, Any] = {"baseline": operation.baseline, OURS: {"peak_bytes": peak}, "peers": {}}
    result["result_bytes"] = results
    every_time: list[float] = []
    not_run = []
    for name in operation.contestants:
        if name == OURS:
            continue
        try:
            peer = operation.step(name, case)
            outputs = peer()
        except NotRun as reason:
            entry = {"operation": operation.name, "case": case.name, "contestant": name, "reason": str(reason)}
            not_run.append(entry)
            continue
        check_agreement(outputs, expected, name)
        del outputs
        theirs = measure.peak_bytes(peer, case.device)
        bystanders = measure.Bystanders()
        rounds = alternate(ours, peer, options.rounds, options.seconds)
        every_time += [a for a, _ in rounds]
        result["peers"][name] = {
            "seconds": _spread([b for _, b in rounds]),
            "ours_seconds": _spread([a for a, _ in rounds]),
            "ratio": _spread([b / a for a, b in rounds]),
            "ratios": [_round(b / a) for a, b in rounds],
            "rounds": len(rounds),
            "peak_bytes": theirs,
            "peak_ratio": _round(theirs / peak),
            "beyond_results_ratio": _round((theirs - results) / (peak - results)),
            "others_part": _round(bystanders.part()),
        }
    result[OURS]["seconds"] = _spread(every_time)
    return result, not_run


def alternate(ours: Step, peer: Step, most: int, seconds: float) -> list[tuple[float, float]]:
    """Return the seconds per call of both, round by round. The number of rounds fits ``seconds``, at most ``most``."""
    lasts = [measure.seconds_per_call(side) for side in (ours, peer)]
    calls = [max(1, round(_SHORTEST / last)) for last in lasts]
    a_round = sum(last * count for last, count in zip(lasts, calls, strict=True))
    rounds = []
    for number in range(max(_FEWEST, min(most, int(seconds / a_round)))):
        times = [0.0, 0.0]
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            times[side] = measure.seconds_per_call((ours, peer)[side], calls[side])
        rounds.append((times[0], times[1]))
    return rounds


def _against_sgemm(ours: Step, sgemm: measure.Sgemm, flops: float, options: argparse.Namespace) -> dict[str, Any]:
    sgemm.measure(1)
    rounds = alternate(ours, sgemm, options.rounds, options.seconds)
    sgemm.rates += [sgemm.flops / seconds for _, seconds in rounds]
    fastest = min(seconds for seconds, _ in rounds)
    parts = [100 * flops / a / (sgemm.flops / b) for a, b in rounds]
    return {
        "ours_gflops": _round(flops / fastest / 1e9),
        "sgemm_gflops": _round(sgemm.best / 1e9),
        "pct_sgemm": _round(100 * flops / fastest / sgemm.best),
        "pct_sgemm_of_rounds": _spread(parts),
        "rounds": len(rounds),
    }


def _overhead(options: argparse.Namespace) -> dict[str, Any]:
    """Return the microseconds that our operator needs beyond its maths, on small inputs."""
    import torch
    import torch.nn.functional as F

    from bench.peers import check_agreement
    from bench.peers.similarity import plain_nt_xent
    from fasttrain.kernels import nt_xent

    generator, rows, scale = torch.Generator().manual_seed(0), 64, 10.0
    z0, z1 = F.normalize(torch.randn(2, rows, 128, generator=generator), dim=2).unbind()
    z0, z1 = (z.to(options.device, copy=True).requires_grad_() for z in (z0, z1))

    def step(loss: Callable[[], torch.Tensor]) -> Step:
        def run() -> tuple[torch.Tensor, ...]:
            value = loss()
            gradients = torch.autograd.grad(value, (z0, z1))
            if options.device != "cpu":
                torch.cuda.synchronize()
            return value.detach(), *gradients

        return run

    ours, plain = step(lambda: nt_xent(z0, z1, temperature=1 / scale)), step(lambda: plain_nt_xent(z0, z1, scale))
    check_agreement(plain(), ours(), "plain torch")
    for _ in range(50):
        ours(), plain()
    bystanders = measure.Bystanders()
    pairs = []
    for number in range(options.pairs):
        times = [0.0, 0.0]
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            started = time.perf_counter()
            (ours, plain)[side]()
            times[side] = 1e6 * (time.perf_counter() - started)
        pairs.append(times)
    return {
        "case": f"2B={2 * rows} D=128, unit rows given",
        "ours_us": _round(statistics.median(a for a, _ in pairs)),
        "plain_us": _round(statistics.median(b for _, b in pairs)),
        "us": _round(statistics.median(a - b for a, b in pairs)),
        "pairs": len(pairs),
        "others_part": _round(bystanders.part()),
    }


def _targets(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the targets of the kernels with the measured values; None for a case that was not run."""
    from bench.peers.similarity import NT_XENT

    results = content["results"]

    def value_of(label: str, *keys: str) -> float | None:
        entry = results.get(label)
        for key in keys:
            entry = None if entry is None else entry.get(key)
        return entry

    largest, entropy = "nt_xent 2B=8192 D=128", "vmf_entropy N=4096 D=256"
    dino, small = (f"dino B={batch} K=65536 D=256" for batch in (64, 16))
    sinkhorn = "sinkhorn B=2048 K=3000 D=128"
    against_lightly = {
        label.partition(" ")[2]: result["peers"]["lightly"]["ratio"]["median"]
        for label, result in results.items()
        if label.startswith("nt_xent ")
    }
    slowest = min(against_lightly, key=against_lightly.get, default="")
    complete = len(against_lightly) == len(NT_XENT.cases)
    rows = [
        (f"{largest}: times lightly's speed", ">=", 20, value_of(largest, "peers", "lightly", "ratio", "median")),
        (f"{largest}: % of sgemm", ">=", 75, value_of(largest, "sgemm", "pct_sgemm")),
        (f"{largest}: lightly's memory by ours", ">", 40, value_of(largest, "peers", "lightly", "peak_ratio")),
        (
            f"nt_xent, slowest of all sizes ({slowest}): times lightly's speed",
            ">=",
            1,
            against_lightly[slowest] if complete else None,
        ),
        (f"{entropy}: times the official speed", ">=", 8, value_of(entropy, "peers", "official", "ratio", "median")),
        ("nt_xent 2B=128: overhead, us", "<", 50, content.get("overhead", {}).get("us")),
        (f"{dino}: times lightly's speed", ">=", 1.8, value_of(dino, "peers", "lightly", "ratio", "median")),
        (f"{small}: times lightly's speed", ">=", 1, value_of(small, "peers", "lightly", "ratio", "median")),
        (
            f"{dino}: lightly's memory beyond the gradients by ours",
            ">=",
            20,
            value_of(dino, "peers", "lightly", "beyond_results_ratio"),
        ),
        (f"{sinkhorn}: times lightly's speed", ">=", 3, value_of(sinkhorn, "peers", "lightly", "ratio", "median")),
    ]
    compare = {">=": float.__ge__, ">": float.__gt__, "<": float.__lt__}
    return [
        {"target": name, "wanted": f"{sign} {bound}", "found": value, "met": None if value is None else met}
        for name, sign, bound, value in rows
        for met in [value is not None and compare[sign](float(value), float(bound))]
    ]


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def _spread(values: list[float]) -> dict[str, float]:
    return {k: _round(f(values)) for k, f in (("min", min), ("median", statistics.median), ("max", max))}


def _table(label: str, result: dict[str, Any], not_run: list[dict[str, str]]) -> str:
    """Return a Markdown table of one case."""
    from bench.peers import OURS

    lines = [f"\n### {label}\n", "| | min | median | by ours (range) | rounds | peak memory | by ours | others' CPU |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|---:|")
    seconds, peak = result[OURS]["seconds"], result[OURS]["peak_bytes"]
    lines.append(f"| {OURS} | {_time(seconds['min'])} | {_time(seconds['median'])} | 1 | | {_size(peak)} | 1 | |")
    for name, peer in result["peers"].items():
        seconds, ratio = peer["seconds"], peer["ratio"]
        cells = [name, _time(seconds["min"]), _time(seconds["median"])]
        cells += [f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})", str(peer["rounds"])]
        cells += [_size(peer["peak_bytes"]), f"{peer['peak_ratio']:.2f}", f"{100 * peer['others_part']:.0f}%"]
        lines.append(f"| {' | '.join(cells)} |")
    if "sgemm" in result:
        lines.append(
            "\nours {ours_gflops} GFLOP/s of sgemm's {sgemm_gflops}: {pct_sgemm}%, by rounds {median}%".format(
                **result["sgemm"], median=result["sgemm"]["pct_sgemm_of_rounds"]["median"]
            )
        )
    lines += ["\nnot run: {contestant}: {reason}".format(**entry) for entry in not_run]
    return "\n".join(lines)


def _target_table(targets: list[dict[str, Any]]) -> str:
    lines = ["\n### targets\n", "| | wanted | found | |", "|---|---:|---:|---|"]
    words = {True: "met", False: "**not met**", None: "not run"}
    lines += ["| {target} | {wanted} | {found} | {word} |".format(**t, word=words[t["met"]]) for t in targets]
    return "\n".join(lines)


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.4g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.4g} us"


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"


def _write(path: Path | None, content: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="the JSON file, written after every case")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch, OpenMP and MKL")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=25, help="most rounds per peer and case")
    parser.add_argument("--seconds", type=float, default=30.0, help=f"per peer and case; at least {_FEWEST} rounds")
    parser.add_argument("--pairs", type=int, default=1000, help="pairs of calls for the overhead")
    parser.add_argument(
        "--only", nargs="+", metavar="TEXT", help="only cases whose name has one of these, or 'overhead'"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
