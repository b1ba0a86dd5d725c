import math

import pytest
from scipy.special import ive

from fasttrain.kernels import log_sphere_area, log_vmf_normalizer

# -log C_d(10) to the digits that 50-digit arithmetic gives.
_EXACT = {
    (3, 10): 9.5352919714,
    (64, 10): -39.9954458219,
    (128, 1): -127.0495503917,
    (128, 10): -126.6639961151,
    (128, 50): -117.9068586853,
    (256, 10): -344.1397107151,
    (768, 10): -1458.6560524544,
    (2048, 10): -4898.3594488824,
    (65536, 10): -270412.2197164,
}


@pytest.mark.parametrize(("case", "expected"), _EXACT.items())
def test_matches_high_precision_values(case, expected):
    assert -log_vmf_normalizer(*case) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("kappa", [0.1, 1.0, 10.0, 100.0, 700.0, 1000.0])
def test_matches_scipy_where_the_bessel_function_does_not_underflow(kappa):
    for dim in (2, 3, 4):
        nu = dim / 2 - 1
        expected = nu * math.log(kappa) - dim / 2 * math.log(2 * math.pi) - math.log(ive(nu, kappa)) - kappa
        assert log_vmf_normalizer(dim, kappa) == pytest.approx(expected, rel=1e-10)


def test_weak_concentration_tends_to_the_uniform_law():
    assert -log_vmf_normalizer(32, 1e-6) == pytest.approx(log_sphere_area(32), rel=1e-12)
    assert log_sphere_area(2) == pytest.approx(math.log(2 * math.pi))
    assert log_sphere_area(3) == pytest.approx(math.log(4 * math.pi))


@pytest.mark.parametrize(("dim", "kappa"), [(1, 10.0), (8, 0.0), (8, -1.0), (8, math.inf), (8, math.nan)])
def test_refuses_what_has_no_density(dim, kappa):
    with pytest.raises(ValueError, match=r"dim|kappa"):
        log_vmf_normalizer(dim, kappa)
