import math

import pytest
import torch
from torch.nn.functional import normalize

from fasttrain.kernels import prototype_cross_entropy, prototype_entropy, sinkhorn, sinkhorn_center


def _unit(*shape, seed):
    return normalize(torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=-1)


def _dino_loop(student, teacher, ws, wt, center, student_temp, teacher_temp):
    """DINO's loss as its official code writes it: a double loop over views with equal views skipped."""
    total, terms = 0.0, 0
    for t in range(len(teacher)):
        target = ((teacher[t] @ wt.T - center) / teacher_temp).softmax(-1).detach()
        for s in range(len(student)):
            if s == t:
                continue
            total = total + (-target * (student[s] @ ws.T / student_temp).log_softmax(-1)).sum(-1).mean()
            terms += 1
    return total / terms


@pytest.mark.parametrize(("views", "teachers"), [(2, 2), (6, 2), (3, 1)])
def test_equals_dino_s_loop_in_value_and_gradient(views, teachers):
    student, teacher = _unit(views, 4, 5, seed=0).requires_grad_(), _unit(teachers, 4, 5, seed=1)
    ws, wt = _unit(7, 5, seed=2).requires_grad_(), _unit(7, 5, seed=3)
    center = 0.1 * _unit(7, seed=4)
    ours = prototype_cross_entropy(student, teacher, ws, wt, student_temp=0.1, teacher_temp=0.04, center=center)
    theirs = _dino_loop(student, teacher, ws, wt, center, 0.1, 0.04)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, (student, ws)), torch.autograd.grad(theirs, (student, ws)), strict=True):
        torch.testing.assert_close(a, b)


def test_the_teacher_gets_no_gradient():
    student, teacher = _unit(2, 4, 5, seed=0).requires_grad_(), _unit(2, 4, 5, seed=1).requires_grad_()
    w = _unit(7, 5, seed=2)
    prototype_cross_entropy(student, teacher, w, w, student_temp=0.1, teacher_temp=0.04).backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_sinkhorn_codes_are_a_softmax_with_the_potential_as_centre():
    """SwAV's loss with explicit codes equals the prototype cross-entropy with the column potential as centre."""
    z, w = _unit(4, 16, 5, seed=0).float(), _unit(7, 5, seed=1).float()
    explicit = []
    for i in range(2):
        codes = sinkhorn(z[i] @ w.T, epsilon=0.05)
        explicit += [-(codes * (z[v] @ w.T / 0.1).log_softmax(-1)).sum(-1).mean() for v in range(4) if v != i]
    center = torch.stack([sinkhorn_center(z[i] @ w.T, epsilon=0.05) for i in range(2)])
    ours = prototype_cross_entropy(z, z[:2], w, w, student_temp=0.1, teacher_temp=0.05, center=center)
    torch.testing.assert_close(ours, torch.stack(explicit).mean(), rtol=1e-5, atol=1e-5)


def test_no_pair_of_different_views_is_refused():
    z, w = _unit(1, 4, 5, seed=0), _unit(7, 5, seed=1)
    with pytest.raises(ValueError, match="no two different views"):
        prototype_cross_entropy(z, z, w, w, student_temp=0.1, teacher_temp=0.04)


def test_uniform_rows_have_entropy_log_k_and_equal_one_hot_rows_none():
    marginal, conditional = prototype_entropy(torch.zeros(6, 5), _unit(64, 5, seed=0).float(), temp=0.1)
    assert marginal.item() == pytest.approx(math.log(64), rel=1e-6)
    assert conditional.item() == pytest.approx(math.log(64), rel=1e-6)
    one_hot = torch.eye(3)[:1].expand(6, 3)
    marginal, conditional = prototype_entropy(one_hot, torch.eye(3), temp=1e-3)
    assert 0 <= marginal.item() < 1e-6
    assert 0 <= conditional.item() < 1e-6


def test_distinct_one_hot_rows_have_full_marginal_and_no_conditional_entropy():
    marginal, conditional = prototype_entropy(torch.eye(8), torch.eye(8), temp=1e-3)
    assert marginal.item() == pytest.approx(math.log(8), rel=1e-6)
    assert conditional.item() == pytest.approx(0, abs=1e-6)


def test_entropy_gradients_pass_gradcheck():
    features, prototypes = _unit(5, 3, seed=0).requires_grad_(), _unit(4, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda f, p: prototype_entropy(f, p, temp=0.2), (features, prototypes))


def test_entropy_and_gradient_stay_finite_when_a_prototype_is_never_chosen():
    features = torch.eye(4)[:2].requires_grad_()
    marginal, _ = prototype_entropy(features, torch.eye(4) * 1000, temp=0.1)
    marginal.backward()
    assert marginal.isfinite()
    assert features.grad.isfinite().all()
