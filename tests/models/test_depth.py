"""The depth of a network's parameters."""

import pytest
import timm
from torch import nn

from fasttrain.models.architectures import create_backbone
from fasttrain.models.depth import depths

_VIT = {"depth": 2, "embed_dim": 16, "num_heads": 2, "img_size": 16, "patch_size": 8, "num_classes": 0}


@pytest.mark.parametrize(
    "network",
    [
        timm.create_model("vit_tiny_patch16_224", **_VIT),
        timm.create_model("vit_small_patch14_reg4_dinov2", **_VIT),
        timm.create_model("vit_small_patch16_dinov3", **_VIT),
        timm.create_model("vit_tiny_patch16_224", **_VIT, global_pool="avg", fc_norm=True),
    ],
    ids=["vit", "registers", "rope", "pooled"],
)
def test_depth_of_a_vit_counts_blocks_from_the_output(network):
    """timm takes registers for a part of the head, which would also move every block by one."""
    for name, depth in depths(network).items():
        block = name.startswith("blocks.") and 2 - int(name.split(".")[1])
        assert depth == (block or (0 if "norm" in name.split(".")[0] else 3)), name


def test_tokens_around_a_network_are_its_first_layer():
    inner = create_backbone("conv_small", img_size=28)
    outer = nn.Module()
    outer.mask_token, outer.backbone = nn.Parameter(inner.layers[0].conv.weight[0, 0, 0]), inner
    depth_of = depths(outer)
    assert [depth_of[f"backbone.layers.{i}.conv.weight"] for i in range(5)] == [5, 4, 3, 2, 1]
    assert depth_of["mask_token"] == 5


def test_network_without_named_layers_is_refused():
    with pytest.raises(ValueError, match="--layer_decay: Linear does not name its layers"):
        depths(nn.Linear(2, 2))
