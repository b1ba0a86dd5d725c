"""Private names of DeepSpeed for modules that lie below the engine. ``engine/zero.py`` has all the others.

ZeRO-3 leaves a parameter empty between its uses. It keeps the parameter's shape and this rank's shard as attributes of
the parameter. Importing this module imports neither DeepSpeed nor torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Size, Tensor


def full_numel(parameter: Any) -> int:
    """Return the number of elements of the whole parameter, at every ZeRO stage."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def full_shape(parameter: Any) -> Size:
    """Return the shape of the whole parameter, at every ZeRO stage."""
    shape: Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def local_shard(parameter: Any) -> Tensor | None:
    """Return this rank's flat shard of a parameter at ZeRO-3, whose end may be padding. Other stages have none."""
    shard: Tensor | None = getattr(parameter, "ds_tensor", None)
    return shard


def disable_shared_memory_reduction() -> None:
    """Make DeepSpeed reduce through gloo on a CPU.

    At the first start DeepSpeed would compile a shared-memory all-reduce. This takes 15 to 50 s and needs a C++
    compiler, which a user's machine need not have. gloo does the same work.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
