import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain.losses import NTXentLoss
from tests.losses.pairs import draw, golden_pair, gradients, unit, written_info_nce, written_nt_xent


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("temperature", [0.02, 0.07, 2.0])
def test_nt_xent_equals_the_cross_entropy_reference(temperature, backend):
    a, b = draw(13, 6, seed=1) * 3, draw(13, 6, seed=2)
    actual = gradients(NTXentLoss(temperature, backend=backend), a, b)
    expected = gradients(lambda x, y: written_nt_xent(x, y, temperature), a, b)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@settings(deadline=None, max_examples=25)
@given(
    batch=st.integers(1, 9),
    dim=st.integers(2, 7),
    temperature=st.floats(0.03, 3),
    scale=st.floats(1e-3, 1e3),
    seed=st.integers(0, 999),
)
def test_order_and_norms_do_not_change_the_loss(batch, dim, temperature, scale, seed):
    a, b = draw(batch, dim, seed=seed), draw(batch, dim, seed=seed + 1)
    loss = NTXentLoss(temperature)
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(loss(scale * b[order], a[order]), loss(a, b), rtol=1e-9, atol=1e-10)


def test_with_a_bank_the_first_view_is_the_only_anchor():
    torch.manual_seed(0)
    loss = NTXentLoss(0.2, (20, 16))
    bank = loss.memory_bank.bank.double()
    actual = gradients(loss, *golden_pair())
    expected = gradients(lambda a, b: written_info_nce(a, b, 0.2, bank), *golden_pair())
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def test_the_second_view_enters_the_bank_after_the_loss():
    loss = NTXentLoss(memory_bank_size=[20, 16])
    a, b = golden_pair()
    values = [loss(a.requires_grad_(), b).item() for _ in range(2)]
    assert values[0] != values[1]
    assert loss.memory_bank.bank_ptr.item() == 16
    torch.testing.assert_close(loss.memory_bank.bank[:16], unit(torch.cat([b, b])).float())


def test_bank_changes_only_if_the_first_view_has_a_gradient():
    loss = NTXentLoss(memory_bank_size=(20, 16))
    before = loss.memory_bank.bank.clone()
    a, b = golden_pair()
    loss(a, b.requires_grad_())
    with torch.no_grad():
        loss(a.clone().requires_grad_(), b)
    assert torch.equal(loss.memory_bank.bank, before)
    loss(a.requires_grad_(), b)
    assert not torch.equal(loss.memory_bank.bank, before)


def test_a_refused_batch_leaves_the_bank_alone():
    loss = NTXentLoss(memory_bank_size=(20, 15))
    with pytest.raises(ValueError, match="same D"):
        loss(*(x.requires_grad_() for x in golden_pair()))
    assert loss.memory_bank.bank_ptr.item() == 0


def test_attributes_and_their_change():
    loss = NTXentLoss(0.3, (4, 16), False)
    assert (loss.temperature, loss.gather_distributed, loss.eps) == (0.3, False, 1e-8)
    assert loss.memory_bank.size == (4, 16)
    plain = NTXentLoss()
    plain.temperature = 0.1
    assert plain(*golden_pair()).item() == pytest.approx(4.97905201050417, rel=1e-12)
