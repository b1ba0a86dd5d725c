"""iBOT and DINOv2: what is masked, for whom, and when."""

import pytest
import torch

from fasttrain.methods import Step
from tests.methods.small import INDICES, STEP, TinyViT, build, random_views

both = pytest.mark.parametrize("name", ["dinov2", "ibot"])
_OFFICIAL = {"pred_ratio": (0.0, 0.3), "pred_ratio_var": (0.0, 0.2)}


class Rank:
    """Rank 1 of 2, for methods that only ask for it."""

    def rank(self):
        return 1

    def size(self):
        return 2


@both
def test_only_global_crops_of_the_student_are_masked(name, monkeypatch):
    method, masks = build(name, False), []
    monkeypatch.setattr(type(method.student.mask_token), "forward", lambda _, x, mask: masks.append(mask) or x)
    method(random_views(), STEP, INDICES)
    assert [mask.shape for mask in masks] == [(32, 16)]
    assert method.student.backbone.calls == [(32, 3, 8, 8), (48, 3, 4, 4)]
    assert method.teacher.backbone.calls == [(32, 3, 8, 8)]


@both
def test_a_rank_draws_its_part_of_the_global_batch(name):
    whole, part = build(name, False), build(name, False)
    part._group = Rank()
    masks = whole.masks_at(STEP, 16).masks[0].view(2, 16, -1)
    assert torch.equal(part.masks_at(STEP, 8).masks[0].view(2, 8, -1), masks[:, 8:])
    second = whole.masks_at(Step(0, 100, 10, micro=1), 8).masks[0].view(2, 8, -1)
    assert torch.equal(second, masks[:, 8:])  # two micro-batches of one rank are the same batch


@both
def test_masks_follow_the_seed_of_the_run(name):
    one, other = build(name, False), build(name, False)
    other.seed = 1
    assert not torch.equal(one.masks_at(STEP, 16).masks[0], other.masks_at(STEP, 16).masks[0])


@both
def test_logs_have_the_bound_of_the_patches(name):
    logs = build(name, True)(random_views(), STEP, INDICES).logs
    assert logs["patch_information"] == logs["patch_entropy"] - logs["patch_reconstruction"]
    assert logs["patch_deficit"] >= 0
    assert 0.3 < logs["masked_share"] <= 1


def test_ibot_masks_start_at_their_epoch_and_the_temperature_waits():
    method = build("ibot", False, pred_start_epoch=2.0, warmup_teacher_temp_epochs=3.0, teacher_temp=0.07, **_OFFICIAL)
    steps = [Step(index=10 * epoch, total=100, per_epoch=10) for epoch in range(6)]
    assert [bool(method.masks_at(step, 16).count) for step in steps] == [False] * 2 + [True] * 4
    temperatures = [method.temperatures(step) for step in steps]
    assert [t.cls for t in temperatures] == pytest.approx([0.04, 0.055, 0.07, 0.07, 0.07, 0.07])
    assert [t.patch for t in temperatures] == pytest.approx([0.04, 0.04, 0.04, 0.055, 0.07, 0.07])
    method(random_views(), steps[0], INDICES).loss.backward()
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)


def test_ibot_shared_teacher_follows_the_prototypes_of_cls():
    method = build("ibot", False, momentum_teacher=0.5)
    assert list(method.teacher.prototypes) == ["cls"]
    with torch.no_grad():
        method.student.prototypes["cls"].weight.add_(1)
    before = method.teacher.prototypes["cls"].weight.clone()
    method.end_step(STEP)
    torch.testing.assert_close(method.teacher.prototypes["cls"].weight, before + 0.5)


def test_dinov2_temperature_changes_from_step_to_step():
    method = build("dinov2", False, warmup_teacher_temp_epochs=1.0)
    temperatures = [method.temperatures(Step(index, total=100, per_epoch=4)).cls for index in range(6)]
    assert temperatures == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.07, 0.07])  # numpy.linspace of 4 steps


def test_dinov2_twin_has_no_koleo():
    def parts(entropy, weight):
        method = build("dinov2", entropy, koleo_loss_weight=weight, centering="none")
        objective = method(random_views(), STEP, INDICES)
        return objective.loss, "koleo" in objective.logs

    assert parts(True, 0.1) == parts(True, 0.0)
    assert [parts(False, weight)[1] for weight in (0.0, 0.1)] == [False, True]


@both
def test_pooled_network_with_registers_trains(name):
    def network(channels):
        return TinyViT(channels, class_token=False, reg_tokens=2, global_pool="avg")

    method = build(name, False, network=network)
    method(random_views(), STEP, INDICES).loss.backward()
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)
