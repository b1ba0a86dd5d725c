"""Tolerances of all fast paths against the fp64 reference for the same rounded inputs.

The figure is RMS(difference) / RMS(reference), or RMS(difference) / ``least`` if that is smaller. ``least`` is 1 for a
log-sum-exp: the log of a sum near 1 is small, but its error is not. Rounding a score of size ``scale`` changes its
exponential by ``scale`` units. So above scale 20 the tolerance grows with it.

Tensor cores add half-precision products to an fp32 sum without rounding: they truncate it every few products. The error
has one sign and grows with their number. On an H100 it is 2.3e-9 per feature in fp16, and 9e-6 of a score at 2,048.
"""

import torch

_TRUNCATION = 2.0**-27  # of a sum, per product: one truncation to 24 bits per 8 products
RMS_RATIO = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}


def assert_close(got, reference, dtype, scale, name="", least=1e-30, products=0):
    """Compare with the fp64 reference. Infinities and NaNs must be in the same places.

    ``products`` is the number of products per value on a tensor core.
    """
    got, reference = got.double(), reference.double()
    assert got.shape == reference.shape, f"{name}: {tuple(got.shape)} instead of {tuple(reference.shape)}"
    finite = reference.isfinite()
    assert torch.equal(got.isnan(), reference.isnan()), f"{name}: NaN in other places"
    assert torch.equal(got[~finite].nan_to_num(), reference[~finite].nan_to_num()), f"{name}: other infinities"
    if not finite.any():
        return
    error = (got - reference)[finite].square().mean().sqrt()
    size = reference[finite].square().mean().sqrt().clamp_min(least)
    allowed = RMS_RATIO[dtype] * max(1.0, abs(scale) / 20) + products * _TRUNCATION
    assert error <= allowed * size, f"{name}: RMS ratio {error / size:.1e}, allowed {allowed:.1e}"
