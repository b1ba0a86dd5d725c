import math

import pytest
import torch
from torch.nn.functional import normalize

from fasttrain.kernels import gaussian_entropy, log_sphere_area, log_vmf_normalizer, vmf_entropy, vmf_reconstruction


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def uniform(count, dim, seed=0):
    return normalize(draw(count, dim, seed=seed), dim=1)


@pytest.mark.parametrize(
    ("count", "options", "expected"),
    [
        # Uniform points saturate below the maximum, like the curves of the paper. Leave-one-out reaches it.
        (256, {}, -131.136),
        (4096, {}, -128.589),
        (512, {"leave_one_out": True}, log_sphere_area(128)),
    ],
)
def test_entropy_of_uniform_points_is_known(count, options, expected):
    assert vmf_entropy(uniform(count, 128), **options).item() == pytest.approx(expected, abs=0.02)


def test_entropy_is_at_most_log_n_above_equal_points():
    floor = -log_vmf_normalizer(512, 10) - 10
    assert vmf_entropy(uniform(1, 512).expand(64, -1)).item() == pytest.approx(floor, abs=1e-9)
    assert floor < vmf_entropy(uniform(32, 512)).item() <= floor + math.log(32)


def test_normalizer_is_an_additive_constant():
    z, constant = uniform(9, 7), -log_vmf_normalizer(7, 10)
    for function in (vmf_entropy, lambda z, **options: vmf_reconstruction(z, z.roll(1, 0), backend="eager", **options)):
        assert (function(z) - function(z, normalizer="none")).item() == pytest.approx(constant)
    assert vmf_reconstruction(z, z).item() == pytest.approx(constant - 10)  # a perfect match


def test_reference_normalizer_gives_the_papers_figure():
    """Its README: 1000 random unit vectors in 1000 dimensions, kappa 10. The true entropy is -2035.15."""
    z = uniform(1000, 1000)
    assert vmf_entropy(z, estimator="expectation", normalizer="reference").item() == pytest.approx(-249.308, abs=2e-3)
    assert vmf_entropy(z, estimator="expectation").item() == pytest.approx(-2035.147, abs=2e-3)


@pytest.mark.parametrize("estimator", ["average", "expectation"])
@pytest.mark.parametrize("leave_one_out", [False, True])
def test_gradients_pass_gradcheck(estimator, leave_one_out):
    options = {"kappa": 4.0, "estimator": estimator, "leave_one_out": leave_one_out}
    assert torch.autograd.gradcheck(lambda z: vmf_entropy(z, **options), (uniform(6, 3).requires_grad_(),))


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize(
    ("function", "options"),
    [
        *((vmf_entropy, o) for o in ({}, {"leave_one_out": True}, {"estimator": "expectation"}, {"kappa": 60.0})),
        (gaussian_entropy, {"bandwidth": 0.5}),
    ],
)
def test_backends_agree(backend, function, options):
    z = uniform(40, 16)
    value, expected = function(z.float(), backend=backend, **options), function(z, backend="eager", **options)
    torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("bandwidth", [0.05, 0.5, 5.0])
@pytest.mark.parametrize("leave_one_out", [False, True])
def test_gaussian_entropy_equals_its_definition(bandwidth, leave_one_out):
    """With the matrix of distances."""
    z, options = 3 * draw(30, 4) + 100, {"bandwidth": bandwidth, "leave_one_out": leave_one_out}
    kernel = -torch.cdist(z, z).square() / (2 * bandwidth**2)
    if leave_one_out:
        kernel = kernel.masked_fill(torch.eye(30, dtype=torch.bool), -torch.inf)
    log_p = kernel.logsumexp(1) - math.log(30 - leave_one_out)
    expected = -(log_p - 2 * math.log(2 * math.pi * bandwidth**2)).mean()
    torch.testing.assert_close(gaussian_entropy(z, **options), expected)
    leaf = z[:6].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: gaussian_entropy(z, **options), (leaf,))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: vmf_entropy(torch.ones(3, 1)), r"^z .*D >= 2, got \(3, 1\)"),
        (lambda: vmf_entropy(torch.ones(0, 4)), r"^z .*\(0, 4\)"),
        (lambda: vmf_entropy(torch.ones(3, 4), kappa=0), "^kappa .*got 0"),
        (lambda: vmf_entropy(torch.ones(3, 4), kappa=math.inf), "^kappa .*got inf"),
        (lambda: vmf_entropy(torch.ones(3, 4), normalizer="wrong"), "^normalizer .*'wrong'"),
        (lambda: vmf_entropy(torch.ones(3, 4), estimator="joe"), "^estimator .*'joe'"),
        (lambda: vmf_entropy(torch.ones(1, 4), leave_one_out=True), r"^leave_one_out .*\(1, 4\)"),
        (lambda: vmf_reconstruction(torch.ones(3, 4), torch.ones(3, 5)), r"^z0 and z1 .*\(3, 4\) and \(3, 5\)"),
        (lambda: gaussian_entropy(torch.ones(3, 4), bandwidth=-1.0), "^bandwidth .*got -1"),
    ],
)
def test_invalid_argument_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_entropies_of_views_are_those_of_each():
    views = torch.stack([uniform(9, 7, seed=1), uniform(9, 7, seed=2)])
    for estimator in ("average", "expectation"):
        each = [vmf_entropy(z, estimator=estimator) for z in views]
        assert torch.equal(vmf_entropy(views, estimator=estimator), torch.stack(each))
