"""Masks over the patches of global crops, as a pure function (iBOT, arXiv 2111.07832; DINOv2, arXiv 2304.07193).

The mask of a crop is a hash of (seed, step, place of its image in the global batch, view). The place of an image is a
function of the seed and the step, too. So there is no random state to save, and the same global batch gets the same
masks on any number of ranks.

The fractions of masked patches are not drawn crop by crop. Along the batch they follow a golden-ratio sequence with a
random start per step and view. So every run of consecutive images, and thereby every rank, has almost the same number
of masked patches: DINOv2 stratifies the crops of each rank for the same reason.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..pipelines.views.draw import uniforms

Shape = Literal["block", "rand"]
Booleans = NDArray[np.bool_]
Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

_ASPECT = math.log(0.3)  # the blocks are between 0.3 and 1 / 0.3 times as high as wide, as in BEiT
_ATTEMPTS = 10  # consecutive blocks that do not fit, after which a mask stays as it is
_BLOCKS = 64  # blocks that are tried per mask
_VIEW = 40  # bits of an image's place in the key of a crop
_GOLDEN = (math.sqrt(5) - 1) / 2
_FRACTIONS, _PATCHES = 0x726174696F, 0x6D61736B  # "ratio" and "mask" in ASCII: the views have other numbers


@dataclass(frozen=True)
class Masking:
    """The fractions of masked patches, and the shape of the masks.

    Each of ``ranges`` is (share of the crops, least fraction, largest fraction). The fractions are uniform in their
    range. A "block" mask is a union of rectangles of at least ``least`` patches, or (H // 3, squared) if None. Blocks
    that would exceed the fraction are not placed, so a mask may have fewer patches. "rand" masks single patches.
    """

    flag: str
    """The flag of the fractions, which messages name."""
    ranges: tuple[tuple[float, float, float], ...]
    shape: Shape = "block"
    least: int | None = None

    def fractions(self, u: Floats) -> Floats:
        """Return the fractions of masked patches for uniform numbers."""
        fractions, start = np.zeros_like(u), 0.0
        for share, low, high in self.ranges:
            if not share:
                continue
            inside = u >= start
            fractions[inside] = low + (high - low) * np.minimum((u[inside] - start) / share, 1)
            start += share
        return fractions

    def check(self, grids: Sequence[tuple[int, int]]) -> None:
        """Raise ValueError for masks that hide all or none of the patches of a crop."""
        largest = max(high for _, _, high in self.ranges)
        if min(low for _, low, _ in self.ranges) < 0 or largest >= 1:
            raise ValueError(
                f"--{self.flag}: must leave patches that are not masked, got up to {largest:g} of the patches. "
                "Use fractions from 0 to below 1."
            )
        for height, width in grids:
            if math.floor(largest * height * width) < 1:
                raise ValueError(
                    f"--{self.flag}: masks no patch, got {largest:g} of {height} x {width} patches. "
                    "Use a larger fraction or a smaller --patch_size."
                )


@dataclass(frozen=True)
class MaskedPatches:
    """The masks of the global crops of a batch, on the host. Crops are numbered view by view, then image by image.

    Without any masked patch there is one row of weight 0, so that all parameters have a gradient on every rank.
    """

    masks: tuple[Tensor, ...]
    """One mask [V_g * B, N_g] per group of views, True where a patch is hidden."""
    rows: Tensor
    """The numbers [M] of the masked patches among all patches of all crops."""
    weight: Tensor
    """1 / (masked patches of the row's crop) / (crops), [M]. Its sum is the fraction of the crops that have a mask."""
    count: int
    """The number of masked patches."""

    def to(self, device: torch.device) -> MaskedPatches:
        """Return the same on a device. The host does not wait."""
        if device.type != "cuda":
            return self

        def send(x: Tensor) -> Tensor:
            return x.pin_memory().to(device, non_blocking=True)

        return MaskedPatches(tuple(map(send, self.masks)), send(self.rows), send(self.weight), self.count)


def masked_patches(
    masking: Masking,
    groups: Sequence[tuple[int, tuple[int, int]]],
    *,
    seed: int,
    step: int,
    first: int,
    batch: int,
) -> MaskedPatches:
    """Draw the masks of ``batch`` images, of which the first is at place ``first`` of the global batch.

    ``groups`` has the number of views and the grid of patches (rows, columns) of each group of global views.
    """
    drawn, crops = [], 0
    for count, grid in groups:
        views = np.arange(crops // batch, crops // batch + count)
        masks = draw_masks(masking, grid, seed=seed, step=step, views=views, places=first + np.arange(batch))
        drawn.append(masks.reshape(count * batch, -1))
        crops += count * batch
    hidden = [masks.sum(1) for masks in drawn]
    weight = [np.repeat(1 / np.maximum(sums, 1) / crops, sums) for sums in hidden]
    rows = np.flatnonzero(np.concatenate([masks.reshape(-1) for masks in drawn]))
    count = len(rows)
    if not count:
        rows, weight = np.zeros(1, np.int64), [np.zeros(1)]
    # torch.tensor, and not from_numpy, also works on tensors without values.
    tensors = tuple(torch.tensor(masks) for masks in drawn)
    return MaskedPatches(tensors, torch.tensor(rows), torch.tensor(np.concatenate(weight)), count)


def no_masks(groups: Sequence[tuple[int, tuple[int, int]]], batch: int) -> MaskedPatches:
    """Return masks that hide nothing."""
    masks = tuple(torch.zeros(count * batch, rows * columns, dtype=torch.bool) for count, (rows, columns) in groups)
    return MaskedPatches(masks, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64), 0)


def draw_masks(
    masking: Masking, grid: tuple[int, int], *, seed: int, step: int, views: Integers, places: Integers
) -> Booleans:
    """Return the masks [V, B, H, W] of views of the images at ``places`` [B] of the global batch."""
    start = uniforms(seed ^ _FRACTIONS, step, views, 1)
    fractions = masking.fractions((start + _GOLDEN * places) % 1)
    patches = np.floor(fractions * math.prod(grid)).astype(np.int64).reshape(-1)
    masks = np.zeros((len(patches), *grid), np.bool_)
    masked = np.flatnonzero(patches)
    crops = (places + (views[:, None] << _VIEW)).reshape(-1)[masked]
    if masking.shape == "rand":
        order = uniforms(seed ^ _PATCHES, step, crops, math.prod(grid)).argsort(1).argsort(1)
        masks[masked] = (order < patches[masked, None]).reshape(-1, *grid)
    else:
        u = uniforms(seed ^ _PATCHES, step, crops, 4 * _BLOCKS).reshape(-1, _BLOCKS, 4)
        least = (min(grid) // 3) ** 2 if masking.least is None else masking.least
        masks[masked] = _blocks(patches[masked], u, grid, least)
    return masks.reshape(len(views), len(places), *grid)


def _blocks(patches: Integers, u: Floats, grid: tuple[int, int], least: int) -> Booleans:
    """Return unions [C, H, W] of random rectangles with up to ``patches`` [C] patches, from uniforms [C, _BLOCKS, 4].

    A block has between ``least`` and the missing number of patches. It is placed if it adds at least one patch and no
    more than are missing. All masks are drawn together, block after block, each from its own numbers.
    """
    height, width = grid
    masks, missing, failures = np.zeros((len(patches), *grid), np.bool_), patches.copy(), np.zeros_like(patches)
    y, x = np.arange(height), np.arange(width)
    for block in range(_BLOCKS):
        open_ = np.flatnonzero((missing > 0) & (failures < _ATTEMPTS))
        if not len(open_):
            break
        a, b, c, d = u[open_, block].T
        area = least + (missing[open_] - least) * a
        aspect = np.exp(_ASPECT * (1 - 2 * b))
        h, w = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
        top, left = np.floor(c * (height - h + 1)), np.floor(d * (width - w + 1))
        rows = (y >= top[:, None]) & (y < (top + h)[:, None])
        columns = (x >= left[:, None]) & (x < (left + w)[:, None])
        rectangles = rows[:, :, None] & columns[:, None]
        added = (rectangles & ~masks[open_]).sum((1, 2))
        placed = (h < height) & (w < width) & (added > 0) & (added <= missing[open_])
        masks[open_[placed]] |= rectangles[placed]
        missing[open_[placed]] -= added[placed]
        failures[open_] = np.where(placed, 0, failures[open_] + 1)
    return masks
