import pytest
import torch

from fasttrain.losses import DINOLoss
from tests.losses.pairs import draw, gradients
from tests.losses.written_views import random_views, written_dino

BACKENDS = ("cpu", "eager")


def _loss(count, center=None, **options):
    """A loss in fp64 whose centre is not 0."""
    loss = DINOLoss(count, **options).double()
    loss.center.copy_(0.1 * draw(count, seed=9) if center is None else center)
    return loss


@pytest.mark.parametrize("seed", range(40))
def test_random_cases_equal_the_reference_and_move_the_center(seed):
    student, teacher, w, v = random_views(seed)
    s, t = student @ w.T, teacher @ v.T
    loss = _loss(len(w), teacher_temp=0.06, center_momentum=0.7)
    before = loss.center.clone()
    actual = gradients(lambda x: loss(list(t), list(x)), s)
    expected = gradients(lambda x: written_dino(t, x, before, 0.06), s)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    assert actual[0].shape == ()
    assert loss.center.shape == (1, 1, len(w))
    torch.testing.assert_close(loss.center, 0.7 * before + 0.3 * t.mean((0, 1)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(20))
def test_features_and_prototypes_do_what_logits_do(seed, backend):
    student, teacher, w, v = random_views(seed)
    by_logits, by_features = (_loss(len(w), backend=backend) for _ in range(2))
    expected = gradients(lambda x, p: by_logits(list(teacher @ v.T), list(x @ p.T)), student, w)
    actual = gradients(
        lambda x, p: by_features(list(teacher), list(x), teacher_prototypes=v, student_prototypes=p), student, w
    )
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(by_features.center, by_logits.center, rtol=1e-12, atol=1e-14)


def test_features_of_any_norm_and_more_teachers_than_students():
    student, teacher, w, v = 3 * draw(2, 5, 4), 2 * draw(4, 5, 4, seed=1), draw(9, 4, seed=2), draw(9, 4, seed=3)
    by_logits, by_features = _loss(9), _loss(9)
    expected = by_logits(list(teacher @ v.T), list(student @ w.T))
    actual = by_features(list(teacher), list(student), teacher_prototypes=v, student_prototypes=w)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_the_teacher_comes_first_and_gets_no_gradient():
    teacher, student = ([x.requires_grad_() for x in draw(2, 4, 6, seed=s)] for s in range(2))
    for extra in ({}, {"teacher_prototypes": draw(5, 6, seed=2), "student_prototypes": draw(5, 6, seed=3)}):
        leaves = [[x.detach().clone().requires_grad_() for x in side] for side in (teacher, student)]
        if extra:
            extra = {name: w.requires_grad_() for name, w in extra.items()}
        _loss(5 if extra else 6)(*leaves, **extra).backward()
        assert all(x.grad is None for x in leaves[0])
        assert all(x.grad is not None for x in leaves[1])
        if extra:
            assert extra["teacher_prototypes"].grad is None
            assert extra["student_prototypes"].grad is not None


def test_the_order_of_arguments_and_what_they_become():
    loss = DINOLoss(6, 0.02, 0.08, 4, 0.2, 0.6, "mean")
    assert (loss.teacher_temp, loss.warmup_teacher_temp_epochs) == (0.08, 4)
    assert (loss.student_temp, loss.center_momentum) == (0.2, 0.6)
    torch.testing.assert_close(loss.teacher_temp_schedule, torch.tensor([0.02, 0.04, 0.06, 0.08], dtype=torch.float64))
    assert DINOLoss().center.shape == (1, 1, 65536)


@pytest.mark.parametrize(
    ("arguments", "temperature"),
    [((), 0.08), ((None, 0), 0.02), ((None, 1), 0.04), ((None, 4), 0.08), ((None, 99), 0.08), ((0.05, 0), 0.05)],
)
def test_the_teacher_s_temperature(arguments, temperature):
    t, s = draw(2, 4, 6), draw(3, 4, 6, seed=1)
    loss = DINOLoss(6, 0.02, 0.08, 4)
    expected = written_dino(t, s, torch.zeros(6), temperature)
    torch.testing.assert_close(loss(list(t), list(s), *arguments), expected, rtol=1e-10, atol=1e-12)


def test_a_uniform_teacher_of_a_uniform_student_costs_log_k():
    zeros = [torch.zeros(3, 8)] * 2
    assert DINOLoss(8)(zeros, zeros).item() == pytest.approx(torch.tensor(8.0).log().item(), rel=1e-6)


def test_the_centre_moves_after_each_loss_and_is_saved():
    t, s = draw(2, 4, 6, dtype=torch.float32), draw(2, 4, 6, seed=1, dtype=torch.float32)
    loss, fresh = DINOLoss(6), DINOLoss(6)
    first = loss(list(t), list(s))
    torch.testing.assert_close(first, written_dino(t, s, 0, 0.04))
    torch.testing.assert_close(loss.center.flatten(), 0.1 * t.mean((0, 1)))
    assert loss.state_dict().keys() == {"center"}
    fresh.load_state_dict(loss.state_dict())
    with torch.no_grad():  # it moves without gradient too, as in lightly
        assert torch.equal(fresh(list(t), list(s)), loss(list(t), list(s)))
    assert torch.equal(fresh.center, loss.center)
    torch.testing.assert_close(loss.center.flatten(), 0.19 * t.mean((0, 1)))


def test_backward_reads_the_centre_from_before_it_moved():
    s, t = draw(2, 4, 6), draw(2, 4, 6, seed=1)
    loss = _loss(6)
    before = loss.center.clone()
    leaf = s.clone().requires_grad_()
    value = loss(list(t), list(leaf))
    loss.center.fill_(7)
    value.backward()
    _, expected = gradients(lambda x: written_dino(t, x, before, 0.04), s)
    torch.testing.assert_close(leaf.grad, expected)


def test_autocast_rounds_neither_the_loss_nor_the_centre():
    student, teacher = draw(3, 6, 8).float(), draw(2, 6, 8, seed=1).float()
    w = {"teacher_prototypes": draw(30, 8, seed=2).float(), "student_prototypes": draw(30, 8, seed=3).float()}
    plain, cast = DINOLoss(30), DINOLoss(30)
    expected = plain(list(teacher), list(student), **w)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = cast(list(teacher), list(student), **w)
    assert torch.equal(actual, expected)
    assert torch.equal(cast.center, plain.center)
