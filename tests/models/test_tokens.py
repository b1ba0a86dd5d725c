"""Tokens of timm's ViTs against ``forward_features``, with masks and under ZeRO's rule that modules are called."""

import pytest
import timm
import torch

from fasttrain.models.tokens import TokenBackbone

VITS = [
    ("vit_tiny_patch16_224", {"img_size": 32}),
    ("vit_tiny_patch16_224", {"img_size": 64, "dynamic_img_size": True}),
    ("vit_small_patch14_reg4_dinov2", {"img_size": 28, "depth": 2}),
    ("vit_small_patch16_dinov3", {"depth": 2}),
    ("vit_base_patch16_siglip_224", {"img_size": 32, "depth": 2}),
]


def _build(name, options):
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=0, **options).eval()
    return TokenBackbone(network).eval()


@pytest.mark.parametrize(("name", "options"), VITS)
def test_tokens_equal_forward_features(name, options):
    tokens = _build(name, options)
    images = torch.randn(2, 3, options.get("img_size", 32), options.get("img_size", 32))
    with torch.no_grad():
        output, features = tokens(images), tokens.backbone.forward_features(images)
        torch.testing.assert_close(torch.cat([output.prefix, output.patches], dim=1), features)
        torch.testing.assert_close(output.features, tokens.backbone(images))
    assert output.prefix.shape[1] == tokens.backbone.num_prefix_tokens


@pytest.mark.parametrize(("name", "options"), VITS)
def test_mask_hides_the_pixels_of_masked_patches(name, options):
    tokens = _build(name, options)
    side = options.get("img_size", 32)
    images = torch.randn(2, 3, side, side)
    count = tokens(images).patches.shape[1]
    mask = torch.ones(2, count, dtype=torch.bool)
    mask[:, 0] = False
    other = images.clone()
    patch = side // int(count**0.5)
    other[:, :, patch:] += 1  # changes masked patches only
    with torch.no_grad():
        hidden, changed = tokens(images, mask), tokens(other, mask)
        torch.testing.assert_close(hidden.patches, changed.patches)
        assert not torch.equal(tokens(images).patches, hidden.patches)


def test_mask_token_receives_a_gradient():
    tokens = _build(*VITS[0])
    mask = torch.tensor([[True, False, False, False]] * 2)
    tokens(torch.randn(2, 3, 32, 32), mask).patches.square().sum().backward()
    assert tokens.mask_token.grad.abs().sum() > 0


def test_cls_of_a_network_without_one_is_refused():
    tokens = _build(*VITS[-1])
    with pytest.raises(ValueError, match="arch"):
        _ = tokens(torch.randn(1, 3, 32, 32)).cls


def test_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="mask"):
        _build(*VITS[0])(torch.randn(2, 3, 32, 32), torch.ones(2, 9, dtype=torch.bool))


def test_network_without_patches_is_refused():
    with pytest.raises(ValueError, match="arch"):
        TokenBackbone(timm.create_model("resnet18", num_classes=0))
