import torch
from torch import nn

from fasttrain.models.architectures import create_backbone
from fasttrain.models.teacher import ema_update, make_teacher


def test_the_teacher_starts_equal_frozen_and_apart():
    student = nn.Linear(3, 2)
    teacher = make_teacher(student)
    assert all(not p.requires_grad for p in teacher.parameters())
    with torch.no_grad():
        student.weight.add_(1)
    assert not torch.equal(teacher.weight, student.weight)


def test_update_is_the_weighted_mean():
    student = nn.Linear(3, 2)
    teacher = make_teacher(student)
    before = teacher.weight.clone()
    with torch.no_grad():
        student.weight.add_(1)
    ema_update(teacher, student, 0.9)
    torch.testing.assert_close(teacher.weight, 0.9 * before + 0.1 * student.weight)


def test_a_thousand_small_updates_do_not_get_lost():
    """At momentum 0.996 a bf16 average stays exactly where it was; fp32 arrives at the value it should."""
    student = nn.Linear(1, 1, bias=False)
    teacher = make_teacher(student)
    nn.init.constant_(teacher.weight, 1.0)
    nn.init.constant_(student.weight, 1.5)
    for _ in range(1000):
        ema_update(teacher, student, 0.996)
    assert abs(teacher.weight.item() - (1.5 - 0.5 * 0.996**1000)) < 1e-4


def test_shards_are_averaged_where_the_parameter_has_them():
    student, teacher = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    for module, value in ((student, 4.0), (teacher, 0.0)):
        module.weight.ds_tensor, module.weight.ds_numel = torch.full((2,), value), 8
    kept = teacher.weight.clone()
    ema_update(teacher, student, 0.75)
    torch.testing.assert_close(teacher.weight.ds_tensor, torch.full((2,), 1.0))
    assert torch.equal(teacher.weight, kept)


def test_the_teacher_drops_no_paths():
    torch.manual_seed(0)
    student = create_backbone("vit_tiny", img_size=32, patch_size=8, drop_path_rate=0.5)
    teacher = make_teacher(student)
    images = torch.randn(4, 3, 32, 32)
    assert not torch.equal(student(images), student(images))
    assert torch.equal(teacher(images), teacher(images))
