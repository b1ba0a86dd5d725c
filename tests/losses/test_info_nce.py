import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain.losses import InfoNCELoss
from tests.losses.pairs import draw, golden_pair, gradients, unit, written_info_nce

BACKENDS = ("cpu", "eager")


def _clip(a, b, temperature):
    return (written_info_nce(a, b, temperature) + written_info_nce(b, a, temperature)) / 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.005, 0.1, 1.0])
def test_one_direction(temperature, backend):
    a, b = draw(11, 5, seed=1), draw(11, 5, seed=2)
    actual = gradients(InfoNCELoss(temperature, backend=backend), a, b)
    expected = gradients(lambda q, k: written_info_nce(q, k, temperature), a, b)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
def test_both_directions(temperature, backend):
    a, b = draw(11, 5, seed=1), draw(11, 5, seed=2)
    actual = gradients(InfoNCELoss(temperature, symmetric=True, backend=backend), a, b)
    expected = gradients(lambda q, k: _clip(q, k, temperature), a, b)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_explicit_negatives_replace_the_other_keys(backend):
    a, b, negatives = draw(6, 5, seed=1), draw(6, 5, seed=2), draw(17, 5, seed=3)
    actual = gradients(InfoNCELoss(0.2, backend=backend), a, b, negatives)
    expected = gradients(lambda q, k, m: written_info_nce(q, k, 0.2, unit(m)), a, b, negatives)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 9), st.integers(2, 6), st.floats(0.02, 5), st.integers(0, 999))
def test_info_nce_is_bounded_and_symmetric(batch, dim, temperature, seed):
    a, b = draw(batch, dim, seed=seed), draw(batch, dim, seed=seed + 1)
    one = InfoNCELoss(temperature)(a, b).item()
    # Cosines differ by 2 at most, so the positive is at worst 2 / temperature below each of the others.
    assert -1e-12 <= one <= math.log(batch) + 2 / temperature
    both = InfoNCELoss(temperature, symmetric=True)
    torch.testing.assert_close(both(a, b), both(b, a), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_learnt_temperature_has_the_gradient_of_the_reference(backend, symmetric):
    loss = InfoNCELoss(0.25, symmetric=symmetric, learnable_temperature=True, backend=backend)
    (parameter,) = loss.parameters()
    assert parameter.item() == pytest.approx(math.log(4))
    assert loss.temperature.item() == pytest.approx(0.25)
    value = loss(*golden_pair())
    value.backward()
    exponent = parameter.detach().double().requires_grad_()
    written = (_clip if symmetric else written_info_nce)(*golden_pair(), (-exponent).exp())
    written.backward()
    torch.testing.assert_close(value.double(), written, rtol=1e-6, atol=0)
    torch.testing.assert_close(parameter.grad.double(), exponent.grad, rtol=1e-5, atol=0)


def test_learnt_scale_is_clamped_to_100_with_a_gradient():
    loss = InfoNCELoss(learnable_temperature=True)
    with torch.no_grad():
        loss.logit_scale.fill_(7.0)
    a, b = golden_pair()
    loss(a, b).backward()
    assert loss.logit_scale.item() == pytest.approx(math.log(100))
    assert loss.logit_scale.grad > 0  # too sharp for random pairs; a clamp inside the graph would give 0
