"""Operators are counted as by hand: operations, bytes moved, bytes alive, bytes saved."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

from fasttrain.kernels import info_nce, nt_xent, prototype_cross_entropy
from fasttrain.plan.ledger import Kept, Ledger, Work


def _flops(work):
    return sum(one.flops for one in work)


def test_ledger_counts_products_bytes_and_peak():
    with FakeTensorMode():
        x, w = torch.empty(10, 20), torch.empty(20, 30)
        with Ledger(()) as ledger:
            y = x @ w
            y.t()
            y.add_(1)
            z = y.relu()
    product = Work(2 * 10 * 20 * 30, 4 * (200 + 600 + 300))
    assert ledger.work == [product, Work(0, 4 * 600), Work(0, 4 * 600)]
    assert ledger.calls == 4  # with the view
    assert ledger.peak == ledger.alive == 4 * 600
    assert z.shape == (10, 30)


def test_ledger_counts_freed_tensors_as_free():
    with FakeTensorMode():
        x = torch.empty(100)
        with Ledger(()) as ledger:
            a = x + 1
            b = a + 1
            del a
            c = b + 1
            x.add_(c)
            del b, c
    assert (ledger.peak, ledger.alive) == (800, 0)


def test_ledger_reads_values_as_0():
    with FakeTensorMode(), Ledger(()):
        assert [float(torch.ones(3).sum()), int(torch.ones(3, dtype=torch.long).sum())] == [0.0, 0]


def test_ledger_counts_seven_products_of_attention():
    batch, heads, rows, dim = 2, 3, 16, 8
    product = 2 * batch * heads * rows * rows * dim
    with FakeTensorMode():
        q, k, v = (torch.empty(batch, heads, rows, dim, requires_grad=True) for _ in range(3))
        with Ledger(()) as ledger:
            out = scaled_dot_product_attention(q, k, v)
            assert _flops(ledger.work) == 2 * product
            out.sum().backward()
    assert _flops(ledger.work) == 7 * product


@pytest.mark.parametrize(
    ("loss", "products"),
    [
        # In products of 2 N M D operations, forward and backward: kernels/NOTES.md.
        (lambda z: nt_xent(z[0], z[1], temperature=0.1), 0.5 + 2),
        (lambda z: info_nce(z[0], z[1].detach(), temperature=0.1), 1 + 2),
        (lambda z: info_nce(z[0], z[1], temperature=0.1), 1 + 4),
    ],
)
def test_ledger_counts_products_of_contrastive_kernels(loss, products):
    rows, dim = 64, 16
    with FakeTensorMode(), Ledger(()) as ledger:
        z = torch.empty(2, rows, dim, requires_grad=True)
        loss(z).backward()
    side = 2 * rows if products == 2.5 else rows
    assert _flops(ledger.work) == pytest.approx(products * 2 * side * side * dim, rel=0.01)


def test_ledger_counts_four_products_per_view_of_prototypes():
    rows, dim, count = 8, 16, 256
    with FakeTensorMode(), Ledger(()) as ledger:
        student = torch.empty(3, rows, dim, requires_grad=True)
        prototypes = torch.empty(count, dim, requires_grad=True)
        teacher, others = torch.empty(2, rows, dim), torch.empty(count, dim)
        loss = prototype_cross_entropy(student, teacher, prototypes, others, student_temp=0.1, teacher_temp=0.04)
        loss.backward()
    assert _flops(ledger.work) == 4 * (3 + 2) * 2 * rows * dim * count


class _Method(nn.Module):
    def __init__(self):
        super().__init__()
        self.student = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))

    def forward(self, x):
        return self.student(x).float().square().sum()


def _kept(precision=None):
    method, x = _Method(), torch.randn(10, 20)
    ledger = Ledger(method.parameters())
    kept = Kept(method, [x], ledger.weight_copies)
    with ledger, kept.counting(), torch.autocast("cpu", precision, enabled=precision is not None):
        method(x)
    return {place: kept.total(place) for place in ("network", "loss", "copies")}


def test_kept_counts_storages_once_and_weight_copies_apart():
    # ReLU and the next layer save the hidden layer. The square saves the output.
    assert _kept() == {"network": 4 * 10 * 30, "loss": 4 * 10 * 5, "copies": 0}
    # The input is cast. It has no gradient, so the copy of the first weight is not saved.
    assert _kept(torch.bfloat16) == {"network": 2 * (10 * 20 + 10 * 30), "loss": 4 * 10 * 5, "copies": 2 * 30 * 5}


def test_kept_changes_neither_gradients_nor_hooks():
    torch.manual_seed(0)
    method, x = _Method(), torch.randn(10, 20)
    method(x).backward()
    expected = [p.grad.clone() for p in method.parameters()]
    method.zero_grad()
    with Kept(method, [x]).counting():
        method(x).backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(method.parameters(), expected, strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in method.modules())
