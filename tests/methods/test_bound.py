"""The entropy-reconstruction objective against the formulas, written out in fp64."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from fasttrain.kernels import log_sphere_area, log_vmf_normalizer
from fasttrain.methods import Step, bound
from tests.methods.small import STEP, build


def _rows(*shape, seed=0, dtype=torch.float64):
    return normalize(torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)), dim=-1)


def _lse(z, kappa=10.0, *, others=False):
    scores = kappa * z @ z.T
    if others:
        scores = scores[~torch.eye(len(z), dtype=torch.bool)].view(len(z), -1)
    return scores.logsumexp(1).mean()


def test_sphere_loss_omits_the_constant_and_bound_includes_it():
    z = _rows(3, 8, 128)
    pairs = [(0, 1), (0, 2), (1, 2)]
    objective = build("simclr", True).sphere_objective(z, [(z[a], z[b]) for a, b in pairs], STEP)
    constant = -log_vmf_normalizer(128, 10.0)
    entropy = sum(constant + math.log(8) - _lse(v) for v in z) / 3
    reconstruction = sum(constant - 10 * (z[a] * z[b]).sum(1).mean() for a, b in pairs) / 3
    assert objective.loss.item() == pytest.approx((reconstruction - entropy).item(), abs=1e-6)
    assert objective.bound.entropy.item() == pytest.approx(entropy.item(), rel=1e-6)
    assert objective.bound.reconstruction.item() == pytest.approx(reconstruction.item(), rel=1e-6)
    unbiased = sum(constant + math.log(7) - _lse(v, others=True) for v in z) / 3
    assert objective.bound.deficit.item() == pytest.approx(log_sphere_area(128) - unbiased.item(), abs=1e-5)


def test_leave_one_out_removes_each_row_from_its_own_density():
    z = _rows(2, 8, 16)
    method = build("simclr", True, kappa=4.0, entropy_leave_one_out=True)
    objective = method.sphere_objective(z, [(z[0], z[1])], STEP)
    entropy = sum(math.log(7) - _lse(v, 4.0, others=True) for v in z) / 2
    assert objective.loss.item() == pytest.approx((-4 * (z[0] * z[1]).sum(1).mean() - entropy).item(), abs=1e-6)
    assert objective.bound.entropy.item() == pytest.approx(objective.bound.unbiased_entropy.item(), abs=1e-6)


def test_support_queue_gets_no_gradient():
    z, queue = (_rows(n, 6, seed=n, dtype=torch.float32).requires_grad_() for n in (5, 12))
    objective = build("simclr", True).sphere_objective([z], [(z, z.detach())], STEP, support=queue)
    written = -10 * (z * z.detach()).sum(1).mean() - (math.log(12) - (10 * z @ queue.detach().T).logsumexp(1).mean())
    torch.testing.assert_close(objective.loss, written)
    (gradient,) = torch.autograd.grad(objective.loss, z, retain_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(written, z)[0], rtol=1e-4, atol=1e-5)
    assert torch.autograd.grad(objective.loss, queue, allow_unused=True) == (None,)


def test_prototype_entropy_is_the_students_and_has_a_gradient():
    z, w = _rows(2, 8, 4, dtype=torch.float32).requires_grad_(), _rows(32, 4, seed=1, dtype=torch.float32)
    method = build("dino", True, no_centering=True)
    terms = method.loss.terms(z, z.detach(), w, w, teacher_temp=0.04)
    objective = method.prototype_objective(*terms, z, STEP)
    p = (z.flatten(0, 1) @ w.T / 0.1).softmax(-1).mean(0)
    torch.testing.assert_close(objective.bound.entropy, -(p * p.log()).sum().detach())
    assert objective.bound.entropy_max == math.log(32)
    objective.loss.backward()
    assert z.grad.abs().sum() > 0


def test_prototypes_without_entropy_give_the_reconstruction():
    method = build("dino", False)
    objective = method.prototype_objective(torch.ones(()), None, torch.zeros(1, 1), Step(0, 1, 1, measure=False))
    assert (objective.loss, objective.bound, dict(objective.logs)) == (1, None, {})


def test_bf16_factors_change_the_loss_by_their_rounding_only(monkeypatch):
    monkeypatch.setattr(bound, "_in_bf16", lambda device: True)
    method = build("dino", True, no_centering=True)
    student, teacher, prototypes = (_rows(*s, dtype=torch.float32) for s in ((2, 8, 16), (2, 8, 16), (30, 16)))
    student.requires_grad_()

    def loss(*factors):
        reconstruction, entropy = method.loss.terms(*bound.in_product_dtype(*factors), teacher_temp=0.04)
        return reconstruction - entropy

    lowered = loss(student, teacher, prototypes, prototypes)
    rounded = [x.detach().bfloat16().double() for x in (student, teacher, prototypes, prototypes)]
    assert lowered.dtype == torch.float32
    torch.testing.assert_close(lowered.double(), loss(*rounded).double(), rtol=1e-5, atol=1e-5)
    assert torch.autograd.grad(lowered, student)[0].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cpu_factors_stay_fp32_under_autocast(dtype):
    rows = (_rows(2, 8, 16, dtype=torch.float32),)
    with torch.autocast("cpu", dtype):
        assert bound.in_product_dtype(*rows) == rows


def test_only_bf16_on_a_gpu_lowers_the_factors(monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)
    for dtype, lowered in ((torch.bfloat16, True), (torch.float16, False)):
        monkeypatch.setattr(torch, "get_autocast_dtype", lambda device, dtype=dtype: dtype)
        assert bound._in_bf16("cuda") is lowered
        assert not bound._in_bf16("cpu")
