"""Colours of patches are principal components of the network's own patch features."""

import pytest
import timm
import torch
from torch import nn

from fasttrain.errors import ConfigError
from fasttrain.models.architectures import create_backbone
from fasttrain.report.patches import components, patch_features


@torch.no_grad()
def test_features_of_a_vit_are_its_last_tokens_without_registers():
    network = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, img_size=28, depth=2).train()
    images = torch.randn(2, 3, 28, 28)
    features = patch_features(network, images)
    assert network.training
    tokens = network.eval().forward_features(images)[:, 5:]
    torch.testing.assert_close(features, tokens.mT.unflatten(-1, (2, 2)))


@pytest.mark.parametrize("name", ["resnet10t", "test_convnext"])
def test_convolutional_networks_have_places_too(name):
    network = timm.create_model(name, num_classes=0)
    assert patch_features(network, torch.randn(1, 3, 64, 64)).shape[2:] == (2, 2)


@pytest.mark.parametrize(
    ("network", "side", "message"),
    [
        (create_backbone("conv_small", img_size=28), 28, "ConvSmall does not return"),
        (timm.create_model("resnet10t", num_classes=0), 32, "only 1 patches"),
        (nn.Identity(), 28, "Identity does not return"),
    ],
)
def test_networks_without_patches_are_refused(network, side, message):
    with pytest.raises(ConfigError, match=message):
        patch_features(network, torch.randn(1, 3, side, side))


def test_components_follow_the_directions_of_largest_variance():
    """The first direction separates two kinds of patches, so its colour does too."""
    torch.manual_seed(0)
    kinds = torch.tensor([[0, 1], [1, 0]]).repeat(4, 3, 3)
    features = 0.1 * torch.randn(4, 8, 6, 6)
    features[:, 2] += 5 * kinds
    features[:, 5] += 2 * torch.arange(4)[:, None, None]
    shades = components(features)
    assert shades.shape == (4, 3, 6, 6)
    assert shades.min() == 0
    assert shades.max() == 1
    first = shades[:, 0]
    assert (first[kinds == 1] - 1).abs().max() < 0.2
    assert first[kinds == 0].max() < 0.2


def test_equal_patches_have_one_colour():
    assert components(torch.ones(1, 4, 2, 2)).unique().tolist() == [0]
