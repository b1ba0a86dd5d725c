"""Tokens of timm's ViTs against ``forward_features``, with masks and under ZeRO's rule that modules are called."""

import pytest
import timm
import torch

from fasttrain.models.architectures import create_backbone
from fasttrain.models.tokens import MaskToken, check_tokens, patch_grid, patch_width, tokens_of

VITS = [
    ("vit_tiny_patch16_224", {"img_size": 32}),
    ("vit_tiny_patch16_224", {"img_size": 64, "dynamic_img_size": True}),
    ("vit_small_patch14_reg4_dinov2", {"img_size": 28, "depth": 2}),
    ("vit_giant_patch14_reg4_dinov2", {"img_size": 28, "depth": 2, "embed_dim": 96, "num_heads": 2}),  # SwiGLU
    ("vit_small_patch16_dinov3", {"depth": 2}),  # RoPE
    ("vit_base_patch16_siglip_224", {"img_size": 32, "depth": 2}),  # pooled by attention
    ("vit_base_patch16_clip_quickgelu_224", {"img_size": 32, "depth": 2, "global_pool": "avg"}),
]


def _build(name, options):
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=0, **options).eval()
    check_tokens(network)
    mask_token = MaskToken(patch_width(network))
    torch.nn.init.normal_(mask_token.weight)
    return network, mask_token


def _images(options, count=2):
    return torch.randn(count, 3, options.get("img_size", 32), options.get("img_size", 32))


@pytest.mark.parametrize(("name", "options"), VITS)
def test_tokens_equal_forward_features(name, options):
    network, _ = _build(name, options)
    images = _images(options)
    with torch.no_grad():
        output, features = tokens_of(network, images), network.forward_features(images)
        torch.testing.assert_close(torch.cat([output.prefix, output.patches], dim=1), features)
        torch.testing.assert_close(output.features, network(images))
    rows, columns = patch_grid(network, images.shape[-1])
    assert output.prefix.shape[1] == network.num_prefix_tokens
    assert output.patches.shape[1] == rows * columns


@pytest.mark.parametrize(("name", "options"), VITS)
def test_mask_hides_the_pixels_of_masked_patches(name, options):
    network, mask_token = _build(name, options)
    images = _images(options)
    count = tokens_of(network, images).patches.shape[1]
    mask = torch.ones(2, count, dtype=torch.bool)
    mask[:, 0] = False
    other = images.clone()
    patch = images.shape[-1] // int(count**0.5)
    other[:, :, patch:] += 1  # changes masked patches only
    with torch.no_grad():
        hidden, changed = (tokens_of(network, x, mask=mask, mask_token=mask_token) for x in (images, other))
        torch.testing.assert_close(hidden.patches, changed.patches)
        assert not torch.equal(tokens_of(network, images).patches, hidden.patches)


def test_mask_token_receives_a_gradient_also_without_a_mask():
    network, mask_token = _build(*VITS[0])
    for mask in (torch.tensor([[True, False, False, False]] * 2), torch.zeros(2, 4, dtype=torch.bool)):
        mask_token.zero_grad()
        tokens = tokens_of(network, torch.randn(2, 3, 32, 32), mask=mask, mask_token=mask_token)
        tokens.patches.square().sum().backward()
        assert (mask_token.weight.grad.abs().sum() > 0) == mask.any()


def test_mask_of_another_shape_is_refused():
    network, mask_token = _build(*VITS[0])
    with pytest.raises(ValueError, match="mask"):
        tokens_of(network, torch.randn(2, 3, 32, 32), mask=torch.ones(2, 9, dtype=torch.bool), mask_token=mask_token)


@pytest.mark.parametrize("arch", ["conv_small", "resnet18", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_network_without_patch_tokens_is_refused_by_flag(arch):
    with pytest.raises(ValueError, match="^--arch: .*ViT"):
        check_tokens(create_backbone(arch))
