"""iBOT's patch loss against its formula and against lightly's class."""

import pytest
import torch
from lightly.loss import IBOTPatchLoss

from fasttrain.losses import iBOTPatchLoss
from tests.losses.pairs import draw, gradients

BACKENDS = ("cpu", "eager")


def _case(seed, features=4, count=9):
    """Masks [3, 2, 4], of which the last image has none, with features and prototypes of their patches."""
    mask = torch.rand(3, 2, 4, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask[0, 0, 0], mask[2] = True, False
    rows = int(mask.sum())
    student, teacher = draw(rows, features, seed=seed), draw(rows, features, seed=seed + 100)
    return mask, student, teacher, draw(count, features, seed=seed + 200), draw(count, features, seed=seed + 300)


def _loss(cls=iBOTPatchLoss, count=9, **options):
    """A loss in fp64 whose centre is not 0."""
    loss = cls(count, **options).double()
    center = loss.center if isinstance(loss, iBOTPatchLoss) else loss.center.value
    center.copy_(0.1 * draw(count, seed=9))
    return loss


@pytest.mark.parametrize("seed", range(20))
def test_loss_gradient_and_center_equal_lightlys(seed):
    mask, student, teacher, w, v = _case(seed)
    ours, theirs = _loss(teacher_temp=0.06), _loss(IBOTPatchLoss, teacher_temp=0.06)
    for _ in range(2):
        expected = gradients(lambda x: theirs(teacher @ v.T, x, mask), student @ w.T)
        actual = gradients(lambda x: ours(teacher @ v.T, x, mask), student @ w.T)
        # lightly's temperature is a fp32 tensor.
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(ours.center, theirs.center.value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(5))
def test_features_and_prototypes_do_what_logits_do(seed, backend):
    mask, student, teacher, w, v = _case(seed)
    by_logits, by_features = (_loss(backend=backend) for _ in range(2))
    expected = gradients(lambda x, p: by_logits(teacher @ v.T, x @ p.T, mask), student, w)
    actual = gradients(
        lambda x, p: by_features(teacher, x, mask, teacher_prototypes=v, student_prototypes=p), student, w
    )
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(by_features.center, by_logits.center, rtol=1e-12, atol=1e-14)


def test_no_masked_patch_gives_0_and_leaves_the_center():
    mask, student, teacher, w, v = _case(0)
    for rows in (0, 1):
        loss = _loss()
        before = loss.center.clone()
        x = student[:rows].clone().requires_grad_()
        weight = torch.zeros(rows, dtype=torch.float64)
        result = loss.weighted_sum(x, teacher[:rows], w, v, weight=weight, teacher_temp=0.05)
        result.backward()
        assert result == 0
        assert not x.grad.any()
        loss.update_center(teacher[:0], teacher_prototypes=v)
        assert torch.equal(loss.center, before)
    result = _loss()(teacher[:0] @ v.T, (student[:0] @ w.T).requires_grad_(), torch.zeros_like(mask))
    assert result == 0


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ({"mask": torch.ones(1, 1, 3, dtype=torch.bool)}, {}, "mask must have one true entry per row, 4, got 3"),
        ({"mask": torch.ones(1, 1, 4)}, {}, "mask must be bool"),
        ({"teacher_out": torch.ones(3, 9)}, {}, "student_out and teacher_out .*same shape"),
        ({"teacher_temp": 0.0}, {}, "teacher_temp must be positive"),
        ({"teacher_prototypes": torch.ones(9, 9)}, {}, "give both"),
        ({}, {"output_dim": 8}, "logits must have the centre's K = 8, got 9"),
        ({}, {"center_mode": "sum"}, "Unknown mode"),
        ({}, {"teacher_temp": -1}, "teacher_temp"),
        ({}, {"student_temp": 0}, "student_temp"),
        ({}, {"center_momentum": 2}, "center_momentum"),
    ],
)
def test_invalid_arguments_are_named(arguments, options, message):
    usual = {
        "teacher_out": torch.ones(4, 9),
        "student_out": torch.ones(4, 9),
        "mask": torch.ones(1, 2, 2, dtype=torch.bool),
    }
    with pytest.raises(ValueError, match=message):
        iBOTPatchLoss(**{"output_dim": 9, **options})(**usual | arguments)
