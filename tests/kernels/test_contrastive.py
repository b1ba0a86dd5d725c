import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, normalize

from fasttrain.kernels import bidirectional_logsumexp, info_nce, nt_xent


def _golden_pair():
    """The pair of the published golden values: seed 0, two draws of randn(8, 16) in fp64."""
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(8, 16, generator=generator, dtype=torch.float64) for _ in range(2)]
    return [normalize(x, dim=1) for x in draw]


@pytest.mark.parametrize(("temperature", "expected"), [(0.5, 2.8516984563063827), (0.1, 4.97905201050417)])
def test_equals_lightly_1_6(temperature, expected):
    # Values of lightly 1.6.0's NTXentLoss on the same input.
    assert nt_xent(*_golden_pair(), temperature=temperature).item() == pytest.approx(expected, rel=1e-12)


def test_equals_cross_entropy_over_the_other_rows():
    z0, z1 = _golden_pair()
    z = torch.cat([z0, z1])
    scores = (z @ z.T / 0.2).fill_diagonal_(-torch.inf)
    targets = torch.arange(16).roll(8)
    torch.testing.assert_close(nt_xent(z0, z1, temperature=0.2), cross_entropy(scores, targets))


def test_gradients_pass_gradcheck():
    z0, z1 = (z[:3, :4].clone().requires_grad_() for z in _golden_pair())
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, temperature=0.3), (z0, z1))


def test_info_nce_equals_info_nce_pytorch():
    # Value of info-nce-pytorch 0.1.4's InfoNCE on the same input: one direction, no negatives of the same view.
    assert info_nce(*_golden_pair(), temperature=0.1).item() == pytest.approx(3.6847536887636574, rel=1e-12)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 20), st.floats(0.02, 2.0))
def test_both_directions_of_info_nce_are_one_bidirectional_pass(rows, temperature):
    q, k = (normalize(torch.randn(rows, 5, dtype=torch.float64), dim=1) for _ in range(2))
    both = info_nce(q, k, temperature=temperature) + info_nce(k, q, temperature=temperature)
    of_rows, of_columns = bidirectional_logsumexp(q, k, scale=1 / temperature)
    expected = of_rows.mean() + of_columns.mean() - 2 * (q * k).sum(1).mean() / temperature
    torch.testing.assert_close(both, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("in_batch", [False, True])
def test_a_queue_equals_cross_entropy_over_its_rows(in_batch):
    q, k = _golden_pair()
    queue = normalize(torch.randn(11, 16, dtype=torch.float64), dim=1)
    positives = (q * k).sum(1, keepdim=True)
    negatives = [q @ queue.T]
    if in_batch:
        others = (q @ k.T).masked_fill(torch.eye(8, dtype=torch.bool), -torch.inf)
        negatives.append(others)
    logits = torch.cat([positives, *negatives], dim=1) / 0.2
    expected = cross_entropy(logits, torch.zeros(8, dtype=torch.long))
    got = info_nce(q, k, queue, temperature=0.2, in_batch=in_batch)
    torch.testing.assert_close(got, expected)
    assert in_batch or torch.equal(got, info_nce(q, k, queue, temperature=0.2))  # the queue alone is the default


def test_the_gradient_reaches_query_key_queue_and_temperature():
    tensors = [z[:4, :5].clone().requires_grad_() for z in (*_golden_pair(), _golden_pair()[0])]
    temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    loss = lambda q, k, queue, t: info_nce(q, k, queue, temperature=t, in_batch=True)  # noqa: E731
    assert torch.autograd.gradcheck(loss, (*tensors, temperature))
    assert torch.autograd.gradcheck(lambda a, b, _, t: nt_xent(a, b, temperature=t), (*tensors, temperature))


@pytest.mark.parametrize("backend", ["cpu", "triton", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_backend_and_type_agrees(backend, dtype):
    pair = [z.to(dtype) for z in _golden_pair()]
    for loss in (nt_xent, info_nce):
        if backend == "eager" and dtype != torch.float32:
            continue  # the plain form works in the type that it is given
        got = loss(*pair, temperature=0.1, backend=backend)
        assert got.dtype == torch.float32
        expected = loss(*(z.double() for z in pair), temperature=0.1, backend="eager")
        torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=2e-6)


def test_rows_that_break_the_promise_of_unit_norm_still_get_their_own_loss():
    """Raw projections by mistake: a wrong choice of shift would overflow."""
    z0, z1 = (30 * z.float() for z in _golden_pair())
    got = nt_xent(z0, z1, temperature=0.1)
    torch.testing.assert_close(got.double(), nt_xent(z0.double(), z1.double(), temperature=0.1, backend="eager"))


@pytest.mark.parametrize("loss", [nt_xent, info_nce])
@pytest.mark.parametrize(
    ("shapes", "temperature", "message"),
    [
        (((3, 4), (4, 4)), 0.1, r"must have the same shape, got \(3, 4\) and \(4, 4\)"),
        (((0, 4), (0, 4)), 0.1, r"must be \[N, D\] with N >= 1 and D >= 1, got \(0, 4\)"),
        (((3, 0), (3, 0)), 0.1, r"D >= 1, got \(3, 0\)"),
        (((3, 4), (3, 4)), 0.0, "temperature must be positive and finite, got 0"),
        (((3, 4), (3, 4)), -0.1, "temperature must be positive and finite, got -0.1"),
        (((3, 4), (3, 4)), math.nan, "temperature must be positive and finite, got nan"),
    ],
)
def test_what_does_not_fit_is_named(loss, shapes, temperature, message):
    with pytest.raises(ValueError, match=message):
        loss(*(torch.ones(shape) for shape in shapes), temperature=temperature)


def test_info_nce_without_negatives_or_with_another_queue_is_refused():
    q, k = _golden_pair()
    with pytest.raises(ValueError, match="no negatives"):
        info_nce(q, k, temperature=0.1, in_batch=False)
    with pytest.raises(ValueError, match=r"q and queue must have the same D, got \(8, 16\) and \(5, 3\)"):
        info_nce(q, k, torch.ones(5, 3, dtype=torch.float64), temperature=0.1)
