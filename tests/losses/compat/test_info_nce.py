import pytest
import torch
from torch.nn.functional import cross_entropy

from fasttrain.losses.compat.info_nce import InfoNCE, info_nce
from tests.losses.pairs import draw, gradients, unit

BACKENDS = ("cpu", "eager")


def _written(q, k, negatives, temperature, reduction):
    """The cross-entropy of the positive's cosine, in the first column, among the negatives'."""
    q, k = unit(q), unit(k)
    if negatives is None:
        return cross_entropy(q @ k.T / temperature, torch.arange(len(q)), reduction=reduction)
    equation = "nd,md->nm" if negatives.ndim == 2 else "nd,nmd->nm"
    scores = torch.cat([(q * k).sum(1, keepdim=True), torch.einsum(equation, q, unit(negatives))], dim=1)
    return cross_entropy(scores / temperature, torch.zeros(len(q), dtype=torch.long), reduction=reduction)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("shape", [None, (17, 5), (6, 9, 5), (6, 1, 5)])
def test_every_kind_of_negatives_and_reduction(shape, reduction, backend):
    inputs = [3 * draw(6, 5, seed=1), draw(6, 5, seed=2), *([] if shape is None else [draw(*shape, seed=3)])]
    mode = "paired" if shape and len(shape) == 3 else "unpaired"
    loss = InfoNCE(0.2, reduction, mode, backend=backend)
    weights = draw(6, seed=4) if reduction == "none" else 1.0  # so that every row's gradient is seen
    assert loss(*inputs).shape == ((6,) if reduction == "none" else ())
    actual = gradients(lambda *x: (loss(*x) * weights).sum(), *inputs)
    expected = gradients(lambda q, k, n=None: (_written(q, k, n, 0.2, reduction) * weights).sum(), *inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def test_function_takes_arguments_in_the_order_of_the_peer():
    q, k, negatives = draw(6, 5), draw(6, 5, seed=1), draw(6, 3, 5, seed=2)
    actual = info_nce(q, k, negatives, 0.3, "none", "paired")
    torch.testing.assert_close(actual, InfoNCE(0.3, "none", "paired")(q, k, negatives))
    loss = InfoNCE(0.3, "none", "paired")
    assert (loss.temperature, loss.reduction, loss.negative_mode) == (0.3, "none", "paired")
