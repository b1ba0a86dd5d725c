"""Gram anchoring, with its matrices written out."""

import pytest
import torch
from torch.nn.functional import mse_loss, normalize

from fasttrain.kernels import gram
from fasttrain.losses import GramLoss


def _patches(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _written(x, target, *, norm, removed):
    if norm:
        x, target = normalize(x, dim=-1), normalize(target, dim=-1)
    own, fixed = x @ x.mT, target @ target.mT
    if removed == "all":
        own, fixed = own.clamp(min=0), fixed.clamp(min=0)
    elif removed == "teacher":
        own, fixed = own.masked_fill((own < 0) & (fixed < 0), 0), fixed.clamp(min=0)
    return mse_loss(own, fixed)


@pytest.mark.parametrize("most", [1 << 22, 60, 20], ids=["all", "image by image", "row by row"])
@pytest.mark.parametrize("removed", ["all", "teacher", "none"])
@pytest.mark.parametrize("per_image", [True, False])
def test_equals_the_written_matrices(most, removed, per_image, monkeypatch):
    monkeypatch.setattr(gram, "_MOST_ELEMENTS", most)
    x, target = _patches(3, 7, 5).requires_grad_(), _patches(3, 7, 4, seed=1)
    loss = GramLoss(remove_neg=removed == "all", remove_only_teacher_neg=removed == "teacher", img_level=per_image)
    actual = loss(x, target)
    both = (x, target) if per_image else (x.flatten(0, 1), target.flatten(0, 1))
    expected = _written(*both, norm=True, removed=removed)
    torch.testing.assert_close(actual, expected)
    gradients = [torch.autograd.grad(3 * value, x)[0] for value in (actual, expected)]
    torch.testing.assert_close(*gradients)


def test_products_without_norm_and_target_without_gradient():
    x, target = _patches(2, 4, 3).requires_grad_(), _patches(2, 4, 3, seed=1).requires_grad_()
    loss = GramLoss(apply_norm=False, remove_neg=False)(x, target)
    torch.testing.assert_close(loss, _written(x, target, norm=False, removed="none"))
    loss.backward()
    assert target.grad is None


def test_the_same_patches_have_no_loss_and_no_gradient():
    x = _patches(2, 6, 4).requires_grad_()
    loss = GramLoss()(x, x.detach())
    loss.backward()
    assert loss.item() == 0
    assert x.grad.abs().max() == 0


def test_wrong_shapes_and_options_are_named():
    with pytest.raises(ValueError, match="give one of them"):
        GramLoss(remove_only_teacher_neg=True)
    with pytest.raises(ValueError, match=r"output_feats .*\(4, 3\)"):
        GramLoss()(_patches(4, 3), _patches(4, 3))
    with pytest.raises(ValueError, match="x and target"):
        GramLoss()(_patches(2, 4, 3), _patches(2, 5, 3))
