"""Count the kernel launches and torch operators of a loss, forward and backward. No GPU is needed.

    python bench/kernels/launches.py --json

The losses run on the Triton path, in bf16, with interpreted kernels. ``launches`` are the Triton kernels, and the torch
operators that write: on a GPU each of them starts a kernel. ``operators`` are all torch operators outside of the Triton
kernels, views and allocations included. There is one JSON line per loss.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("TRITON_INTERPRET", "1")
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[2])  # the folder kernels/ would hide a package

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

from fasttrain.losses import DINOLoss, InfoNCELoss, MoCoLoss, NTXentLoss, SwaVLoss

_ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count what runs inside this context."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches = self.operators = 0
        self._interpreting = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator and count it, unless the interpreter calls it."""
        out = func(*args, **kwargs or {})
        if not self._interpreting:
            self.operators += 1
            self.launches += _writes(func, args, out)
        return out

    def launch(self, kernel: GridExecutor, *args: Any, **kwargs: Any) -> None:
        """Interpret a Triton kernel and count it."""
        self.launches += 1
        self._interpreting = True
        _interpret(kernel, *args, **kwargs)
        self._interpreting = False


_interpret = GridExecutor.__call__


def _writes(func: Any, args: tuple[Any, ...], out: Any) -> bool:
    """Return whether an operator changes an argument, or returns new memory that it fills."""
    if func._schema.is_mutable:
        return True
    read = {x.untyped_storage()._cdata for x in tree_leaves(args) if isinstance(x, Tensor)}
    new = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.untyped_storage()._cdata not in read]
    return bool(new) and func._opname not in _ALLOCATIONS


def _rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()


def _cases() -> dict[str, Callable[[], Tensor]]:
    """Return each loss as a call without arguments, on the Triton path."""
    q, k = _rows(32, 64), _rows(32, 64).detach()
    views, teacher = _rows(4, 8, 64), _rows(2, 8, 64).detach()
    student_prototypes, teacher_prototypes = _rows(128, 64), _rows(128, 64).detach()
    both = student_prototypes, teacher_prototypes
    nt_xent, info_nce = NTXentLoss(backend="triton"), InfoNCELoss(backend="triton")
    moco = MoCoLoss(memory_bank_size=(256, 64), backend="triton")
    queue = moco.queue
    dino, swav = DINOLoss(128, backend="triton"), SwaVLoss(backend="triton")

    def dino_er() -> Tensor:
        loss, entropy = dino.terms(views, teacher, *both, teacher_temp=0.04)
        return loss - entropy

    return {
        "NT-Xent": lambda: nt_xent(q, k),
        "InfoNCE": lambda: info_nce(q, k),
        "MoCo": lambda: moco.contrast(q, k, queue),
        "DINO": lambda: dino.terms(views, teacher, *both, teacher_temp=0.04, entropy=False)[0],
        "DINO + ER": dino_er,
        "SwAV": lambda: swav(list(views[:2]), list(views[2:]), prototypes=student_prototypes).sum(),
    }


def count(loss: Callable[[], Tensor]) -> tuple[int, int]:
    """Return the launches and the operators of a loss and its gradient."""
    counter = Counter()
    with mock.patch.object(GridExecutor, "__call__", lambda *args, **kwargs: counter.launch(*args, **kwargs)), counter:
        loss().backward()
    return counter.launches, counter.operators


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON line per loss instead of a table")
    options = parser.parse_args()
    for name, loss in _cases().items():
        launches, operators = count(loss)
        if options.json:
            print(json.dumps({"loss": name, "launches": launches, "operators": operators}))
        else:
            print(f"{name:10} {launches:4} launches, {operators:4} operators")


if __name__ == "__main__":
    main()
