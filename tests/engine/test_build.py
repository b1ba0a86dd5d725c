"""From a configuration to a method: what cannot work is refused in a line, what is odd is said."""

import pytest

from fasttrain import methods
from fasttrain.config.resolve import resolve
from fasttrain.engine.build import build_method
from fasttrain.errors import ConfigError

_SMALL = {"arch": "vit_tiny", "patch_size": 4, "data_path": "x"}


def _build(method, images=1000, world_size=1, **values):
    return build_method(resolve(method, {"recipe": "cifar", **values}), images=images, world_size=world_size)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("method", methods.names())
def test_every_method_is_built_on_a_resnet_and_on_a_vit(method, entropy):
    for arch in ({"arch": "resnet18"}, _SMALL):
        made = _build(method, images=20000, entropy=entropy, **arch)
        assert made.entropy == entropy
        assert sum(p.numel() for p in made.backbone.parameters()) > 1e6


@pytest.mark.parametrize(
    ("method", "values", "message"),
    [
        ("dino", {**_SMALL, "patch_size": 32}, "patch_size 32 does not divide a view of 16 pixels"),
        ("infomin", {**_SMALL, "patch_size": 8}, "patch_size 8 does not divide a view of 12 pixels"),
        ("swav", {"queue_length": 100, "batch_size_per_gpu": 64}, "--queue_length 100 is not a multiple .* use 64"),
        ("swav", {"sinkhorn_iterations": -1}, "--sinkhorn_iterations must be at least 0, got -1"),
        ("swav", {"sinkhorn_iterations": 0, "queue_length": 128}, "the queue serves Sinkhorn alone"),
        ("moco", {"batch_size_per_gpu": 100}, "--queue_length 4096 is not a multiple of the batch, 100"),
        ("moco", {"batch_size_per_gpu": 8, "bn_splits": 3}, "--bn_splits 3 does not divide the batch of 8 images"),
        ("moco", {"batch_size_per_gpu": 8, "bn_splits": 8}, "raise --batch_size_per_gpu or lower --bn_splits"),
        ("simclr", {**_SMALL, "batch_size_per_gpu": 1, "entropy_leave_one_out": True}, "needs more than one image"),
        ("deepcluster", {"nmb_prototypes": 1001}, "--nmb_prototypes 1001 is more than the .* images of an epoch"),
        (
            "deepcluster",
            {"nmb_prototypes": 999, "batch_size_per_gpu": 64},
            "999 is more than the 960 images",
        ),
        ("simclr", {"batch_size_per_gpu": 1}, "BatchNorm needs more than one image a batch"),
        ("simclr", {"arch": "resnet1"}, "network 'resnet1' is unknown"),
        ("dino", {**_SMALL, "num_heads": 5}, "--num_heads 5 must divide its width"),
        ("dino", {"arch": "gmlp_ti16_224"}, r"MlpMixer cannot take a view of 16 pixels \(.+\); choose other views"),
    ],
)
def test_what_cannot_work_is_refused(method, values, message):
    with pytest.raises(ConfigError, match=message):
        _build(method, **values)


def test_batch_norm_of_one_rank_sees_no_other():
    """MoCo with an image a rank was once built where there were two."""
    with pytest.raises(ConfigError, match="BatchNorm needs more than one image a batch"):
        _build("moco", world_size=2, batch_size_per_gpu=1, bn_splits=1)
    _build("simclr", world_size=2, batch_size_per_gpu=1)


@pytest.mark.parametrize("method", methods.names())
def test_a_resnet_s_blocks_begin_as_the_authors_have_them(method):
    """timm's begin as the identity, which LARS leaves but slowly; SwAV's and MoCo's code does not have that."""
    network = _build(method, images=20000, arch="resnet18").backbone
    gammas = {float(block.bn2.weight.detach().mean()) for block in network.modules() if hasattr(block, "bn2")}
    assert gammas == {0.0 if method in ("simclr", "simsiam", "byol", "mocov3") else 1.0}


def test_the_queue_is_of_the_batch_of_all_ranks():
    _build("moco", world_size=2)
    with pytest.raises(ConfigError, match="a multiple of the batch, 384 on all ranks"):
        _build("moco", world_size=3)
