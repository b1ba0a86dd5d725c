import torch

from fasttrain.losses import InstanceBank
from tests.losses.pairs import draw, unit


def test_update_moves_rows_on_the_sphere():
    memory = InstanceBank(10, 4, momentum=0.75)
    before = memory.bank.clone()
    index = torch.tensor([7, 0, 3])
    z = [unit(draw(3, 4, seed=seed)).requires_grad_() for seed in range(2)]
    memory.update(index, z)
    for view in range(2):
        expected = unit(0.75 * before[view, index] + 0.25 * z[view].float())
        torch.testing.assert_close(memory.bank[view, index], expected.detach())
    rest = torch.tensor([1, 2, 4, 5, 6, 8, 9])
    assert torch.equal(memory.bank[:, rest], before[:, rest])
    assert not memory.bank.requires_grad


def test_reading_is_by_image_and_a_copy():
    memory = InstanceBank(5, 3, views=3)
    rows = memory(torch.tensor([4, 1]))
    assert torch.equal(rows, memory.bank[:, [4, 1]])
    rows.zero_()
    assert memory.bank.abs().min() > 0


def test_draw_takes_equal_images_in_all_views_and_follows_the_seed():
    memory = InstanceBank(50, 4)
    torch.manual_seed(3)
    drawn = memory.draw(30)
    torch.manual_seed(3)
    assert torch.equal(drawn, memory(torch.randint(50, (30,))))
    assert not torch.equal(memory.draw(30), drawn)
