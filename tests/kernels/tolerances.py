"""How far a fast path may be from the fp64 reference on the same (rounded) inputs: the one table of the project.

The figure is the root mean square of the difference by that of the reference, or by ``least`` if that is larger (1 for
a log-sum-exp: the log of a sum near 1 is small, its error is not). Rounding a score of size ``scale`` moves
its exponential by ``scale`` units, so from scale 20 up the tolerance grows with it.

Tensor cores do not round what they add to an fp32 sum of half-precision products, they cut it off, every few products.
The error has one sign and grows with their number: on an H100 2.3e-9 a feature in fp16, 9e-6 of a score at 2,048.
"""

import torch

_CUT_OFF = 2.0**-27  # of a sum, a product: one cut to 24 bits for every 8
RMS_RATIO = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}


def assert_close(got, reference, dtype, scale, name="", least=1e-30, products=0):
    """Compare with the fp64 reference; infinities and NaNs must stand in the same places.

    ``products`` is how many a tensor core has added to a number.
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
    allowed = RMS_RATIO[dtype] * max(1.0, abs(scale) / 20) + products * _CUT_OFF
    assert error <= allowed * size, f"{name}: RMS ratio {error / size:.1e}, allowed {allowed:.1e}"
