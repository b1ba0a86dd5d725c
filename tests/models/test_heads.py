import torch
from torch import nn

from fasttrain.models.heads import Prototypes, projection_mlp


def _kinds(head):
    return [type(layer).__name__ for layer in head]


def test_simclr_s_head_ends_in_a_batch_norm_without_shift():
    head = projection_mlp((8, 16, 4), last_norm="scaled")
    assert _kinds(head) == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"]
    assert head[0].bias is None
    assert head[3].bias is None
    assert head[4].weight.requires_grad
    assert not head[4].bias.requires_grad
    assert head[1].bias.requires_grad


def test_simsiam_head_ends_in_batchnorm_without_affine():
    head = projection_mlp((8, 16, 16, 4), last_norm="plain")
    assert _kinds(head)[-2:] == ["Linear", "BatchNorm1d"]
    assert head[-1].weight is None
    assert head[-1].bias is None


def test_dino_s_head_has_gelu_and_biases_and_no_batch_norm():
    head = projection_mlp((8, 16, 16, 4), batch_norm=False, activation=nn.GELU)
    assert _kinds(head) == ["Linear", "GELU", "Linear", "GELU", "Linear"]
    assert all(layer.bias is not None for layer in head if isinstance(layer, nn.Linear))


def test_prototypes_have_unit_norm_whatever_the_weight():
    prototypes = Prototypes(5, 7)
    with torch.no_grad():
        prototypes.weight.mul_(3)
    torch.testing.assert_close(prototypes().norm(dim=1), torch.ones(7))


def test_learned_norms_start_at_one_and_scale_the_rows():
    prototypes = Prototypes(5, 7, learn_norm=True)
    torch.testing.assert_close(prototypes().norm(dim=1), torch.ones(7))
    with torch.no_grad():
        prototypes.norm[2] = 4
    assert torch.isclose(prototypes().norm(dim=1)[2], torch.tensor(4.0))


def test_a_unit_norm_row_gets_only_the_tangential_gradient():
    prototypes = Prototypes(5, 7)
    (prototypes() * torch.randn(7, 5)).sum().backward()
    radial = (prototypes.weight.grad * prototypes.weight).sum(1)
    torch.testing.assert_close(radial, torch.zeros(7), atol=1e-5, rtol=0)
