import pytest
import torch

from fasttrain.losses import DINOLoss as ListsOfViews
from fasttrain.losses.compat.dino import DINOLoss
from tests.losses.pairs import draw, gradients
from tests.losses.written_views import written_dino


@pytest.mark.parametrize(("epoch", "temperature"), [(0, 0.02), (1, 0.05), (2, 0.08), (3, 0.08), (9, 0.08)])
@pytest.mark.parametrize("crops", [2, 5])
def test_concatenated_views_with_the_temperature_of_the_epoch(crops, epoch, temperature):
    student, teacher = draw(crops * 4, 6), draw(8, 6, seed=1)
    loss = DINOLoss(6, crops, 0.02, 0.08, 3, 10, 0.2, 0.8).double()
    loss.center.copy_(draw(6, seed=2))
    before = loss.center.clone()
    actual = gradients(lambda x: loss(x, teacher, epoch), student)
    expected = gradients(lambda x: written_dino(teacher.chunk(2), x.chunk(crops), before, temperature, 0.2), student)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(loss.center, 0.8 * before + 0.2 * teacher.mean(0, keepdim=True))


def test_features_and_prototypes_do_what_logits_do():
    student, teacher, w, v = draw(12, 5), draw(8, 5, seed=1), draw(7, 5, seed=2), draw(7, 5, seed=3)
    by_logits, by_features = (DINOLoss(7, 3, 0.04, 0.07, 0, 1).double() for _ in range(2))
    expected = gradients(lambda x, p: by_logits(x @ p.T, teacher @ v.T, 0), student, w)
    actual = gradients(lambda x, p: by_features(x, teacher, 0, student_prototypes=p, teacher_prototypes=v), student, w)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(by_features.center, by_logits.center)


def test_it_is_the_same_loss_as_that_of_lists():
    student, teacher = draw(6, 4, 9, dtype=torch.float32), draw(2, 4, 9, seed=1, dtype=torch.float32)
    ours, lists = DINOLoss(9, 6, 0.04, 0.04, 0, 1), ListsOfViews(9)
    for _ in range(3):
        actual = ours(student.flatten(0, 1), teacher.flatten(0, 1), 0)
        torch.testing.assert_close(actual, lists(list(teacher), list(student)))
    assert ours.center.shape == (1, 9)
    torch.testing.assert_close(ours.center, lists.center[0])
