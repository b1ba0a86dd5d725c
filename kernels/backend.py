"""The choice of the backend of a reduction: by device, argument, or environment variable FASTTRAIN_BACKEND."""

from __future__ import annotations

import os
from typing import Literal, get_args

from torch import Tensor

Backend = Literal["auto", "triton", "cpu", "eager"]
_NAMES = get_args(Backend)
_HALF_AND_SINGLE = ("torch.float16", "torch.bfloat16", "torch.float32")


def interpreting() -> bool:
    """Return whether Triton interprets its kernels. They then run on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def choose_backend(backend: Backend, x: Tensor) -> Backend:
    """Resolve ``auto`` for the tensor x: FASTTRAIN_BACKEND if it is set, else Triton on GPUs and CPU tiles elsewhere.

    "cpu" is the tiles in plain torch, which run on any device. fp64 has no Triton kernel and uses them too. Raises
    ValueError for an unknown name, and for "triton" if the device or the type does not support it.
    """
    if backend == "auto":
        backend = os.environ.get("FASTTRAIN_BACKEND", "auto")  # type: ignore[assignment]
    if backend not in _NAMES:
        raise ValueError(f"backend must be one of {', '.join(_NAMES)}, got {backend!r} (argument or FASTTRAIN_BACKEND)")
    if backend == "auto":
        return "triton" if x.is_cuda and str(x.dtype) in _HALF_AND_SINGLE else "cpu"
    if backend == "triton" and not x.is_cuda and not interpreting():
        raise ValueError(f"backend 'triton' needs CUDA tensors, got {x.device}; set TRITON_INTERPRET=1 to interpret it")
    if backend == "triton" and str(x.dtype) not in _HALF_AND_SINGLE:
        raise ValueError(f"backend 'triton' takes float16, bfloat16 or float32, got {x.dtype}; use backend='cpu'")
    return backend
