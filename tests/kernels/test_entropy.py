import math

import pytest
import torch
from torch.nn.functional import normalize

from fasttrain.kernels import gaussian_entropy, log_sphere_area, log_vmf_normalizer, vmf_entropy, vmf_reconstruction


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
    rec = [vmf_reconstruction(z, z.roll(1, 0), normalizer=n, backend="eager") for n in ("exact", "none")]
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


def test_the_reference_normaliser_reproduces_the_figure_of_the_paper_s_code():
    # Its README: 1000 random unit vectors in 1000 dimensions, kappa 10; the true entropy is -2035.15.
    z = _uniform(1000, 1000)
    assert vmf_entropy(z, estimator="expectation", normalizer="reference").item() == pytest.approx(-249.308, abs=2e-3)
    assert vmf_entropy(z, estimator="expectation").item() == pytest.approx(-2035.147, abs=2e-3)


@pytest.mark.parametrize("estimator", ["average", "expectation"])
@pytest.mark.parametrize("leave_one_out", [False, True])
def test_gradients_pass_gradcheck(estimator, leave_one_out):
    z = _uniform(6, 3).requires_grad_()
    options = {"kappa": 4.0, "estimator": estimator, "leave_one_out": leave_one_out}
    assert torch.autograd.gradcheck(lambda z: vmf_entropy(z, **options), (z,))


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_every_backend_agrees(backend):
    z = _uniform(40, 16)
    for options in ({}, {"leave_one_out": True}, {"estimator": "expectation"}, {"kappa": 60.0}):
        expected = vmf_entropy(z, backend="eager", **options)
        got = vmf_entropy(z.float(), backend=backend, **options)
        torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=2e-6)
    expected = gaussian_entropy(z, bandwidth=0.5, backend="eager")
    got = gaussian_entropy(z.float(), bandwidth=0.5, backend=backend)
    torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=2e-6)


def _gaussian_by_distances(z, bandwidth, leave_one_out):
    """The definition with the matrix of distances."""
    kernel = -torch.cdist(z, z).square() / (2 * bandwidth**2)
    if leave_one_out:
        kernel = kernel.masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    log_p = kernel.logsumexp(1) - math.log(len(z) - leave_one_out)
    return -(log_p - z.shape[1] / 2 * math.log(2 * math.pi * bandwidth**2)).mean()


@pytest.mark.parametrize("bandwidth", [0.05, 0.5, 5.0])
@pytest.mark.parametrize("leave_one_out", [False, True])
def test_gaussian_entropy_is_its_definition(bandwidth, leave_one_out):
    z = 3 * torch.randn(30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 100
    options = {"bandwidth": bandwidth, "leave_one_out": leave_one_out}
    torch.testing.assert_close(gaussian_entropy(z, **options), _gaussian_by_distances(z, **options))
    leaf = z[:6].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: gaussian_entropy(z, **options), (leaf,))


def test_gaussian_entropy_nears_that_of_the_normal_law():
    z = torch.randn(4000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = math.log(2 * math.pi * math.e)  # of a unit normal in the plane
    assert gaussian_entropy(z, bandwidth=0.25, leave_one_out=True).item() == pytest.approx(expected, abs=0.08)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: vmf_entropy(torch.ones(3, 1)), r"z must be \[N, D\] with N >= 1 and D >= 2, got \(3, 1\)"),
        (lambda: vmf_entropy(torch.ones(0, 4)), r"got \(0, 4\)"),
        (lambda: vmf_entropy(torch.ones(3, 4), kappa=0), "kappa must be positive and finite, got 0"),
        (lambda: vmf_entropy(torch.ones(3, 4), kappa=math.inf), "kappa must be positive and finite, got inf"),
        (
            lambda: vmf_entropy(torch.ones(3, 4), normalizer="wrong"),
            "normalizer must be 'exact', 'reference' or 'none'",
        ),
        (lambda: vmf_entropy(torch.ones(1, 4), leave_one_out=True), r"at least 2 rows, got z of shape \(1, 4\)"),
        (lambda: vmf_reconstruction(torch.ones(3, 4), torch.ones(3, 5)), r"same shape, got \(3, 4\) and \(3, 5\)"),
        (lambda: gaussian_entropy(torch.ones(3, 4), bandwidth=-1.0), "bandwidth must be positive and finite, got -1"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
