import torch

from fasttrain.losses import SimSiamLoss


def _draw(count=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(6, 5, generator=generator, dtype=dtype).requires_grad_() for _ in range(count)]


def _cosine(a, b):
    return ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean()


def test_equals_the_paper_s_equation_with_its_stopped_gradients():
    p0, p1, z0, z1 = _draw()
    loss = SimSiamLoss()(p0, p1, z0, z1)
    written = -(_cosine(p0, z1.detach()) + _cosine(p1, z0.detach())) / 2
    torch.testing.assert_close(loss, written)
    for actual, expected in zip(
        torch.autograd.grad(loss, (p0, p1), retain_graph=True), torch.autograd.grad(written, (p0, p1)), strict=True
    ):
        torch.testing.assert_close(actual, expected)
    assert torch.autograd.grad(loss, (z0, z1), allow_unused=True) == (None, None)
