"""Attention maps are the network's own attention."""

import pytest
import timm
import torch

from fasttrain.errors import ConfigError
from fasttrain.models.architectures import create_backbone
from fasttrain.report.attention import attention


def _by_hand(network, images):
    """Return softmax(q k^T / sqrt(d)) of the last block, from its weights."""
    x = network.norm_pre(network._pos_embed(network.patch_embed(images)))
    for block in network.blocks[:-1]:
        x = block(x)
    layer = network.blocks[-1].attn
    q, k, _ = layer.qkv(network.blocks[-1].norm1(x)).chunk(3, dim=-1)
    q, k = (t.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2) for t in (q, k))
    return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)


@pytest.mark.parametrize("size", [(32, 32), (32, 48)])
@torch.no_grad()
def test_attention_is_the_softmax_of_the_last_block(size):
    torch.manual_seed(0)
    network = create_backbone("vit_tiny", img_size=32, patch_size=8, drop_path_rate=0.5).train()
    images = torch.randn(2, 3, *size)
    maps = attention(network, images)
    assert network.training
    rows, columns = (side // 8 for side in size)
    whole = _by_hand(network.eval(), images)
    torch.testing.assert_close(maps, whole[:, :, 0, 1:].unflatten(-1, (rows, columns)))


def test_attention_leaves_registers_out_and_restores_the_layer():
    network = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, img_size=28)
    layer = network.blocks[-1].attn
    before = layer.fused_attn
    assert attention(network, torch.randn(1, 3, 28, 28)).shape == (1, 6, 2, 2)
    assert layer.fused_attn == before
    assert not layer.attn_drop._forward_hooks


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet10t", {}),
        ("vit_base_patch16_siglip_224", {"depth": 1}),  # pools its patches by attention
        ("cait_xxs24_224", {"depth": 1}),  # adds [CLS] after the last block
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1)}),
        ("xcit_nano_12_p16_224", {"depth": 1}),  # attention between channels, not patches
        ("test_vit", {"img_size": 224}),  # without attn_drop, see below
    ],
)
def test_attention_refuses_networks_without_it(name, options):
    network = timm.create_model(name, num_classes=0, **options)
    if name == "test_vit":
        del network.blocks[-1].attn.attn_drop
    with pytest.raises(ConfigError, match=r"CLS|does not expose its attention"):
        attention(network, torch.randn(1, 3, 224, 224))
