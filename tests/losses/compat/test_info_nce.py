import pytest
import torch
from torch.nn.functional import cross_entropy

from fasttrain.losses.compat.info_nce import InfoNCE, info_nce
from tests.losses.pairs import draw, golden_pair, gradients, unit

BACKENDS = ("cpu", "eager")


def _written(q, k, negatives, temperature, reduction):
    """The cross-entropy of the positive's cosine, in the first column, among the negatives'."""
    q, k = unit(q), unit(k)
    if negatives is None:
        return cross_entropy(q @ k.T / temperature, torch.arange(len(q)), reduction=reduction)
    equation = "nd,md->nm" if negatives.ndim == 2 else "nd,nmd->nm"
    scores = torch.cat([(q * k).sum(1, keepdim=True), torch.einsum(equation, q, unit(negatives))], dim=1)
    return cross_entropy(scores / temperature, torch.zeros(len(q), dtype=torch.long), reduction=reduction)


def test_equals_info_nce_pytorch():
    assert InfoNCE()(*golden_pair()).item() == pytest.approx(3.6847536887636574, rel=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("shape", [None, (17, 5), (6, 9, 5), (6, 1, 5)])
def test_every_kind_of_negatives_and_reduction(shape, reduction, backend):
    inputs = [3 * draw(6, 5, seed=1), draw(6, 5, seed=2), *([] if shape is None else [draw(*shape, seed=3)])]
    mode = "paired" if shape and len(shape) == 3 else "unpaired"
    loss = InfoNCE(0.2, reduction, mode, backend=backend)
    weights = draw(6, seed=4) if reduction == "none" else 1.0  # so that every row's gradient is seen
    assert loss(*inputs).shape == ((6,) if reduction == "none" else ())
    found = gradients(lambda *x: (loss(*x) * weights).sum(), *inputs)
    expected = gradients(lambda q, k, n=None: (_written(q, k, n, 0.2, reduction) * weights).sum(), *inputs)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_the_function_takes_the_class_s_arguments_in_info_nce_pytorch_s_order():
    q, k, negatives = draw(6, 5), draw(6, 5, seed=1), draw(6, 3, 5, seed=2)
    found = info_nce(q, k, negatives, 0.3, "none", "paired")
    torch.testing.assert_close(found, InfoNCE(0.3, "none", "paired")(q, k, negatives))
    loss = InfoNCE(0.3, "none", "paired")
    assert (loss.temperature, loss.reduction, loss.negative_mode) == (0.3, "none", "paired")


@pytest.mark.parametrize("mode", ["unpaired", "paired"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums_in_fp32(dtype, mode):
    q, k = (x.to(dtype) for x in golden_pair())
    negatives = draw(8, 4, 16, seed=3).to(dtype)
    negatives = negatives if mode == "paired" else negatives.flatten(0, 1)
    found, exact = (InfoNCE(negative_mode=mode)(*(x.to(t) for x in (q, k, negatives))) for t in (dtype, torch.float64))
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(exact.item(), rel=5e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature must be positive"),
        ({"reduction": "average"}, "reduction must be one of none, sum, mean, got 'average'"),
        ({"negative_mode": "both"}, "negative_mode must be one of unpaired, paired, got 'both'"),
    ],
)
def test_what_cannot_be_used_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        InfoNCE(**options)


@pytest.mark.parametrize(
    ("mode", "shapes", "message"),
    [
        ("unpaired", [(4, 3), (5, 3)], "query and positive_key must have the same shape"),
        ("unpaired", [(4, 3, 1), (4, 3)], r"query must be \[N, D\]"),
        ("unpaired", [(4, 3), (4, 3), (7, 2)], "query and negative_keys must have the same D"),
        ("unpaired", [(4, 3), (4, 3), (4, 7, 3)], r"negative_keys must be \[N, D\]"),
        ("paired", [(4, 3), (4, 3), (7, 3)], r"paired negative_keys must be \[N, M, D\] = \(4, M > 0, 3\)"),
        ("paired", [(4, 3), (4, 3), (5, 7, 3)], r"paired negative_keys must be \[N, M, D\]"),
        ("paired", [(4, 3), (4, 3), (4, 7, 2)], r"paired negative_keys must be \[N, M, D\]"),
        ("paired", [(4, 3), (4, 3), (4, 0, 3)], "M > 0"),
    ],
)
def test_inputs_that_cannot_be_used_are_named(mode, shapes, message):
    with pytest.raises(ValueError, match=message):
        InfoNCE(negative_mode=mode)(*(draw(*shape) for shape in shapes))
