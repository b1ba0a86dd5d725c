"""Compile every kernel with every shipped tile for GPUs that are not here, and say what the compiler made of it.

    python bench/aot.py                       # table, and bench/results/aot.json
    python bench/aot.py --check               # exit status 1 if a bf16 kernel spills, or none fits the chip

For sm_80 (A100), sm_90a (H100, H200) and sm_100a (B200): registers a thread, bytes spilled, shared memory, programs a
multiprocessor holds, whether the tensor cores' asynchronous instructions are used (wgmma, tcgen05) and how many
exponentials a thread forms. Beside it, the roofline of the sizes that matter: the larger of the products' time and the
exponentials'. A roofline is arithmetic from the data sheet, never a measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fasttrain.kernels.similarity import triton as similarity
from fasttrain.kernels.similarity.tiles import Tile, backward_tile, forward_tile

ROOT = Path(__file__).parent.parent
DIMS = (64, 128, 256, 1024)
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Chip:
    """Dense bf16 FLOP/s, special-function results/s, and what a multiprocessor holds."""

    capability: int
    name: str
    flops: float
    exps: float
    shared: int  # bytes a block may have
    shared_total: int


CHIPS = (
    Chip(80, "A100", 312e12, 2.44e12, 163 << 10, 164 << 10),
    Chip(90, "H100", 989e12, 3.9e12, 227 << 10, 228 << 10),
    Chip(100, "B200", 2250e12, 4.4e12, 227 << 10, 228 << 10),
)


@dataclass(frozen=True)
class Case:
    """A kernel with the switches of one use, a type and a dimension."""

    use: str
    kernel: Any
    tile: Tile
    dtype: str
    dim: int
    constants: dict[str, object]


_OFF = {"EXCLUDE": False, "HAS_GAIN": False, "PRECISION": "tf32x3", "WIDEN": False}
_FORWARD = _OFF | {"BLOCKS": 1, "SYMMETRIC": False, "COLUMNS": False, "BOUNDED": True, "HAS_BIAS": False}
_BACKWARD = _OFF | {"ROWS": True, "COLS": False, "SUMS": False, "BOUNDED": True, "COL_BIAS": False, "ROW_BIAS": False}
USES = {
    "forward rows": _FORWARD,
    "forward rows, running maximum, bias": _FORWARD | {"BOUNDED": False, "HAS_BIAS": True},
    "forward symmetric": _FORWARD | {"SYMMETRIC": True, "COLUMNS": True, "EXCLUDE": True, "BLOCKS": 8},
    "forward both directions": _FORWARD | {"COLUMNS": True, "BLOCKS": 4},
    "backward rows": _BACKWARD,
    "backward symmetric": _BACKWARD | {"COLS": True, "EXCLUDE": True},
    "backward rows, running maximum, bias": _BACKWARD | {"BOUNDED": False, "ROW_BIAS": True, "SUMS": True},
}


def cases(types: tuple[str, ...] = tuple(TYPES), dims: tuple[int, ...] = DIMS) -> Iterator[Case]:
    """Every use with the tile that ships for it."""
    for dtype in types:
        for dim in dims:
            for use, switches in USES.items():
                forward = use.startswith("forward")
                columns = bool(switches.get("COLUMNS"))
                kind = TYPES[dtype]
                tile = forward_tile(dim, kind, columns=columns) if forward else backward_tile(dim, kind)
                constants = switches | {"D": dim, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
                constants |= {"BLOCK_D": tile.block_d} | ({} if forward else {"BLOCK_OUT": tile.block_out})
                kernel = similarity.lse_fwd_kernel if forward else similarity.lse_bwd_kernel
                yield Case(use, kernel, tile, dtype, dim, constants)


def compile_case(case: Case, chip: Chip) -> dict[str, Any]:
    """Compile one case for one chip, and read the resources from the assembler's own report."""
    names = list(case.kernel.arg_names)
    signature = {name: _kind(name, case) for name in names}
    absent = {name: None for name in names if name.startswith("p_") and signature[name] == "constexpr"}
    # Pointers and sizes are divisible by 16 in every real launch; without saying so loads would be scalar.
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if n.startswith("p_") or n in ("N", "M") or n.startswith("stride")
    }
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=case.constants | absent, attrs=divisible)
    options = {"num_warps": case.tile.warps, "num_stages": case.tile.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", chip.capability, 32), options=options)
    registers, spilled = _resources(compiled.asm["cubin"])
    assembly = compiled.asm["ptx"]
    threads = case.tile.warps * 32
    shared = compiled.metadata.shared
    programs = min(65536 // max(1, registers * threads), chip.shared_total // (shared + 1024), 2048 // threads)
    return {
        "use": case.use,
        "dtype": case.dtype,
        "dim": case.dim,
        "chip": chip.name,
        "tile": f"{case.tile.block_m}x{case.tile.block_n}x{case.tile.block_d}",
        "warps": case.tile.warps,
        "stages": case.tile.stages,
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


def _kind(name: str, case: Case) -> str:
    """The type of an argument; an absent pointer is a constant."""
    c = case.constants
    absent = {
        "p_bias": not (c.get("HAS_BIAS") or c.get("COL_BIAS") or c.get("ROW_BIAS")),
        "p_gain": not c["HAS_GAIN"],
        "p_row_lse": not c.get("ROWS"),
        "p_row_grad": not c.get("ROWS"),
        "p_col_lse": not c.get("COLS"),
        "p_col_grad": not c.get("COLS"),
    }
    if name in c or absent.get(name):
        return "constexpr"
    if name in ("p_x", "p_y"):
        return f"*{case.dtype}"
    if name.startswith("p_"):
        return "*fp32"
    return "fp32" if name == "scale" else "i32"


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of local memory, by the cuobjdump of the Triton wheel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = [int(v) for v in re.findall(r"(?:REG|STACK|LOCAL):(\d+)", report.stdout)]
    registers, stack, local = found[-3:]
    return registers, max(stack, local)


def rooflines() -> list[dict[str, Any]]:
    """Least milliseconds of each use at the sizes of a real run: the larger of products and exponentials."""
    rows = []
    for chip in CHIPS:
        for n in (4096, 32768, 65536):
            for dim in (128, 256):
                one = 2 * n * n * dim
                work = {
                    "forward rows": (1, 1),
                    "forward symmetric": (0.5, 0.5),
                    "backward symmetric": (2, 1),
                    "backward two passes": (4, 2),
                }
                times = {
                    use: 1e3 * max(products * one / chip.flops, exps * n * n / chip.exps)
                    for use, (products, exps) in work.items()
                }
                rows.append({"chip": chip.name, "rows": n, "dim": dim, "roofline_ms": times})
    return rows


def faults(results: list[dict[str, Any]]) -> list[str]:
    """What must not ship: a bf16 kernel that spills, any kernel beyond the chip's shared memory."""
    found = []
    for r in results:
        name = f"{r['use']}, {r['dtype']}, D = {r['dim']}, {r['chip']}"
        if r["dtype"] == "bf16" and r["spilled_bytes"]:
            found.append(f"{name}: {r['spilled_bytes']} bytes spilled")
        if not r["offsets_64_bit"]:
            found.append(f"{name}: rows are addressed in 32 bits")
        if r["shared_bytes"] > r["shared_limit"]:
            found.append(f"{name}: {r['shared_bytes']} bytes of shared memory, the chip has {r['shared_limit']}")
    return found


def table(results: list[dict[str, Any]]) -> str:
    lines = ["| use | type | D | tile | warps, stages | " + " | ".join(c.name for c in CHIPS) + " |"]
    lines.append("|---|---|---:|---|---|" + "---|" * len(CHIPS))
    for first in (r for r in results if r["chip"] == CHIPS[0].name):
        key = ("use", "dtype", "dim")
        same = [r for r in results if all(r[k] == first[k] for k in key)]
        cells = [
            f"{r['registers']} r, {r['spilled_bytes']} B, {r['shared_bytes'] >> 10} KB"
            + (" wgmma" if r["wgmma"] else "")
            + (" tcgen05" if r["tcgen05"] else "")
            for r in same
        ]
        head = [first["use"], first["dtype"], str(first["dim"]), first["tile"], f"{first['warps']}, {first['stages']}"]
        lines.append("| " + " | ".join(head + cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only look for faults; writes nothing")
    parser.add_argument("--types", nargs="+", choices=list(TYPES), default=list(TYPES))
    parser.add_argument("--dims", nargs="+", type=int, default=list(DIMS))
    parser.add_argument("--uses", nargs="+", choices=list(USES), default=list(USES))
    parser.add_argument("--output", type=Path, default=ROOT / "bench/results/aot.json")
    options = parser.parse_args()
    chosen = [c for c in cases(tuple(options.types), tuple(options.dims)) if c.use in options.uses]
    jobs = [(case, chip) for case in chosen for chip in CHIPS]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        results = list(pool.map(lambda job: compile_case(*job), jobs))
    print(table(results))
    wrong = faults(results)
    print("\n".join(wrong) or f"{len(results)} kernels: no bf16 spill, all within shared memory")
    if not options.check:
        report = {"triton": triton.__version__, "kernels": results, "rooflines": rooflines()}
        options.output.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
