import math

import pytest
import torch
from torch.nn.functional import normalize

from fasttrain.kernels import log_sphere_area, log_vmf_normalizer, vmf_entropy, vmf_reconstruction


def _uniform(count, dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(count, dim, dtype=torch.float64, generator=generator), dim=1)


@pytest.mark.parametrize(("count", "expected"), [(256, -131.136), (512, -130.459), (4096, -128.589)])
def test_uniform_points_saturate_below_the_ceiling_as_the_paper_s_curves_do(count, expected):
    assert vmf_entropy(_uniform(count, 128)).item() == pytest.approx(expected, abs=0.02)


def test_leave_one_out_reaches_the_ceiling_on_uniform_points():
    assert vmf_entropy(_uniform(512, 128), leave_one_out=True).item() == pytest.approx(log_sphere_area(128), abs=0.02)


def test_equal_points_have_the_kernel_s_own_level():
    z = _uniform(1, 128).expand(64, -1)
    assert vmf_entropy(z).item() == pytest.approx(-log_vmf_normalizer(128, 10) - 10, abs=1e-9)


def test_plug_in_never_exceeds_average():
    centres = _uniform(10, 16, seed=1)
    labels = torch.randint(0, 10, (300,), generator=torch.Generator().manual_seed(2)).clamp_min(5)
    z = normalize(centres[labels] + 0.1 * _uniform(300, 16, seed=3), dim=1)
    assert vmf_entropy(z, estimator="expectation") < vmf_entropy(z, estimator="average") - 0.1


def test_gradient_is_the_formula_of_the_paper():
    z = _uniform(12, 5).requires_grad_()
    vmf_entropy(z, kappa=3.0).backward()
    p = (3.0 * z.detach() @ z.detach().T).softmax(1)
    torch.testing.assert_close(z.grad, -(3.0 / 12) * (p + p.T) @ z.detach())


def test_the_normaliser_has_no_gradient_and_is_the_only_difference():
    z = _uniform(9, 7)
    constant = -log_vmf_normalizer(7, 10)
    assert (vmf_entropy(z) - vmf_entropy(z, normalizer="none")).item() == pytest.approx(constant)
    rec = [vmf_reconstruction(z, z.roll(1, 0), normalizer=n) for n in ("exact", "none")]
    assert (rec[0] - rec[1]).item() == pytest.approx(constant)


def test_reconstruction_of_a_perfect_match_is_the_density_at_its_mode():
    z = _uniform(4, 6)
    assert vmf_reconstruction(z, z, kappa=4.0).item() == pytest.approx(-log_vmf_normalizer(6, 4.0) - 4.0)


def test_unknown_estimator_is_named():
    with pytest.raises(ValueError, match="'joe'"):
        vmf_entropy(_uniform(3, 3), estimator="joe")  # type: ignore[arg-type]


def test_entropy_does_not_exceed_log_of_the_batch_above_its_floor():
    z = _uniform(32, 512)
    floor = -log_vmf_normalizer(512, 10) - 10
    assert floor < vmf_entropy(z).item() <= floor + math.log(32)
