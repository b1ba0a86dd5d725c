"""The search as a torch operator, which has no gradient: ``torch.compile`` sees one node."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from . import cpu

torch.library.define("fasttrain::nearest", "(Tensor x, Tensor? y, int? excluded, str backend) -> Tensor")
nearest = torch.ops.fasttrain.nearest.default


def _nearest(x: Tensor, y: Tensor | None, excluded: int | None, backend: str) -> Tensor:
    run = import_module(f"{__package__}.launch") if backend == "triton" else cpu
    places: Tensor = run.nearest(x, y, excluded)
    return places


torch.library.impl("fasttrain::nearest", ("cpu", "cuda"), _nearest)
torch.library.register_fake(
    "fasttrain::nearest", lambda x, y, excluded, backend: x.new_empty(x.shape[0], dtype=torch.int64)
)
