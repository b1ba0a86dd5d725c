"""The method of a configuration, and refused configurations."""

import pytest

from fasttrain import methods
from fasttrain.config.resolve import resolve
from fasttrain.engine.build import build_method
from fasttrain.errors import ConfigError
from tests.methods.small import CASES

_ON_PATCHES = {name for name in methods.names() if methods.load(name).needs_patches}
_SMALL = {"arch": "vit_tiny", "patch_size": 4, "data_path": "x"}


def _build(method, images=1000, world_size=1, **values):
    return build_method(resolve(method, {"recipe": "cifar", **values}), images=images, world_size=world_size)


@pytest.mark.parametrize(("method", "entropy"), CASES)
def test_every_method_is_built_on_a_resnet_and_on_a_vit(method, entropy):
    for arch in ([] if method in _ON_PATCHES else [{"arch": "resnet18"}]) + [_SMALL]:
        made = _build(method, images=20000, entropy=entropy, **arch)
        assert made.entropy == entropy
        assert sum(p.numel() for p in made.backbone.parameters()) > 1e6


@pytest.mark.parametrize(
    ("method", "values", "message"),
    [
        ("dino", {**_SMALL, "patch_size": 32}, "--patch_size: .*16 pixels.*32"),
        ("infomin", {**_SMALL, "patch_size": 8}, "--patch_size: .*12 pixels.*8"),
        ("swav", {"queue_length": 100, "batch_size_per_gpu": 64}, "--queue_length: .*64.*got 100"),
        ("swav", {"sinkhorn_iterations": -1}, "--sinkhorn_iterations: .*-1"),
        ("swav", {"sinkhorn_iterations": 0, "queue_length": 128}, "--queue_length: .*--sinkhorn_iterations 0"),
        ("moco", {"batch_size_per_gpu": 100}, "--queue_length: .*100.*4096"),
        ("moco", {"batch_size_per_gpu": 8, "bn_splits": 3}, "--batch_size_per_gpu: .*3.*--bn_splits.*8"),
        ("moco", {"batch_size_per_gpu": 8, "bn_splits": 8}, "--batch_size_per_gpu: .*--bn_splits"),
        ("simclr", {**_SMALL, "batch_size_per_gpu": 1, "entropy_leave_one_out": True}, "--entropy_leave_one_out: .*1"),
        ("deepcluster", {"nmb_prototypes": 1001}, "--nmb_prototypes: .*1001"),
        (
            "deepcluster",
            {"nmb_prototypes": 999, "batch_size_per_gpu": 64},
            "--nmb_prototypes: .*960 images.*999",
        ),
        ("simclr", {"batch_size_per_gpu": 1}, "--batch_size_per_gpu: BatchNorm"),
        ("simclr", {"arch": "resnet1"}, "--arch: 'resnet1'"),
        ("dino", {**_SMALL, "num_heads": 5}, "--num_heads.*5"),
        ("dinov2", {**_SMALL, "gram_loss_weight": 1.0}, "--gram_loss_weight: .*random weights"),
        ("dino", {"arch": "gmlp_ti16_224"}, "--arch: MlpMixer .*16 pixels"),
        ("ibot", {"arch": "conv_small"}, "--arch: .*ViT with patch tokens, got ConvSmall"),
        ("ibot", {"pred_ratio": 1, "pred_ratio_var": 0}, "--pred_ratio: must leave patches"),
        ("ibot", {"pred_ratio": 0.01, "pred_ratio_var": 0}, "--pred_ratio: masks no patch"),
        ("ibot", {"pred_ratio_var": [0.1, 0.2, 0.3]}, "--pred_ratio_var: .*2, got 3"),
        ("ibot", {"pred_ratio": 0.1, "pred_ratio_var": 0.2}, "--pred_ratio_var: .*at most"),
        ("ibot", {"shared_head": True, "shared_head_teacher": False}, "--shared_head_teacher: "),
    ],
)
def test_impossible_configuration_is_refused_by_flag(method, values, message):
    with pytest.raises(ConfigError, match=message):
        _build(method, **values)


def test_batch_norm_of_one_rank_sees_no_other():
    """MoCo with 1 image per rank was once built on two ranks."""
    with pytest.raises(ConfigError, match="--batch_size_per_gpu: BatchNorm"):
        _build("moco", world_size=2, batch_size_per_gpu=1, bn_splits=1)
    _build("simclr", world_size=2, batch_size_per_gpu=1)


@pytest.mark.parametrize("method", sorted(set(methods.names()) - _ON_PATCHES))
def test_resnet_blocks_start_as_in_the_official_code(method):
    """timm's blocks start as the identity, which LARS leaves slowly. The code of SwAV and MoCo does not do so."""
    network = _build(method, images=20000, arch="resnet18").backbone
    gammas = {float(block.bn2.weight.detach().mean()) for block in network.modules() if hasattr(block, "bn2")}
    assert gammas == {0.0 if method in ("barlow", "byol", "lejepa", "mocov3", "simclr", "simsiam", "vicreg") else 1.0}


def test_queue_is_a_multiple_of_the_batch_of_all_ranks():
    _build("moco", world_size=2)
    with pytest.raises(ConfigError, match="--queue_length: .*384"):
        _build("moco", world_size=3)
