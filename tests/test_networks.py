import pytest
import torch

from fasttrain.networks import (
    checkpoint_activations,
    create_backbone,
    fix_patch_embedding,
    is_vit,
    sincos_positions,
)


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


def _vit():
    torch.manual_seed(0)
    return create_backbone("vit_tiny", img_size=32, patch_size=8)


def test_positions_are_sines_and_cosines_of_column_and_row():
    table = sincos_positions((2, 3), 8)
    rate = torch.tensor([1.0, 10000**-0.5])
    for position, (row, column) in enumerate((r, c) for r in range(2) for c in range(3)):
        angles = [column * rate, row * rate]
        written = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)])
        torch.testing.assert_close(table[position], written)


def test_a_fixed_patch_embedding_is_not_trained_and_its_class_token_has_position_0():
    vit = _vit()
    fix_patch_embedding(vit, projection=True)
    frozen = {name for name, p in vit.named_parameters() if not p.requires_grad}
    assert frozen == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert not vit.pos_embed[0, 0].any()
    torch.testing.assert_close(vit.pos_embed[0, 1:], sincos_positions((4, 4), 192))
    vit = _vit()
    fix_patch_embedding(vit, projection=False)
    assert {name for name, p in vit.named_parameters() if not p.requires_grad} == {"pos_embed"}


def test_queries_keys_and_values_start_as_matrices_of_their_own():
    vit = _vit()
    fix_patch_embedding(vit, projection=True)
    bound = (6 / (192 + 192)) ** 0.5
    for part in vit.blocks[0].attn.qkv.weight.chunk(3):
        assert part.abs().max() <= bound
        assert part.abs().max() > 0.95 * bound


def test_the_number_of_heads_can_be_chosen():
    assert create_backbone("vit_tiny", img_size=32, patch_size=8, num_heads=6).blocks[0].attn.num_heads == 6


def test_only_vits_are_vits():
    assert is_vit(_vit())
    assert not is_vit(create_backbone("conv_small"))
    assert not is_vit(create_backbone("resnet18"))


def test_checkpointed_activations_give_the_same_gradients_and_keep_less():
    found = []
    for checkpointing in (False, True):
        vit = _vit()
        if checkpointing:
            checkpoint_activations(vit)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):  # noqa: B023
            loss = vit(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))).square().sum()
        loss.backward()
        found.append(([p.grad for p in vit.parameters()], sum(kept)))
    for plain, again in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(again, plain)
    assert found[1][1] < found[0][1] / 4


@pytest.mark.parametrize("arch", ["resnet18", "conv_small"])
def test_batch_norm_is_not_recomputed(arch):
    with pytest.raises(ValueError, match="would count BatchNorm's statistics twice"):
        checkpoint_activations(create_backbone(arch))


def test_a_network_that_keeps_all_activations_is_refused():
    with pytest.raises(ValueError, match="Linear cannot checkpoint its activations; take a ViT"):
        checkpoint_activations(torch.nn.Linear(2, 2))
