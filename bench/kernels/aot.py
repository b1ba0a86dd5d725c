"""Compile every kernel with every shipped tile for six GPUs, and report the resources. No GPU is needed.

    python -m bench.kernels.aot                       # table, and bench/results/aot.json
    python -m bench.kernels.aot --check               # exit status 1 if a bf16 kernel spills or exceeds the chip

For sm_80 (A100), sm_90a (H100, H200), sm_100a (B200), and sm_86, sm_89 and sm_120 (RTX 30, 40, 50): registers per
thread, bytes spilled, shared memory, programs per multiprocessor, use of the tensor cores' asynchronous instructions
(wgmma, tcgen05), and exponentials per thread.
The report also has rooflines of the important sizes: the larger of the time of the products and the time of the
exponentials. A roofline is arithmetic from the data sheet, not a measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench import RESULTS
from fasttrain.kernels.prototypes import triton as prototypes
from fasttrain.kernels.similarity import triton as similarity
from fasttrain.kernels.similarity.tiles import Tile, attention_tile, backward_tile, forward_tile, prototype_tile

DIMS = (64, 128, 256, 1024)
# Triton 3.7 spills two registers of two kernels for the B200; Triton 3.8 spills none.
_MAY_SPILL = 0 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8) else 8  # bytes
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Chip:
    """Data sheet of a GPU: dense bf16 FLOP/s, special-function results/s, and shared memory per multiprocessor."""

    capability: int
    name: str
    flops: float
    exps: float
    shared: int  # bytes per block
    shared_total: int


CHIPS = (
    Chip(80, "A100", 312e12, 2.44e12, 163 << 10, 164 << 10),
    Chip(90, "H100", 989e12, 3.9e12, 227 << 10, 228 << 10),
    Chip(100, "B200", 2250e12, 4.4e12, 227 << 10, 228 << 10),
)
SMALL_CHIPS = (
    Chip(86, "RTX 3090", 71e12, 2.2e12, 99 << 10, 100 << 10),
    Chip(89, "RTX 4090", 165e12, 5.2e12, 99 << 10, 100 << 10),
    Chip(120, "RTX 5090", 210e12, 6.5e12, 99 << 10, 100 << 10),
)
"""Chips with little shared memory: the kernels must fit them, and no roofline is reported."""


@dataclass(frozen=True)
class Use:
    """A kernel with the compile-time constants of one use, and the pointers that this use does not pass."""

    kernel: Any
    constants: dict[str, object]
    absent: tuple[str, ...]

    tile: Callable[[int, torch.dtype, int], Tile]
    """The shipped tile for D, a type and a compute capability."""

    def but(self, *passed: str, tile: Callable[[int, torch.dtype, int], Tile] | None = None, **changed: object) -> Use:
        """Return a copy with changed constants, which passes some of the absent pointers."""
        absent = tuple(name for name in self.absent if name not in passed)
        return Use(self.kernel, self.constants | changed, absent, tile or self.tile)

    def without(self, *absent: str) -> Use:
        """Return a copy that does not pass these pointers."""
        return Use(self.kernel, self.constants, (*self.absent, *absent), self.tile)


@dataclass(frozen=True)
class Case:
    """A use with a type and a dimension."""

    name: str
    use: Use
    dtype: str
    dim: int

    def tile(self, chip: Chip) -> Tile:
        return self.use.tile(self.dim, TYPES[self.dtype], chip.capability)

    def constants(self, chip: Chip) -> dict[str, object]:
        tile = self.tile(chip)
        blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_D": tile.block_d}
        blocks |= {"BLOCK_OUT": tile.block_out, "D": self.dim}
        known = self.use.kernel.arg_names
        return self.use.constants | {name: value for name, value in blocks.items() if name in known}


_DOTS = {"PRECISION": "tf32x3", "WIDEN": False}
_LSE = _DOTS | {"EXCLUDE": False, "BOUNDED": True}
_FORWARD = Use(similarity.row_lse_kernel, _LSE, ("p_bias", "p_gain"), forward_tile)
_BOTH = Use(
    similarity.both_lse_kernel,
    _DOTS | {"SYMMETRIC": False, "EXCLUDE": False},
    ("p_gain",),
    partial(forward_tile, columns=True),
)
_SUM = Use(
    similarity.weighted_sum_kernel,
    _LSE | {"ADD": False},
    (
        *("p_values", "p_gain", "p_row_bias", "p_col_bias", "p_part_bias", "p_row_lse", "p_row_grad", "p_col_lse"),
        *("p_col_grad", "p_other", "p_energy", "p_positive", "p_sums"),
    ),
    backward_tile,
)
_ROWS, _COLS = ("p_row_lse", "p_row_grad"), ("p_col_lse", "p_col_grad")
_STUDENT = _SUM.but(*_ROWS, BOUNDED=False, tile=prototype_tile)
_OF_PROTOTYPES = _SUM.but(*_COLS, BOUNDED=False, tile=prototype_tile)
USES = {
    "forward rows": _FORWARD,
    "forward rows, running maximum, bias": _FORWARD.but("p_bias", BOUNDED=False),
    "forward symmetric": _BOTH.but(SYMMETRIC=True, EXCLUDE=True),
    "forward both directions": _BOTH,
    "backward rows": _SUM.but(*_ROWS, "p_positive"),
    "backward symmetric": _SUM.but(*_ROWS, *_COLS, "p_positive", EXCLUDE=True),
    "backward rows, running maximum, bias": _SUM.but(*_ROWS, "p_row_bias", "p_sums", BOUNDED=False),
    "teacher's attention": Use(prototypes.attend_kernel, _DOTS | {"HAS_BIAS": True}, (), attention_tile),
    "student's gradient": _STUDENT,
    "student's gradient, with entropy": _STUDENT.but("p_other"),
    "prototypes' gradient": _OF_PROTOTYPES,
    "prototypes' gradient, with entropy": _OF_PROTOTYPES.but("p_other"),
    "prototypes' gradient, teacher's part": _OF_PROTOTYPES.but(
        "p_values", "p_part_bias", tile=attention_tile, ADD=True
    ),
    "prototypes' marginal": _OF_PROTOTYPES.but("p_sums").without("p_out"),
}


def cases(types: tuple[str, ...] = tuple(TYPES), dims: tuple[int, ...] = DIMS) -> Iterator[Case]:
    """Yield every use with every type and dimension."""
    for dtype in types:
        for dim in dims:
            for name, use in USES.items():
                yield Case(name, use, dtype, dim)


def compile_case(case: Case, chip: Chip) -> dict[str, Any]:
    """Compile one case for one chip, and read the resources from the assembler's report."""
    kernel, constants, tile = case.use.kernel, case.constants(chip), case.tile(chip)
    names = list(kernel.arg_names)
    signature = {name: _kind(name, case, constants) for name in names}
    absent = {name: None for name in names if name.startswith("p_") and signature[name] == "constexpr"}
    # Pointers and sizes are divisible by 16 in every real launch. Without this attribute loads would be scalar.
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if n.startswith("p_") or n in ("N", "M", "K", "T") or n.startswith("stride")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants | absent, attrs=divisible)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", chip.capability, 32), options=options)
    registers, spilled = resources(compiled.asm["cubin"])
    assembly = compiled.asm["ptx"]
    threads = tile.warps * 32
    shared = compiled.metadata.shared
    programs = min(65536 // max(1, registers * threads), chip.shared_total // (shared + 1024), 2048 // threads)
    return {
        "use": case.name,
        "dtype": case.dtype,
        "dim": case.dim,
        "chip": chip.name,
        "tile": f"{tile.block_m}x{tile.block_n}x{tile.block_d}",
        "warps": tile.warps,
        "stages": tile.stages,
        "registers": registers,
        "spilled_bytes": spilled,
        "shared_bytes": shared,
        "shared_limit": chip.shared,
        "programs_per_multiprocessor": programs,
        "wgmma": "wgmma.mma_async" in assembly,
        "tcgen05": "tcgen05.mma" in assembly,
        "offsets_64_bit": bool(re.search(r"arith\.muli.*i64", compiled.asm["ttir"])),
        "exponentials": len(re.findall(r"ex2\.approx", assembly)),
    }


_INPUTS = ("p_x", "p_y", "p_q", "p_keys", "p_values")


def _kind(name: str, case: Case, constants: dict[str, object]) -> str:
    """Return the type of an argument. An absent pointer is a constant."""
    if name in constants or name in case.use.absent:
        return "constexpr"
    if name in _INPUTS:
        return f"*{case.dtype}"
    if name.startswith("p_"):
        return "*fp32"
    return "fp32" if name in ("scale", "out_scale") else "i32"


def resources(cubin: bytes) -> tuple[int, int]:
    """Return registers per thread and bytes of local memory, from the cuobjdump of the Triton wheel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    values = [int(v) for v in re.findall(r"(?:REG|STACK|LOCAL):(\d+)", report.stdout)]
    registers, stack, local = values[-3:]
    return registers, max(stack, local)


_FP32_FACTOR = 6  # three tf32 passes at half the rate of bf16
# Products and exponentials per score.
_WORK = {
    "forward rows": (1, 1),
    "forward symmetric": (0.5, 0.5),
    "backward symmetric": (2, 1),
    "backward two passes": (4, 2),
}
# Products and exponentials per score, for student and teacher. The student needs a log-sum-exp, then two gradients that
# recompute the scores. The teacher needs attention, then one gradient.
_PROTOTYPE_WORK = {"forward": ((1, 1), (2, 1)), "backward": ((4, 2), (2, 1))}
# Rows of student and teacher, and number of prototypes, at 256 features: DINO's class tokens of 64 images in 2 + 8
# views, and iBOT's masked patches.
_PROTOTYPES = {
    "class tokens": (640, 128, 65536),
    "patches": (8192, 8192, 65536),
    "patches, large": (8192, 8192, 262144),
}


def roofline_seconds(chip: Chip, scores: float, dim: int, dtype: str, *, products: float, exps: float) -> float:
    """Return the larger of the time of the products and of the exponentials, both given per score."""
    rate = chip.flops / (_FP32_FACTOR if dtype == "fp32" else 1)
    return max(products * 2 * scores * dim / rate, exps * scores / chip.exps)


def rooflines() -> list[dict[str, Any]]:
    """Return the roofline of each use in milliseconds, at the sizes of a real run."""
    rows: list[dict[str, Any]] = []
    for chip in CHIPS:
        for n in (4096, 32768, 65536):
            for dim in (128, 256):
                times = {
                    use: 1e3 * roofline_seconds(chip, n * n, dim, "bf16", products=products, exps=exps)
                    for use, (products, exps) in _WORK.items()
                }
                rows.append({"chip": chip.name, "rows": n, "dim": dim, "roofline_ms": times})
    return rows


def prototype_seconds(
    chip: Chip,
    student: int,
    teacher: int,
    count: int,
    dim: int,
    dtype: str,
    passes: tuple[str, ...] = ("forward", "backward"),
) -> float:
    """Return the roofline in seconds of ``passes`` over student and teacher rows with ``count`` prototypes."""
    seconds = 0.0
    for side, rows in enumerate((student, teacher)):
        products, exps = (sum(_PROTOTYPE_WORK[name][side][what] for name in passes) for what in range(2))
        seconds += roofline_seconds(chip, rows * count, dim, dtype, products=products, exps=exps)
    return seconds


def prototype_rooflines() -> list[dict[str, Any]]:
    """Return rooflines of a forward and backward pass with prototypes, and the bytes of bf16 logits."""
    rows = []
    for chip in CHIPS:
        for name, (student, teacher, count) in _PROTOTYPES.items():
            seconds = prototype_seconds(chip, student, teacher, count, 256, "bf16")
            logits = (student + teacher) * count * 2
            rows.append({"chip": chip.name, "rows": name, "prototypes": count, "roofline_ms": 1e3 * seconds})
            rows[-1]["logits_bytes"] = logits
    return rows


def faults(results: list[dict[str, Any]]) -> list[str]:
    """Return a line for each kernel that must not ship.

    Faults are spills in bf16, rows addressed in 32 bits, and more shared memory than the chip has.
    """
    lines = []
    for r in results:
        name = f"{r['use']}, {r['dtype']}, D = {r['dim']}, {r['chip']}"
        if r["dtype"] == "bf16" and r["spilled_bytes"] > _MAY_SPILL:
            lines.append(f"{name}: {r['spilled_bytes']} bytes spilled")
        if not r["offsets_64_bit"]:
            lines.append(f"{name}: rows are addressed in 32 bits")
        if r["shared_bytes"] > r["shared_limit"]:
            lines.append(f"{name}: {r['shared_bytes']} bytes of shared memory, the chip has {r['shared_limit']}")
    return lines


def table(results: list[dict[str, Any]]) -> str:
    lines = ["| use | type | D | " + " | ".join(c.name for c in (*CHIPS, *SMALL_CHIPS)) + " |"]
    lines.append("|---|---|---:|" + "---|" * len((*CHIPS, *SMALL_CHIPS)))
    for first in (r for r in results if r["chip"] == CHIPS[0].name):
        key = ("use", "dtype", "dim")
        same = [r for r in results if all(r[k] == first[k] for k in key)]
        cells = [
            f"{r['tile']}, {r['warps']} w, {r['stages']} s: "
            f"{r['registers']} r, {r['spilled_bytes']} B, {r['shared_bytes'] >> 10} KB"
            + (" wgmma" if r["wgmma"] else "")
            + (" tcgen05" if r["tcgen05"] else "")
            for r in same
        ]
        head = [first["use"], first["dtype"], str(first["dim"])]
        lines.append("| " + " | ".join(head + cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only look for faults; write nothing")
    parser.add_argument("--types", nargs="+", choices=list(TYPES), default=list(TYPES))
    parser.add_argument("--dims", nargs="+", type=int, default=list(DIMS))
    parser.add_argument("--uses", nargs="+", choices=list(USES), default=list(USES))
    parser.add_argument("--output", type=Path, default=RESULTS / "aot.json")
    options = parser.parse_args()
    selected = [c for c in cases(tuple(options.types), tuple(options.dims)) if c.name in options.uses]
    jobs = [(case, chip) for case in selected for chip in (*CHIPS, *SMALL_CHIPS)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        results = list(pool.map(lambda job: compile_case(*job), jobs))
    print(table(results))
    lines = faults(results)
    print("\n".join(lines) or f"{len(results)} kernels: no bf16 spill, all within shared memory")
    if not options.check:
        report = {"triton": triton.__version__, "kernels": results, "rooflines": rooflines()}
        report["prototype_rooflines"] = prototype_rooflines()
        options.output.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
