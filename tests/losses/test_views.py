import pytest
import torch

from fasttrain.losses.views import count_pairs, cross_entropy_of_others, stack_views
from tests.losses.pairs import draw, gradients
from tests.losses.written_views import cross_entropies


def test_views_are_stacked_in_order():
    views = [draw(3, 2, seed=s) for s in range(3)]
    assert torch.equal(stack_views(views, "x")[1], views[1])
    assert stack_views(tuple(views), "x").shape == (3, 3, 2)


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ([], r"student_out must hold at least one view"),
        ([draw(3, 2), draw(4, 2)], r"student_out\[0\] and student_out\[1\] must have the same shape"),
        ([draw(3, 2), draw(3, 2), draw(3, 5)], r"student_out\[0\] and student_out\[2\] must have the same shape"),
        ([draw(3, 2), draw(3, 2).half()], r"student_out\[0\] and student_out\[1\] must have one type"),
        ([draw(3, 2, 2)], r"student_out\[0\] must be \[N, D\]"),
        ([torch.zeros(3, 2, dtype=torch.long)], "must be floating point"),
    ],
)
def test_views_that_are_no_batch_are_named(views, message):
    with pytest.raises(ValueError, match=message):
        stack_views(views, "student_out")


@pytest.mark.parametrize(("teachers", "students", "pairs"), [(2, 2, 2), (2, 10, 18), (1, 2, 1), (3, 2, 4)])
def test_equal_views_do_not_count(teachers, students, pairs):
    assert count_pairs(draw(teachers, 4, 3), draw(students, 4, 3), "a", "b") == pairs


def test_views_that_make_no_pair_are_refused():
    with pytest.raises(ValueError, match=r"at least two views are needed.*1 in a and 1 in b"):
        count_pairs(draw(1, 4, 3), draw(1, 4, 3), "a", "b")
    with pytest.raises(ValueError, match="views of a and b must have the same shape"):
        count_pairs(draw(2, 4, 3), draw(2, 5, 3), "a", "b")


@pytest.mark.parametrize(("teachers", "students"), [(2, 2), (1, 3), (3, 2)])
def test_the_mean_over_other_views(teachers, students):
    targets = draw(teachers, 4, 5).softmax(-1)
    found = gradients(lambda s: cross_entropy_of_others(targets, s, temp=0.2), draw(students, 4, 5, seed=1))
    expected = gradients(lambda s: torch.stack(cross_entropies(targets, s, 0.2)).mean(), draw(students, 4, 5, seed=1))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_autocast_does_not_round_the_sum():
    targets, logits = draw(2, 16, 50).float().softmax(-1), draw(3, 16, 50, seed=1).float()
    expected = cross_entropy_of_others(targets, logits, temp=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = cross_entropy_of_others(targets, logits, temp=0.1)
    assert torch.equal(found, expected)
