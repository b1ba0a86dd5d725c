import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain.losses import MemoryBankModule
from tests.losses.pairs import draw


def test_the_first_rows_are_random_and_of_unit_norm():
    bank = MemoryBankModule((20, 5)).bank
    assert bank.shape == (20, 5)
    torch.testing.assert_close(bank.norm(dim=1), torch.ones(20))
    assert bank.std() > 0.1


def test_size_zero_has_no_bank_and_no_state():
    module = MemoryBankModule(0)
    output = draw(3, 4)
    same, bank = module(output, update=True)
    assert same is output
    assert bank is None
    assert module.state_dict() == {}
    assert MemoryBankModule((0, 8))(output, update=True)[1] is None


def test_the_pointer_of_lightly():
    module = MemoryBankModule((20, 3), feature_dim_first=False)
    actual = []
    for seed in range(4):
        actual.append(module.bank_ptr.item())
        module(draw(8, 3, seed=seed), update=True)
    assert actual == [0, 8, 16, 0]
    # The third batch filled the last 4 rows and lost 4 of its own; the fourth began at the front.
    expected = torch.cat([draw(8, 3, seed=3), draw(8, 3, seed=1), draw(8, 3, seed=2)[:4]])
    torch.testing.assert_close(module.bank, expected.float())


@settings(deadline=None, max_examples=50)
@given(size=st.integers(1, 12), batches=st.lists(st.integers(1, 15), min_size=1, max_size=8))
def test_any_batches_fill_it_as_slices_would(size, batches):
    module = MemoryBankModule((size, 1))
    rows, pointer, value = module.bank[:, 0].tolist(), 0, 0.0
    for count in batches:
        batch = torch.arange(value, value + count)
        value += count
        module(batch[:, None], update=True)
        room = min(count, size - pointer)
        rows[pointer : pointer + room] = batch[:room].tolist()
        pointer = 0 if pointer + count >= size else pointer + count
        assert module.bank[:, 0].tolist() == rows
        assert module.bank_ptr.tolist() == [pointer]


def test_bank_returns_old_rows_and_changes_on_update_only():
    module = MemoryBankModule((6, 4))
    before = module.bank.clone()
    _, bank = module(draw(6, 4), update=True)
    assert bank.shape == (4, 6)
    assert torch.equal(bank, before.T)
    assert not torch.equal(module.bank, before)
    after = module.bank.clone()
    _, bank = module(draw(6, 4, seed=1))
    assert torch.equal(bank.T, after)
    assert torch.equal(module.bank, after)


def test_backward_after_the_enqueue_sees_the_old_rows():
    module = MemoryBankModule((4, 3), feature_dim_first=False)
    x = draw(4, 3, dtype=torch.float32).requires_grad_()
    output, bank = module(x, update=True)
    before = bank.clone()
    (output @ bank.T).sum().backward()
    torch.testing.assert_close(x.grad, before.sum(0).expand(4, 3))
    assert not module.bank.requires_grad
