import pytest
import torch

from fasttrain.losses import MoCoLoss, MoCoV3Loss
from tests.losses.pairs import draw, golden_pair, gradients, unit, written_info_nce


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_queries_meet_their_key_and_the_queue(backend):
    loss = MoCoLoss(0.07, (24, 16), backend=backend)
    queue = loss.memory_bank.bank.double()
    a, b = golden_pair()
    actual = gradients(lambda q: loss(q, b), a)
    expected = gradients(lambda q: written_info_nce(q, b, 0.07, queue), a)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def test_keys_get_no_gradient_and_are_enqueued_in_order():
    loss = MoCoLoss(memory_bank_size=(16, 16))
    keys = [draw(8, 16, seed=seed).requires_grad_() for seed in range(3)]
    for key in keys:
        loss(draw(8, 16).requires_grad_(), key).backward()
        assert key.grad is None
    assert loss.memory_bank.bank_ptr.item() == 8
    torch.testing.assert_close(loss.memory_bank.bank, unit(torch.cat([keys[2], keys[1]]).detach()).float())


def test_a_batch_s_own_keys_are_no_negatives():
    loss = MoCoLoss(memory_bank_size=(8, 16))
    queue = loss.memory_bank.bank.double()
    a, b = golden_pair()
    torch.testing.assert_close(loss(a.requires_grad_(), b), written_info_nce(a, b, 0.07, queue))
    assert torch.equal(loss.memory_bank.bank, unit(b).float())


def test_evaluation_leaves_the_queue_alone_and_takes_any_batch():
    loss = MoCoLoss(memory_bank_size=(16, 16))
    before = loss.memory_bank.bank.clone()
    with torch.no_grad():
        loss(draw(5, 16), draw(5, 16, seed=1))
    assert torch.equal(loss.memory_bank.bank, before)


def test_batch_that_does_not_divide_the_queue_is_refused():
    loss = MoCoLoss(memory_bank_size=(16, 4))
    before = loss.memory_bank.bank.clone()
    with pytest.raises(ValueError, match="memory_bank_size.*got 16.*batch of 5"):
        loss(draw(5, 4).requires_grad_(), draw(5, 4))
    assert torch.equal(loss.memory_bank.bank, before)


@pytest.mark.parametrize("temperature", [0.2, 1.0])
@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_v3_crosses_the_views_with_factor_two_temperature(temperature, backend):
    q0, q1, k0, k1 = (draw(9, 5, seed=seed) for seed in range(4))
    loss = MoCoV3Loss(temperature, backend=backend)

    def written(a, b):
        return 2 * temperature * (written_info_nce(a, k1, temperature) + written_info_nce(b, k0, temperature))

    actual = gradients(lambda a, b: loss(a, b, k0, k1), q0, q1)
    torch.testing.assert_close(actual, gradients(written, q0, q1), rtol=1e-9, atol=1e-11)


def test_v3_s_keys_get_no_gradient_and_there_is_nothing_to_save():
    q, k = draw(4, 3).requires_grad_(), draw(4, 3, seed=1).requires_grad_()
    loss = MoCoV3Loss()
    loss(q, q, k, k).backward()
    assert k.grad is None
    assert q.grad.abs().sum() > 0
    assert loss.state_dict() == {}
