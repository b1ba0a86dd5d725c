"""Checks of the photometric kernel, for the tests, which interpret it, and for bench/gpu."""

import torch

from fasttrain.pipelines.photometric import reference
from fasttrain.pipelines.photometric.launch import finish
from tests.pipelines.photometric import cases

USES = ("everything", "colours", "blur", "neither", "grey", "bands", "lab", "ycbcr")


def by_kernel(pixels, draws, look, dtype, device):
    """Return the views of the kernel, which writes to memory full of NaN."""
    pixels = torch.from_numpy(pixels).to(device)
    out = torch.full(pixels.shape, torch.nan, dtype=dtype, device=device)
    finish(pixels, draws, look, out=out)
    return out.cpu()


def inputs(use, count, size):
    """Return pixels, draws and look of a use."""
    channels, space = {"grey": 1, "bands": 5}.get(use, 3), use if use in ("lab", "ycbcr") else "rgb"
    colored, blurred = use not in ("blur", "neither"), use not in ("colours", "neither")
    draws = cases.draws(count, channels, colored=colored, blurred=blurred)
    return cases.pixels(count, size, channels), draws, cases.look(space, channels)


def check(use, count, size, dtype, device):
    """Raise AssertionError if the kernel differs from the reference.

    A few values may differ by one level of 8 bits: fp32 sums may round to the other side of a half.
    """
    pixels, draws, look = inputs(use, count, size)
    expected = reference.finish(torch.from_numpy(pixels), draws, look)
    difference = (by_kernel(pixels, draws, look, dtype, device) - expected).abs()
    allowed = max(1e-3, torch.finfo(dtype).eps) * (1 + expected.abs())
    others = (difference > allowed).double().mean().item()
    assert others < 2e-3, f"{others:.2%} of the values are another level"
    assert difference.max() < 16, f"a value is off by {difference.max().item():.1f}"  # Lab is steep for dark colours
