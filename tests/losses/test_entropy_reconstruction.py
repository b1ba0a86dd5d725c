import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain.kernels import log_sphere_area
from fasttrain.losses import EntropyReconstructionLoss
from tests.losses.pairs import draw, golden_pair, gradients, unit


def _written_sphere(a, b, kappa, estimator="average", leave_one_out=False):
    """The bound without its constant, written out."""
    entropies = []
    for z in (unit(a), unit(b)):
        scores = kappa * z @ z.T
        if leave_one_out:
            scores = scores.masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
        log_p = scores.logsumexp(1) - math.log(len(z) - leave_one_out)
        weights = log_p.softmax(0) if estimator == "expectation" else torch.full_like(log_p, 1 / len(z))
        entropies.append(-(weights * log_p).sum())
    return -kappa * (unit(a) * unit(b)).sum(1).mean() - sum(entropies) / 2


@pytest.mark.parametrize(
    ("estimator", "expected"), [("expectation", -3.867800083879633), ("average", -3.867779384969108)]
)
def test_the_sphere_s_terms_equal_the_paper_s_code(estimator, expected):
    loss = EntropyReconstructionLoss(estimator=estimator)
    a, b = golden_pair()
    assert loss.terms(a, a, normalizer="reference").entropy.item() == pytest.approx(expected, rel=1e-12)
    reconstruction = loss.terms(a, b, normalizer="reference").reconstruction.item()
    assert reconstruction == pytest.approx(4.229977705184899, rel=1e-12)


def test_exact_normalizer_differs_by_83_nats_at_dimension_128():
    terms = [
        EntropyReconstructionLoss().terms(draw(8, 128), draw(8, 128), normalizer=n) for n in ("reference", "exact")
    ]
    assert (terms[0].entropy - terms[1].entropy).item() == pytest.approx(83.107, abs=1e-3)
    assert terms[0].information.item() == pytest.approx(terms[1].information.item(), abs=1e-10)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("estimator", ["average", "expectation"])
def test_loss_and_gradients_are_the_written_out_bound_s(estimator, leave_one_out, backend):
    loss = EntropyReconstructionLoss(4.0, "sphere", estimator, leave_one_out, backend=backend)
    inputs = [draw(12, 6, seed=1) * 2, draw(12, 6, seed=2)]
    actual = gradients(loss, *inputs)
    expected = gradients(lambda a, b: _written_sphere(a, b, 4.0, estimator, leave_one_out), *inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def test_the_terms_carry_the_loss_and_its_gradient():
    for loss in (EntropyReconstructionLoss(), EntropyReconstructionLoss(support="discrete")):
        actual = gradients(lambda a, b, loss=loss: -loss.terms(a, b).information, *golden_pair())
        torch.testing.assert_close(actual, gradients(loss, *golden_pair()), rtol=1e-10, atol=1e-12)


def test_fp32_terms_do_not_lose_the_bound_in_the_constant():
    a, b = draw(16, 2048), draw(16, 2048, seed=1)
    loss = EntropyReconstructionLoss()
    terms = loss.terms(a.float(), b.float())
    assert terms.entropy.item() < -4800
    assert terms.information.item() == pytest.approx(-loss(a, b).item(), abs=1e-5)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 9), st.integers(2, 6), st.floats(0.1, 30), st.floats(1e-3, 1e3), st.integers(0, 999))
def test_entropy_is_bounded_and_ignores_norms(batch, dim, kappa, scale, seed):
    a, b = draw(batch, dim, seed=seed), draw(batch, dim, seed=seed + 1)
    loss = EntropyReconstructionLoss(kappa)
    torch.testing.assert_close(loss(scale * a, b), loss(a, b), rtol=1e-9, atol=1e-9)
    terms = loss.terms(a, b)
    floor = loss.terms(a[:1], a[:1]).entropy  # a single point has the kernel's own level
    assert floor - 1e-9 <= terms.entropy <= floor + math.log(batch) + 1e-9
    assert terms.entropy_max == log_sphere_area(dim)


# Classes


def _written_discrete(a, b, eps):
    p, q = a.softmax(1), b.softmax(1)
    entropies = [-(m * (m + eps).log()).sum() for m in (p.mean(0), q.mean(0))]
    crossed = -(p * (q + eps).log() + q * (p + eps).log()).sum(1).mean() / 2
    return sum(entropies) / 2, crossed


def test_discrete_terms_equal_the_code_of_the_paper():
    a, b = (4 * unit(x) for x in golden_pair())
    loss = EntropyReconstructionLoss(support="discrete")
    golden = (2.6788301740141156, 3.2185642897582096)
    assert _written_discrete(a, a, 1e-7)[0].item() == pytest.approx(golden[0], rel=1e-12)
    assert _written_discrete(a, b, 1e-7)[1].item() == pytest.approx(golden[1], rel=1e-12)
    assert loss.terms(a, a).entropy.item() == pytest.approx(golden[0], abs=2e-6)
    assert loss.terms(a, b).reconstruction.item() == pytest.approx(golden[1], abs=1e-5)


def test_the_classes_loss_and_gradients_are_the_written_out_ones():
    def written(a, b):
        entropy, crossed = _written_discrete(a, b, 0.0)
        return crossed - entropy

    loss = EntropyReconstructionLoss(support="discrete")
    torch.testing.assert_close(gradients(loss, *golden_pair()), gradients(written, *golden_pair()))


def test_the_entropy_of_classes_goes_from_nothing_to_log_k():
    loss = EntropyReconstructionLoss(support="discrete")
    equal = torch.zeros(6, 5)
    terms = loss.terms(equal, equal)
    assert terms.entropy_max == math.log(5)
    assert terms.entropy.item() == pytest.approx(math.log(5), rel=1e-6)
    one = torch.zeros(6, 5).index_fill(1, torch.tensor([2]), 1e4)
    assert loss.terms(one, one).entropy.item() == 0
    spread = 1e4 * torch.eye(5)
    assert loss.terms(spread, spread).information.item() == pytest.approx(math.log(5), rel=1e-6)


def test_classes_that_underflow_give_no_nan():
    for dtype in (torch.float16, torch.float32):
        a, b = (1e4 * x.to(dtype) for x in golden_pair())
        actual = gradients(EntropyReconstructionLoss(support="discrete"), a, b)
        assert all(value.isfinite().all() for value in actual)
        assert actual[0].dtype == torch.float32
