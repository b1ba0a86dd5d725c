"""The depth of every parameter in a network, for learning rates that fall from the output to the input."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from timm.models import group_parameters
from torch import nn

_AFTER_BLOCKS = ("norm", "fc_norm", "head")


def depths(network: nn.Module) -> dict[str, int]:
    """Return how many layers are between each parameter and the output, by the parameter's name.

    timm's networks name their layers (``group_matcher``). A ViT of L blocks has the norm after the last block at 0, its
    last block at 1, its first block at L, and its patch embedding, positions and tokens at L + 1. Parameters around
    such a network, for example a mask token, belong to its first layer. Raise ValueError for a network that does not
    name its layers.
    """
    depth_of: dict[str, int] = {}
    for prefix, part in _with_layers(network):
        of_part: Any = part
        numbers = group_parameters(part, of_part.group_matcher(coarse=False), reverse=True)
        # timm counts the last norm to the last block, and some tokens, for example registers, to a layer after it.
        blocks = {name: n for name, n in numbers.items() if "." in name and name.split(".")[0] not in _AFTER_BLOCKS}
        above = max(blocks.values()) + 1
        depth_of |= {prefix + name: above - blocks.get(name, above if "." in name else 0) for name in numbers}
    if not depth_of:
        raise ValueError(
            f"--layer_decay: {type(network).__name__} does not name its layers. Use a network of timm, or give it "
            "timm's group_matcher."
        )
    deepest = max(depth_of.values())
    return {name: depth_of.get(name, deepest) for name, _ in network.named_parameters()}


def _with_layers(network: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the outermost modules that name their layers, with the prefix of their parameters' names."""
    if callable(getattr(network, "group_matcher", None)):
        yield prefix, network
        return
    for name, child in network.named_children():
        yield from _with_layers(child, f"{prefix}{name}.")
