import math

import pytest
import torch
from torch.nn.functional import normalize

from fasttrain.kernels import log_sphere_area, log_vmf_normalizer
from fasttrain.methods import bound


def test_sphere_loss_is_constant_free_and_equals_the_written_out_bound():
    z = normalize(torch.randn(3, 8, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=-1)
    pairs = [(0, 1), (0, 2), (1, 2)]
    objective = bound.sphere(z, [(z[a], z[b]) for a, b in pairs], bound.SphereSettings(), group=None, measure=True)
    constant = -log_vmf_normalizer(128, 10.0)
    entropy = sum(constant + math.log(8) - (10 * v @ v.T).logsumexp(1).mean() for v in z) / 3
    rec = sum(constant - 10 * (z[a] * z[b]).sum(1).mean() for a, b in pairs) / 3
    assert objective.loss.item() == pytest.approx((rec - entropy).item(), abs=1e-6)
    assert objective.bound.entropy.item() == pytest.approx(entropy.item(), rel=1e-6)
    assert objective.bound.reconstruction.item() == pytest.approx(rec.item(), rel=1e-6)
    others = ~torch.eye(8, dtype=torch.bool)
    free = sum(constant + math.log(7) - (10 * v @ v.T)[others].view(8, 7).logsumexp(1).mean() for v in z) / 3
    assert objective.bound.deficit.item() == pytest.approx(log_sphere_area(128) - free.item(), abs=1e-5)


def test_the_loss_can_leave_out_a_row_s_kernel_on_itself():
    z = normalize(torch.randn(2, 8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=-1)
    settings = bound.SphereSettings(kappa=4.0, entropy_leave_one_out=True)
    objective = bound.sphere(z, [(z[0], z[1])], settings, group=None, measure=True)
    others = ~torch.eye(8, dtype=torch.bool)
    entropy = sum(math.log(7) - (4 * v @ v.T)[others].view(8, 7).logsumexp(1).mean() for v in z) / 2
    assert objective.loss.item() == pytest.approx((-4 * (z[0] * z[1]).sum(1).mean() - entropy).item(), abs=1e-6)
    assert objective.bound.entropy.item() == pytest.approx(objective.bound.unbiased_entropy.item(), abs=1e-6)


def test_kernels_may_stand_on_a_queue_that_gets_no_gradient():
    generator = torch.Generator().manual_seed(0)
    z, queue = (normalize(torch.randn(n, 6, generator=generator), dim=1).requires_grad_() for n in (5, 12))
    objective = bound.sphere([z], [(z, z.detach())], bound.SphereSettings(), group=None, support=queue, measure=True)
    written = -10 * (z * z.detach()).sum(1).mean() - (math.log(12) - (10 * z @ queue.detach().T).logsumexp(1).mean())
    torch.testing.assert_close(objective.loss, written)
    (found,) = torch.autograd.grad(objective.loss, z, retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(written, z)[0], rtol=1e-4, atol=1e-5)
    assert torch.autograd.grad(objective.loss, queue, allow_unused=True) == (None,)


def test_discrete_entropy_is_that_of_the_student_and_reaches_it_with_gradient():
    z = normalize(torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0)), dim=-1).requires_grad_()
    w = normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(1)), dim=-1)
    options = {"student_temp": 0.1, "teacher_temp": 0.04, "center": None, "group": None, "twin": True, "measure": True}
    objective = bound.discrete(z, z.detach(), w, w, **options)
    p = (z.flatten(0, 1) @ w.T / 0.1).softmax(-1).mean(0)
    torch.testing.assert_close(objective.bound.entropy, -(p * p.log()).sum().detach())
    objective.loss.backward()
    assert z.grad.abs().sum() > 0


def _discrete(student, teacher, prototypes):
    options = {"student_temp": 0.1, "teacher_temp": 0.04, "center": None, "group": None, "twin": True, "measure": False}
    return bound.discrete(student, teacher, prototypes, prototypes.detach(), **options).loss


def _rows_and_prototypes():
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 8, 16), (2, 8, 16), (30, 16))
    return [normalize(torch.randn(shape, generator=generator), dim=-1).requires_grad_() for shape in shapes]


def test_where_products_are_bf16_the_factors_are_and_nothing_else(monkeypatch):
    monkeypatch.setattr(bound, "_in_bf16", lambda device: True)
    student, teacher, prototypes = _rows_and_prototypes()
    loss = _discrete(student, teacher.detach(), prototypes)
    rounded = [x.detach().bfloat16().double().requires_grad_() for x in (student, teacher, prototypes)]
    expected = _discrete(*rounded)  # with the patch, rounded once more to the same
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-5, atol=1e-5)
    assert torch.autograd.grad(loss, student)[0].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_cpu_multiplies_in_fp32_under_autocast(dtype):
    rows = _rows_and_prototypes()
    with torch.autocast("cpu", dtype):
        assert bound.in_product_type(*rows) == tuple(rows)


def test_only_bf16_on_a_gpu_lowers_the_factors(monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)
    for dtype, lowered in ((torch.bfloat16, True), (torch.float16, False)):
        monkeypatch.setattr(torch, "get_autocast_dtype", lambda device, dtype=dtype: dtype)
        assert bound._in_bf16("cuda") is lowered
        assert not bound._in_bf16("cpu")
