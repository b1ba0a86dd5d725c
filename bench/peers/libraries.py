"""Helpers of the contestants: a compiled formula, and libraries with their own reductions."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from . import Case, Loss, NotRun


def compiled(make: Callable[[Case], Loss]) -> Callable[[Case], Loss]:
    """Compile a formula with torch.compile for the shapes of each case."""

    def make_compiled(case: Case) -> Loss:
        torch._dynamo.reset()  # beyond its recompilation limit torch silently runs the eager formula
        return torch.compile(make(case), fullgraph=True, dynamic=False)

    return make_compiled


def keops_logsumexp(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    """Return KeOps' row log-sum-exp. KeOps compiles C++ at the first use of a dimension."""
    os.environ.setdefault("KEOPS_VERBOSE", "0")
    from pykeops.torch import LazyTensor

    def logsumexp(x: Tensor, y: Tensor) -> Tensor:
        scores = LazyTensor(case.scale * x[:, None, :]) | LazyTensor(y[None, :, :])
        return scores.logsumexp(dim=1).squeeze(-1)

    return logsumexp


def inf_cl(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    from inf_cl import cal_flash_loss

    if case.device == "cpu":
        raise NotRun("its Triton kernels take CUDA tensors only, and this run is on the CPU")
    return lambda q, k: cal_flash_loss(q, k, scale=case.scale, head_dim=min(256, case.dim)).mean()


def available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return 1024 * int(line.split()[1])
    raise NotRun("the available memory is unknown")
