"""Is the photometric kernel right? For the tests, which interpret it, and for bench/gpu."""

import torch

from fasttrain.pipelines.photometric import reference
from fasttrain.pipelines.photometric.launch import finish
from tests.pipelines.photometric import cases

USES = ("everything", "colours", "blur", "neither", "grey", "lab", "ycbcr")


def by_kernel(pixels, draws, look, dtype, device):
    """Views from the kernel, into memory that holds NaN."""
    given = torch.from_numpy(pixels).to(device)
    out = torch.full(given.shape, torch.nan, dtype=dtype, device=device)
    finish(given, draws, look, out=out)
    return out.cpu()


def inputs(use, count, size):
    """Pixels, draws and look of a use."""
    channels, space = 1 if use == "grey" else 3, use if use in ("lab", "ycbcr") else "rgb"
    colored, blurred = use not in ("blur", "neither"), use not in ("colours", "neither")
    draws = cases.draws(count, channels, colored=colored, blurred=blurred)
    return cases.pixels(count, size, channels), draws, cases.look(space, channels)


def check(use, count, size, dtype, device):
    """Raise AssertionError where the kernel is not the definition.

    A sum that fp32 rounds to the other side of a half is another level of 8 bits, which few may be.
    """
    pixels, draws, look = inputs(use, count, size)
    ours, expected = (
        by_kernel(pixels, draws, look, dtype, device),
        reference.finish(torch.from_numpy(pixels), draws, look),
    )
    apart = (ours - expected).abs()
    allowed = max(1e-3, torch.finfo(dtype).eps) * (1 + expected.abs())
    others = (apart > allowed).double().mean().item()
    assert others < 2e-3, f"{others:.2%} of the values are another level"
    assert apart.max() < 16, f"a value is off by {apart.max().item():.1f}"  # Lab is steep in the dark
