import pytest
import torch
from lightly.loss import VICRegLoss as Theirs

from fasttrain.losses import VICRegLoss
from tests.losses.pairs import draw, gradients


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("shape", [(9, 5), (5, 9)], ids=str)
@pytest.mark.parametrize("options", [{}, {"lambda_param": 2.0, "mu_param": 3.0, "nu_param": 4.0, "eps": 0.5}])
def test_vicreg_equals_lightly_in_value_and_gradient(options, shape, backend):
    a, b = 0.9 * draw(*shape) + 1, draw(*shape, seed=1)
    ours, theirs = gradients(VICRegLoss(**options, backend=backend), a, b), gradients(Theirs(**options), a, b)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_terms_of_views_are_the_mean_over_the_pairs():
    views, loss = draw(3, 6, 4), VICRegLoss()
    pairs = [(0, 1), (0, 2), (1, 2)]
    expected = torch.stack([loss(views[i], views[j]) for i, j in pairs]).mean()
    torch.testing.assert_close(loss.weighted(loss.terms(views, pairs)), expected)


def test_invalid_input_is_named():
    with pytest.raises(ValueError, match="^eps must"):
        VICRegLoss(eps=0)
    with pytest.raises(ValueError, match="at least 2 rows"):
        VICRegLoss()(draw(1, 4), draw(1, 4))
    with pytest.raises(ValueError, match="^z_a and z_b must have the same shape"):
        VICRegLoss()(draw(3, 4), draw(3, 5))
