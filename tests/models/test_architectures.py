import pytest
import torch

from fasttrain.cli import main
from fasttrain.models.architectures import (
    check_crops,
    checkpoint_activations,
    create_backbone,
    fix_patch_embedding,
    is_vit,
    sincos_positions,
)
from fasttrain.pretrained import from_run
from tests.small_runs import train_few_steps


@pytest.mark.parametrize(
    ("arch", "options", "sizes"),
    [
        ("conv_small", {"in_chans": 1, "img_size": 28}, (28, 20)),
        ("vit_tiny", {"in_chans": 1, "img_size": 28, "patch_size": 7}, (28, 14)),
        ("vit_small_patch8_224", {"img_size": 32}, (32, 24)),
        ("vit_tiny_r_s16_p8_224", {"img_size": 64}, (64,)),
        ("resnet18", {"img_size": 32}, (32, 24)),
        ("resnet18", {"img_size": 96}, (96, 64)),
        ("resnet26t", {"img_size": 64}, (64, 32)),
        ("resnetv2_50", {"img_size": 32}, (32,)),
        ("deit_tiny_patch16_224", {"img_size": 96}, (96, 64, 224)),
        ("xcit_nano_12_p16_224", {"img_size": 96}, (96, 64)),
        ("gmlp_ti16_224", {"img_size": 96}, (96,)),
        ("cait_xxs24_224", {"img_size": 32, "drop_path_rate": 0.1}, (32,)),
        ("mobilenetv4_conv_small_035", {"img_size": 64}, (64, 32)),
        ("test_mambaout", {"img_size": 64}, (64,)),
        ("efficientvit_b0", {"img_size": 64}, (64,)),
        ("ghostnet_050", {"in_chans": 1, "img_size": 64}, (64,)),
    ],
)
def test_gives_features_at_every_crop_size(arch, options, sizes):
    network = create_backbone(arch, **options).eval()
    check_crops(network, sizes, options.get("in_chans", 3))
    for size in sizes:
        features = network(torch.randn(2, options.get("in_chans", 3), size, size))
        assert features.shape == (2, network.num_features)


def test_width_of_the_features_is_measured():
    network = create_backbone("ghostnet_050", img_size=64)
    network.num_features += 1
    with pytest.raises(ValueError, match=r"--arch: GhostNet must return features \[1, 1281\]"):
        check_crops(network, [64])


@pytest.mark.slow
def test_widened_network_trains_and_is_planned_and_exported(images, tmp_path):
    """timm's num_features is the width of the last stage, before this network widens it from 64 to 256."""
    run = train_few_steps(images, tmp_path / "run", "--arch", "test_mambaout")
    assert from_run(run).network.num_features == 256
    plan = ("--method", "simclr", "--recipe", "cifar", "--arch", "test_mambaout", "--gpus_per_node", "1")
    assert main(["plan", *plan, "--batch_size_per_gpu", "8"]) == 0
    for form in ("timm", "safetensors"):
        assert main(["export", str(run), "--format", form, "--output", str(tmp_path / f"{form}.safetensors")]) == 0


def test_resnet_stem_keeps_the_resolution_of_small_images():
    assert create_backbone("resnet18", img_size=32).conv1.stride == (1, 1)
    assert create_backbone("resnet18", img_size=224).conv1.stride == (2, 2)


def test_patch_size_follows_the_name_or_the_flag():
    """Every ViT's once had 16 pixels, whatever it is called, and a hybrid's could not be built."""

    def patch(arch, **options):
        return create_backbone(arch, img_size=56, **options).patch_embed.patch_size[0]

    assert patch("vit_small_patch8_224") == 8
    assert patch("vit_small_patch8_224", patch_size=14) == 14
    assert patch("vit_tiny", patch_size=4) == 4
    assert create_backbone("vit_tiny").patch_embed.patch_size[0] == 16


def test_dino_s_names_and_timm_s_give_the_same_network():
    ours = create_backbone("vit_tiny", img_size=32, patch_size=8).state_dict()
    timms = create_backbone("vit_tiny_patch16_224", img_size=32, patch_size=8).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in timms.items()}


@pytest.mark.parametrize(
    ("arch", "options", "message"),
    [
        ("vit_smal", {}, "'vit_smal' is unknown.*vit_small"),
        ("vit_tiny", {"img_size": 28, "patch_size": 16}, "--patch_size: .*28 pixels, got 16"),
        ("vgg11", {"drop_path_rate": 0.1}, "--arch: 'vgg11'"),
        ("vit_tiny", {"num_heads": 5}, "--num_heads 5"),
        ("vit_tiny", {"num_heads": 0}, "--num_heads 0"),
    ],
)
def test_what_cannot_be_built_is_named(arch, options, message):
    with pytest.raises(ValueError, match=message):
        create_backbone(arch, **options)


@pytest.mark.parametrize(
    ("arch", "img_size", "size", "message"),
    [
        ("deit_tiny_patch16_224", 96, 40, "--patch_size: .*40 pixels.*16"),
        ("gmlp_ti16_224", 96, 64, "--arch: MlpMixer.*64 pixels"),
        ("hiera_tiny_224", 96, 64, "--arch: Hiera.*64 pixels"),
        ("vgg11", 64, 16, "--arch: VGG.*16 pixels"),
    ],
)
def test_views_that_a_network_cannot_take_are_named(arch, img_size, size, message):
    network = create_backbone(arch, img_size=img_size)
    check_crops(network, [img_size])
    with pytest.raises(ValueError, match=message) as error:
        check_crops(network, [img_size, size])
    assert "\n" not in str(error.value)


def test_view_check_changes_neither_network_nor_random_state():
    network = create_backbone("mobilenetv3_small_050", img_size=32)
    state, before = torch.get_rng_state(), {name: x.clone() for name, x in network.state_dict().items()}
    check_crops(network, [32])
    assert network.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, before[name]) for name, x in network.state_dict().items())


def test_only_one_7x7_convolution_makes_way_for_the_small_stem():
    assert create_backbone("resnet26t", img_size=32).conv1[0].stride == (2, 2)
    assert create_backbone("resnetv2_50", img_size=32).stem.conv.stride == (2, 2)


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


def test_fixed_patch_embedding_is_not_trained():
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
    assert not is_vit(create_backbone("xcit_nano_12_p16_224"))  # several convolutions, no table of positions
    assert not is_vit(create_backbone("vit_small_patch16_dinov3"))  # rotary positions only


def test_gradient_checkpointing_gives_equal_gradients():
    actual = []
    for checkpointing in (False, True):
        vit = _vit()
        if checkpointing:
            checkpoint_activations(vit)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):  # noqa: B023
            loss = vit(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))).square().sum()
        loss.backward()
        actual.append(([p.grad for p in vit.parameters()], sum(kept)))
    for plain, again in zip(actual[0][0], actual[1][0], strict=True):
        torch.testing.assert_close(again, plain)
    assert actual[1][1] < actual[0][1] / 4


@pytest.mark.parametrize("arch", ["resnet18", "conv_small"])
def test_batch_norm_is_not_recomputed(arch):
    with pytest.raises(ValueError, match="--activation_checkpointing: .*BatchNorm"):
        checkpoint_activations(create_backbone(arch))


def test_a_network_that_keeps_all_activations_is_refused():
    with pytest.raises(ValueError, match="--activation_checkpointing: Linear"):
        checkpoint_activations(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(("arch", "size"), [("vit_tiny", (64, 32)), ("resnet18", (48, 24)), ("conv_small", (30, 20))])
def test_networks_take_bands_and_two_sides(arch, size):
    network = create_backbone(arch, in_chans=13, img_size=size).eval()
    check_crops(network, [size, 32], 13)
    assert network(torch.randn(2, 13, *size)).shape == (2, network.num_features)
    if arch == "vit_tiny":
        assert network.patch_embed.grid_size == (4, 2)
        with pytest.raises(ValueError, match="--patch_size: .*32 x 20") as error:
            check_crops(network, [(32, 20)], 13)
        assert "\n" not in str(error.value)


def test_patch_size_must_divide_both_sides():
    with pytest.raises(ValueError, match="--patch_size: .*32 x 20"):
        create_backbone("vit_tiny", img_size=(32, 20), patch_size=8)
