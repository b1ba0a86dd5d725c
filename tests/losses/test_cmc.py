from itertools import combinations

import pytest
import torch

from fasttrain.losses import CMCLoss, CMCMemoryLoss
from tests.losses.pairs import draw, gradients, unit, written_info_nce


def _views(count, batch=7, dim=5):
    return [draw(batch, dim, seed=seed) for seed in range(count)]


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("graph", ["full", "core"])
@pytest.mark.parametrize("count", [2, 4])
def test_it_is_the_sum_over_pairs_and_directions(count, graph, backend):
    pairs = [(a, b) for a, b in combinations(range(count), 2) if graph == "full" or a == 0]
    assert len(pairs) == {("full", 2): 1, ("full", 4): 6, ("core", 2): 1, ("core", 4): 3}[graph, count]
    loss = CMCLoss(0.2, graph=graph, backend=backend)

    def written(*z):
        return sum(written_info_nce(z[a], z[b], 0.2) + written_info_nce(z[b], z[a], 0.2) for a, b in pairs)

    actual = gradients(lambda *z: loss(z), *_views(count))
    torch.testing.assert_close(actual, gradients(written, *_views(count)), rtol=1e-9, atol=1e-11)


def test_stacked_views_and_default_temperature_of_the_paper():
    views = _views(3)
    torch.testing.assert_close(CMCLoss()(torch.stack(views)), CMCLoss(0.07)(views))


def _memory_loss(graph="full", views=2, **options):
    return CMCMemoryLoss(40, 5, views, 0.2, negatives=11, graph=graph, **options)


@pytest.mark.parametrize("graph", ["full", "core"])
def test_with_a_memory_every_view_meets_the_others_banks(graph):
    loss = _memory_loss(graph, views=3).double()
    bank = unit(loss.memory.bank)
    loss.memory.bank.copy_(bank)
    index = torch.tensor([3, 39, 0, 11, 25, 7, 30])
    torch.manual_seed(5)
    actual = gradients(lambda *z: loss(z, index), *_views(3))
    torch.manual_seed(5)
    drawn = torch.randint(40, (11,))

    def written(*z):
        directions = [(a, b) for a in range(3) for b in range(3) if a != b and (graph == "full" or 0 in (a, b))]
        return sum(written_info_nce(z[a], bank[b, index], 0.2, bank[b, drawn]) for a, b in directions)

    torch.testing.assert_close(actual, gradients(written, *_views(3)), rtol=1e-9, atol=1e-11)


def test_the_memory_moves_after_a_loss_with_gradient_only():
    loss = _memory_loss()
    before = loss.memory.bank.clone()
    index, z = torch.arange(7), _views(2)
    loss(z, index)
    assert torch.equal(loss.memory.bank, before)
    loss([z[0], z[1].requires_grad_()], index)
    for view in range(2):
        expected = unit(before[view, :7] + unit(z[view].detach()).float())
        torch.testing.assert_close(loss.memory.bank[view, :7], expected)
        assert torch.equal(loss.memory.bank[view, 7:], before[view, 7:])
