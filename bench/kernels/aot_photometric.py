"""Compile the photometric kernels for three GPUs, as bench/kernels/aot.py does for the other kernels.

    python -m bench.kernels.aot_photometric           # table, and bench/results/aot-photometric.json
    python -m bench.kernels.aot_photometric --check   # exit status 1 if a kernel spills; write nothing

Reports registers per thread and bytes spilled of every launch for A100, H100 and B200. The roofline is the time of
the bytes of a batch of 512 images with DINO's 2 x 224 + 8 x 96 views. It is arithmetic from the data sheet, not a
measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench import RESULTS
from bench.kernels.aot import CHIPS, Chip, resources
from fasttrain.pipelines.photometric.launch import BLOCK, WARPS
from fasttrain.pipelines.photometric.triton import LAB, RGB, YCBCR, finish_kernel, turn_kernel

BANDWIDTH = {"A100": 2.0e12, "H100": 3.35e12, "B200": 8.0e12}  # bytes/s
_VALUES = 512 * 3 * (2 * 224**2 + 8 * 96**2)
_ALL = {"C": 3, "COLOR": True, "BLUR": False, "DOWN": False, "FINISH": True, "SPACE": RGB, "BLOCK": BLOCK}
USES: dict[str, tuple[dict[str, object], str]] = {
    "all in one, no blur": (_ALL, "fp32"),
    "all in one, no blur, bf16": (_ALL, "bf16"),
    "down the columns": (_ALL | {"BLUR": True, "DOWN": True, "FINISH": False}, "u8"),
    "along the rows": (_ALL | {"COLOR": False, "BLUR": True}, "fp32"),
    "all in one, Lab": (_ALL | {"SPACE": LAB}, "fp32"),
    "all in one, YCbCr": (_ALL | {"SPACE": YCBCR}, "fp32"),
    "all in one, grey": (_ALL | {"C": 1}, "fp32"),
    "hue": ({"BLOCK": BLOCK}, "u8"),
}


def compile_use(name: str, chip: Chip) -> dict[str, Any]:
    """Compile one use for one chip, and return its resources."""
    constants, kind = USES[name]
    kernel = turn_kernel if name == "hue" else finish_kernel
    types = {"p_pixels": "*u8", "p_draws": "*fp32", "p_out": f"*{kind}", "height": "i32", "width": "i32"}
    names = list(kernel.arg_names)
    signature = {n: "constexpr" if n in constants else types.get(n, "fp32") for n in names}
    multiples = [i for i, n in enumerate(names) if n.startswith("p_") or n in ("height", "width")]
    divisible = {(i,): [["tt.divisibility", 16]] for i in multiples}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=divisible)
    compiled = triton.compile(source, target=GPUTarget("cuda", chip.capability, 32), options={"num_warps": WARPS})
    registers, spilled = resources(compiled.asm["cubin"])
    row = {"use": name, "chip": chip.name, "registers": registers, "spilled_bytes": spilled}
    return row | {"shared_bytes": compiled.metadata.shared}


def roofline_ms(chip: Chip, *, blurred: bool) -> float:
    """Return the milliseconds that the bytes of a batch take.

    Per value, hue reads and writes a byte, mean and finish read a byte each, and finish writes fp32. A blur adds two.
    """
    return 1e3 * _VALUES * (2 + 2 + 4 + 2 * blurred) / BANDWIDTH[chip.name]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only look for spills; write nothing")
    parser.add_argument("--output", type=Path, default=RESULTS / "aot-photometric.json")
    options = parser.parse_args()
    results = [compile_use(name, chip) for name in USES for chip in CHIPS]
    for r in results:
        print(
            "{use:26s} {chip}: {registers} registers, {spilled_bytes} bytes spilled, {shared_bytes} shared".format(**r)
        )
    rooflines = {c.name: {str(blurred): roofline_ms(c, blurred=blurred) for blurred in (False, True)} for c in CHIPS}
    if not options.check:
        report = {"triton": triton.__version__, "kernels": results, "roofline_ms_blurred": rooflines}
        options.output.write_text(json.dumps(report, indent=1) + "\n")
    return int(any(r["spilled_bytes"] for r in results))


if __name__ == "__main__":
    sys.exit(main())
