import pytest
import torch

from fasttrain.networks import create_backbone


@pytest.mark.parametrize(
    ("arch", "options", "sizes"),
    [
        ("conv_small", {"in_chans": 1, "img_size": 28}, (28, 20)),
        ("vit_tiny", {"in_chans": 1, "img_size": 28, "patch_size": 7}, (28, 14)),
        ("resnet18", {"img_size": 32}, (32, 24)),
        ("resnet18", {"img_size": 96}, (96, 64)),
    ],
)
def test_gives_features_at_every_crop_size(arch, options, sizes):
    network = create_backbone(arch, **options).eval()
    for size in sizes:
        features = network(torch.randn(2, options.get("in_chans", 3), size, size))
        assert features.shape == (2, network.num_features)


def test_small_images_keep_their_resolution_through_a_resnet_s_stem():
    assert create_backbone("resnet18", img_size=32).conv1.stride == (1, 1)
    assert create_backbone("resnet18", img_size=224).conv1.stride == (2, 2)


def test_dino_s_names_and_timm_s_give_the_same_network():
    ours = create_backbone("vit_tiny", img_size=32, patch_size=8).state_dict()
    timms = create_backbone("vit_tiny_patch16_224", img_size=32, patch_size=8).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in timms.items()}


@pytest.mark.parametrize(
    ("arch", "options", "message"),
    [
        ("vit_smal", {}, "network 'vit_smal' is unknown; did you mean .*vit_small"),
        ("vit_tiny", {"img_size": 28, "patch_size": 16}, "patch_size 16 does not divide the image of 28 pixels"),
        ("vgg11", {"drop_path_rate": 0.1}, "network 'vgg11' cannot be built"),
    ],
)
def test_what_cannot_be_built_is_named(arch, options, message):
    with pytest.raises(ValueError, match=message):
        create_backbone(arch, **options)
