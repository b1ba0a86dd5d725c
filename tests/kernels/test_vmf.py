import math

import pytest
from scipy.special import ive

from fasttrain.kernels import log_sphere_area, log_vmf_normalizer, reference_log_vmf_normalizer

# -log C_d(kappa) by mpmath, in 60 digits.
_EXACT = {
    (2, 0.1): 1.8403755056432217,
    (2, 1): 2.0737914249165241,
    (2, 10): 9.780849149528041,
    (2, 100): 98.617609756351929,
    (2, 1000): 997.46518595627881,
    (3, 0.1): 2.5326903584328713,
    (3, 1): 2.6924636085404864,
    (3, 10): 9.5352919713541462,
    (3, 100): 97.232706880421254,
    (3, 1000): 994.93012178742721,
    (5, 0.1): 3.2712888818956965,
    (5, 1): 3.3689013133786363,
    (5, 10): 8.9652234336919611,
    (5, 100): 94.455363424989007,
    (5, 1000): 989.85924307452083,
    (16, 0.1): 1.3261374008646112,
    (16, 1): 1.3570208776502836,
    (16, 10): 4.0572990472682166,
    (16, 100): 79.000422404390203,
    (16, 1000): 961.95152630531813,
    (64, 0.1): -40.767641900667037,
    (64, 1): -40.759908450066448,
    (64, 10): -39.995445821914284,
    (64, 100): 8.040765439175064,
    (64, 1000): 839.8182594404815,
    (128, 0.1): -127.05341746187171,
    (128, 1): -127.04955039172601,
    (128, 10): -126.66399611506202,
    (128, 100): -95.061468821697639,
    (128, 1000): 676.07802280030577,
    (512, 0.1): -867.96809339476945,
    (512, 1): -867.96712659974965,
    (512, 10): -867.87046545501202,
    (512, 100): -858.37926545329057,
    (512, 1000): -327.70918733994772,
    (2048, 0.1): -4898.3838602126987,
    (2048, 1): -4898.383618513509,
    (2048, 10): -4898.3594488823501,
    (2048, 100): -4895.9453547638455,
    (2048, 1000): -4676.8173060001303,
    (65536, 0.1): -270412.22047927646,
    (65536, 1): -270412.22047172336,
    (65536, 10): -270412.21971641331,
    (65536, 100): -270412.14418549625,
    (65536, 1000): -270404.59197269723,
}


@pytest.mark.parametrize(("case", "expected"), _EXACT.items())
def test_matches_high_precision_values(case, expected):
    assert -log_vmf_normalizer(*case) == pytest.approx(expected, rel=1e-12)


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


@pytest.mark.parametrize(
    ("dim", "kappa", "expected"),
    [
        (3, 10, 9.535292),
        (64, 10, -28.686155),
        (128, 1, 101.506037),
        (128, 10, -43.556824),
        (128, 50, -117.906859),
        (2048, 10, -489.676530),
        (65536, 10, -15241.368126),
    ],
)
def test_the_reference_normaliser_is_that_of_the_paper_s_code(dim, kappa, expected):
    # -log C as apple/ml-entropy-reconstruction forms it, with log(I + 1e-7).
    assert -reference_log_vmf_normalizer(dim, kappa) == pytest.approx(expected, abs=2e-6)
