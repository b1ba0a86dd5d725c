"""SimDINO's loss, written out."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from fasttrain.losses import SimDINOLoss


def _views(count, rows=6, dim=5):
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(rows, dim, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(count)]


@pytest.mark.parametrize("smooth", [False, True])
def test_equals_the_official_formula_and_stops_at_the_teacher(smooth):
    teacher, student = _views(2), _views(4)
    loss = SimDINOLoss(0.7, 0.3, smooth=smooth)(teacher, student)
    rows, dim = 6, 5
    expected = 0.0
    for t, target in enumerate(teacher):
        for s, view in enumerate(student):
            if s != t:
                expected -= 0.7 * cosine_similarity(view, target.detach()).mean() / 6
        z = torch.nn.functional.normalize(student[t], dim=1)
        if smooth:
            z = (z + torch.nn.functional.normalize(target.detach(), dim=1)) / 2
        rate = (torch.eye(dim) + dim / (rows * 0.3) * z.T @ z).logdet() / 2
        expected -= (dim + rows) / (dim * rows) * rate / 2
    torch.testing.assert_close(loss, expected)
    for actual, other in zip(
        torch.autograd.grad(loss, student, retain_graph=True), torch.autograd.grad(expected, student), strict=True
    ):
        torch.testing.assert_close(actual, other)
    assert torch.autograd.grad(loss, teacher, allow_unused=True) == (None, None)


@pytest.mark.parametrize(
    ("teacher", "student", "message"),
    [(1, 1, "at least two views"), (3, 2, "teacher has 3 views"), (0, 2, "teacher_out")],
)
def test_impossible_views_are_named(teacher, student, message):
    with pytest.raises(ValueError, match=message):
        SimDINOLoss()(_views(teacher), _views(student))


def test_eps_must_be_positive():
    with pytest.raises(ValueError, match="eps"):
        SimDINOLoss(eps=0)
