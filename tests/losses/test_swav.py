import pytest
import torch

from fasttrain.losses import SwaVLoss
from tests.losses.pairs import draw, gradients, unit
from tests.losses.written_views import random_views, written_sinkhorn, written_swav

BACKENDS = ("cpu", "eager")


def _queues(high, seed):
    """Rows of as many other images as the seed says, at least one, for each high-resolution view."""
    return unit(draw(len(high), 1 + seed % 7, high.shape[2], seed=seed + 50))


@pytest.mark.parametrize("queued", [False, True])
@pytest.mark.parametrize("seed", range(30))
def test_random_cases_are_the_written_out_loss(seed, queued):
    views, teacher, w, _ = random_views(seed)
    scores, n = views @ w.T, len(teacher)
    queues = _queues(views[:n], seed) @ w.T if queued else None
    settings = {"epsilon": 0.1, "iterations": seed % 5}
    loss = SwaVLoss(0.2, settings["iterations"], settings["epsilon"])
    actual = gradients(lambda x: loss(list(x[:n]), list(x[n:]), None if queues is None else list(queues)), scores)
    expected = gradients(lambda x: written_swav(x[:n], x[n:], queues, 0.2, **settings).view(1), scores)
    # Codes are fp32 throughout.
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert actual[0].shape == (1,)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("queued", [False, True])
@pytest.mark.parametrize("seed", range(15))
def test_projections_and_prototypes_do_what_scores_do(seed, queued, backend):
    views, teacher, w, _ = random_views(seed)
    n = len(teacher)
    queues = _queues(views[:n], seed) if queued else None
    loss = SwaVLoss(backend=backend)
    expected = gradients(
        lambda x, p: loss(
            list(x[:n] @ p.T), list(x[n:] @ p.T), None if queues is None else list(queues @ p.T.detach())
        ),
        views,
        w,
    )
    actual = gradients(
        lambda x, p: loss(list(x[:n]), list(x[n:]), None if queues is None else list(queues), prototypes=p), views, w
    )
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert actual[0].shape == (1,)


def test_the_codes_are_balanced_over_batch_and_queue():
    scores = unit(draw(12, 6)) @ unit(draw(4, 6, seed=1)).T
    codes = SwaVLoss(sinkhorn_iterations=500)._codes(scores)
    torch.testing.assert_close(codes.sum(0), torch.full((4,), 3.0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(codes, written_sinkhorn(scores, 0.05, 500).float(), rtol=1e-4, atol=1e-5)


def test_codes_and_queue_get_no_gradient():
    high, low, queue = ([x.requires_grad_() for x in draw(2, 4, 6, seed=s)] for s in range(3))
    w = draw(5, 6, seed=9).requires_grad_()
    for extra in ({}, {"prototypes": w}):
        sides = [[x.detach().clone().requires_grad_() for x in side] for side in (high, low, queue)]
        SwaVLoss(sinkhorn_epsilon=1.0)(*sides, **extra).backward()
        assert all(x.grad is None for x in sides[2])
        assert all(x.grad is not None for side in sides[:2] for x in side)
    # Of two views each predicts the other's code: prediction less code is all of the gradient.
    a, b = (x.detach().clone().requires_grad_() for x in high)
    SwaVLoss(sinkhorn_epsilon=1.0)([a, b], []).backward()
    expected = (b.detach() / 0.1).softmax(-1) - written_sinkhorn(a.detach(), 1.0, 3)
    torch.testing.assert_close(b.grad, expected / 0.1 / len(b) / 2, rtol=1e-5, atol=1e-6)


def test_a_queue_of_another_type_and_autocast():
    views, w = unit(draw(3, 6, 8)).float(), unit(draw(20, 8, seed=1)).float()
    queue = list(unit(draw(2, 9, 8, seed=2)).float())
    loss = SwaVLoss()
    expected = loss(list(views[:2]), list(views[2:]), queue, prototypes=w)
    torch.testing.assert_close(
        loss(list(views[:2]), list(views[2:]), [q.double() for q in queue], prototypes=w), expected
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(list(views[:2]), list(views[2:]), queue, prototypes=w), expected)


def test_the_order_of_arguments_and_what_they_become():
    loss = SwaVLoss(0.2, 5, 0.07, True)
    assert (loss.temperature, loss.sinkhorn_iterations, loss.sinkhorn_epsilon) == (0.2, 5, 0.07)
    assert loss.sinkhorn_gather_distributed
    assert loss.state_dict() == {}
