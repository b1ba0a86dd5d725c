import torch
from torch.nn.functional import normalize

from fasttrain.losses import BYOLLoss


def test_byol_equals_squared_distances_of_unit_rows():
    generator = torch.Generator().manual_seed(0)
    p0, p1, t0, t1 = (torch.randn(6, 5, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(4))
    loss = BYOLLoss()(p0, p1, t0, t1)

    def distance(p, t):
        return (normalize(p, dim=1) - normalize(t.detach(), dim=1)).square().sum(1).mean()

    written = distance(p0, t1) + distance(p1, t0)
    torch.testing.assert_close(loss, written)
    for actual, expected in zip(
        torch.autograd.grad(loss, (p0, p1), retain_graph=True), torch.autograd.grad(written, (p0, p1)), strict=True
    ):
        torch.testing.assert_close(actual, expected)
    assert torch.autograd.grad(loss, (t0, t1), allow_unused=True) == (None, None)


def test_lies_between_0_and_8():
    p = torch.eye(3)
    assert BYOLLoss()(p, p, p, p).item() == 0
    assert BYOLLoss()(p, p, -p, -p).item() == 8
