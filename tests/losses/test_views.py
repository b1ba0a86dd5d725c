import pytest
import torch

from fasttrain.losses.views import count_pairs, cross_entropy_of_others
from tests.losses.pairs import draw, gradients
from tests.losses.written_views import cross_entropies


@pytest.mark.parametrize(("teachers", "students", "pairs"), [(2, 2, 2), (2, 10, 18), (1, 2, 1), (3, 2, 4)])
def test_equal_views_do_not_count(teachers, students, pairs):
    assert count_pairs(draw(teachers, 4, 3), draw(students, 4, 3), "a", "b") == pairs


@pytest.mark.parametrize(("teachers", "students"), [(2, 2), (1, 3), (3, 2)])
def test_the_mean_over_other_views(teachers, students):
    targets = draw(teachers, 4, 5).softmax(-1)
    actual = gradients(lambda s: cross_entropy_of_others(targets, s, temp=0.2), draw(students, 4, 5, seed=1))
    expected = gradients(lambda s: torch.stack(cross_entropies(targets, s, 0.2)).mean(), draw(students, 4, 5, seed=1))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


def test_autocast_does_not_round_the_sum():
    targets, logits = draw(2, 16, 50).float().softmax(-1), draw(3, 16, 50, seed=1).float()
    expected = cross_entropy_of_others(targets, logits, temp=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = cross_entropy_of_others(targets, logits, temp=0.1)
    assert torch.equal(actual, expected)
