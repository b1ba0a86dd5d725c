import pytest
import torch

from fasttrain.methods import Step
from tests.methods.small import INDICES, STEP, build, random_views


def test_centre_follows_the_mean_logit_after_the_loss():
    method = build("dino", False)
    views = random_views()
    with torch.no_grad():
        logits = method.teacher(views[:1]) @ method.teacher.prototypes().T
    method(views, STEP, INDICES)
    torch.testing.assert_close(method.loss.center.flatten(), 0.1 * logits.mean((0, 1)))


def test_no_centering_leaves_the_centre_out():
    method = build("dino", True, no_centering=True)
    method(random_views(), STEP, INDICES)
    assert method.loss.center is None


def test_teacher_moves_at_the_end_of_a_step_by_its_momentum():
    method = build("dino", False, momentum_teacher=0.9)
    with torch.no_grad():
        method.student.head[0].weight.add_(1)
    before = method.teacher.head[0].weight.clone()
    method(random_views(), STEP, INDICES)
    assert torch.equal(method.teacher.head[0].weight, before)
    method.end_step(STEP)
    torch.testing.assert_close(method.teacher.head[0].weight, 0.9 * before + 0.1 * method.student.head[0].weight)


def test_momentum_and_temperature_follow_their_schedules():
    method = build("dino", False, warmup_teacher_temp=0.04, teacher_temp=0.08, warmup_teacher_temp_epochs=4.0)
    by_epoch = [method.teacher_temp(Step(index=10 * epoch + 5, total=100, per_epoch=10)) for epoch in range(5)]
    assert by_epoch == pytest.approx([0.04, 0.04 + 0.04 / 3, 0.04 + 0.08 / 3, 0.08, 0.08])  # numpy.linspace, 4 values
    once = build("dino", False, warmup_teacher_temp=0.04, teacher_temp=0.08, warmup_teacher_temp_epochs=1.0)
    by_epoch = [once.teacher_temp(Step(index=10 * epoch, total=100, per_epoch=10)) for epoch in range(2)]
    assert by_epoch == pytest.approx([0.04, 0.08])  # numpy.linspace of 1 value is the first
    assert method.momentum(Step(index=0, total=100, per_epoch=10)) == 0.996
    assert method.momentum(Step(index=100, total=100, per_epoch=10)) == 1.0
