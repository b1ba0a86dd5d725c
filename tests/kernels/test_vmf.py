import math

import pytest

from fasttrain.kernels import log_sphere_area, log_vmf_normalizer, reference_log_vmf_normalizer

# -log C_d(kappa) for kappa 0.1, 1, 10, 100, 1000, from mpmath with 60 digits.
# fmt: off
EXACT = {
    2: (1.8403755056432217, 2.0737914249165241, 9.780849149528041, 98.617609756351929, 997.46518595627881),
    3: (2.5326903584328713, 2.6924636085404864, 9.5352919713541462, 97.232706880421254, 994.93012178742721),
    16: (1.3261374008646112, 1.3570208776502836, 4.0572990472682166, 79.000422404390203, 961.95152630531813),
    128: (-127.05341746187171, -127.04955039172601, -126.66399611506202, -95.061468821697639, 676.07802280030577),
    512: (-867.96809339476945, -867.96712659974965, -867.87046545501202, -858.37926545329057, -327.70918733994772),
    65536: (-270412.22047927646, -270412.22047172336, -270412.21971641331, -270412.14418549625, -270404.59197269723),
}
# fmt: on


@pytest.mark.parametrize("dim", EXACT)
def test_normalizer_equals_high_precision_values(dim):
    for kappa, expected in zip((0.1, 1, 10, 100, 1000), EXACT[dim], strict=True):
        assert -log_vmf_normalizer(dim, kappa) == pytest.approx(expected, rel=1e-12)


def test_weak_concentration_tends_to_uniform():
    assert -log_vmf_normalizer(32, 1e-6) == pytest.approx(log_sphere_area(32), rel=1e-12)
    assert log_sphere_area(2) == pytest.approx(math.log(2 * math.pi))
    assert log_sphere_area(3) == pytest.approx(math.log(4 * math.pi))


@pytest.mark.parametrize(("dim", "kappa"), [(1, 10.0), (8, 0.0), (8, -1.0), (8, math.inf), (8, math.nan)])
@pytest.mark.parametrize("function", [log_vmf_normalizer, reference_log_vmf_normalizer])
def test_invalid_dimension_or_kappa_is_named(function, dim, kappa):
    with pytest.raises(ValueError, match="^dim" if dim < 2 else "^kappa"):
        function(dim, kappa)


@pytest.mark.parametrize(
    ("dim", "kappa", "expected"),
    [(3, 10, 9.535292), (128, 1, 101.506037), (128, 50, -117.906859), (65536, 10, -15241.368126)],
)
def test_reference_normalizer_equals_the_papers_code(dim, kappa, expected):
    """-log C as in apple/ml-entropy-reconstruction, with log(I + 1e-7)."""
    assert -reference_log_vmf_normalizer(dim, kappa) == pytest.approx(expected, abs=2e-6)
