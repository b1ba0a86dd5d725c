"""Attention maps are those that the network computes."""

import pytest
import timm
import torch

from fasttrain.errors import ConfigError
from fasttrain.models.architectures import create_backbone
from fasttrain.report.attention import attention


def _by_hand(network, images):
    """softmax(q k^T / sqrt(d)) of the last block, from its weights."""
    x = network.patch_embed(images)
    x = network.norm_pre(network._pos_embed(x))
    for block in network.blocks[:-1]:
        x = block(x)
    layer = network.blocks[-1].attn
    q, k, _ = layer.qkv(network.blocks[-1].norm1(x)).chunk(3, dim=-1)
    q, k = (t.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2) for t in (q, k))
    return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)


@pytest.mark.parametrize("size", [(32, 32), (32, 48)])
@torch.no_grad()
def test_it_is_the_softmax_of_the_last_block(size):
    torch.manual_seed(0)
    network = create_backbone("vit_tiny", img_size=32, patch_size=8, drop_path_rate=0.5).train()
    images = torch.randn(2, 3, *size)
    found = attention(network, images)
    assert network.training
    rows, columns = (side // 8 for side in size)
    assert found.shape == (2, 3, rows, columns)
    whole = _by_hand(network.eval(), images)
    torch.testing.assert_close(found, whole[:, :, 0, 1:].unflatten(-1, (rows, columns)))
    torch.testing.assert_close(found.sum((-1, -2)), 1 - whole[:, :, 0, 0])


def test_registers_are_no_patches_and_the_network_stays_as_it_was():
    network = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, img_size=28)
    before = network.blocks[-1].attn.fused_attn
    assert attention(network, torch.randn(1, 3, 28, 28)).shape == (1, 6, 2, 2)
    assert network.blocks[-1].attn.fused_attn == before
    assert not network.blocks[-1].attn.attn_drop._forward_hooks


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet10t", {}),
        ("vit_base_patch16_siglip_224", {"depth": 1}),  # pools its patches by attention
        ("cait_xxs24_224", {"depth": 1}),  # [CLS] joins after the last block
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1)}),
        ("xcit_nano_12_p16_224", {"depth": 1}),  # attention of channels, not of patches
    ],
)
def test_networks_without_such_a_token_are_refused(name, options):
    network = timm.create_model(name, num_classes=0, **options)
    with pytest.raises(ConfigError, match=r"CLS|keeps its attention"):
        attention(network, torch.randn(1, 3, 224, 224))


def test_a_layer_that_keeps_its_attention_to_itself_is_refused():
    network = timm.create_model("test_vit", num_classes=0)
    del network.blocks[-1].attn.attn_drop
    with pytest.raises(ConfigError, match="VisionTransformer keeps its attention to itself"):
        attention(network, torch.randn(1, 3, 160, 160))
