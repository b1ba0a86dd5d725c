import pytest
import torch

from fasttrain.losses import NegativeCosineSimilarity
from tests.losses.pairs import draw, golden_pair, gradients, unit


def test_both_inputs_get_the_gradient_of_the_mean_dot_product():
    actual = gradients(NegativeCosineSimilarity(), *golden_pair())
    expected = gradients(lambda a, b: -(unit(a) * unit(b)).sum(1).mean(), *golden_pair())
    torch.testing.assert_close(actual, expected)


def test_the_dimension_is_free():
    x, y = draw(3, 5, 4), draw(3, 5, 4, seed=1)
    expected = -torch.stack([(unit(x[i].T) * unit(y[i].T)).sum(1) for i in range(3)]).mean()
    torch.testing.assert_close(NegativeCosineSimilarity(1)(x, y), expected)
    assert NegativeCosineSimilarity(2)(x, y) != expected


def test_eps_is_the_least_norm():
    x = torch.tensor([[1e-3, 0.0]])
    assert NegativeCosineSimilarity(eps=1e-2)(x, torch.tensor([[1.0, 0.0]])).item() == pytest.approx(-0.1)


def test_fp16_zeros_are_no_nan():
    zeros = torch.zeros(2, 3, dtype=torch.float16)
    assert NegativeCosineSimilarity()(zeros, zeros) == 0
