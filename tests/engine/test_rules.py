"""The optimizer's rules for a backbone that starts from given weights."""

import pytest

from fasttrain.config.resolve import resolve
from fasttrain.engine.build import build_method
from fasttrain.engine.rules import parameter_rules
from fasttrain.errors import ConfigError
from fasttrain.optim.optimizers import parameter_groups, set_schedules


def _groups(method="dino", **values):
    values = {"recipe": "cifar", "arch": "vit_tiny", "patch_size": 8, "data_path": "x"} | values
    config = resolve(method, values)
    built = build_method(config, images=20000, world_size=1)
    return built, parameter_groups(built, 0.1, parameter_rules(built, config.train))


def _group_of(built, groups, name):
    parameter = dict(built.named_parameters())[name]
    return next(group for group in groups if any(p is parameter for p in group["params"]))


def test_layer_decay_multiplies_the_patch_embeddings_rate():
    """DINOv2's rates: decay to the power of the layers above, and the multiplier on the patch embedding only."""
    built, groups = _groups(layer_decay=0.9, patch_embed_lr_mult=0.2)
    for name, rate in {
        "student.backbone.blocks.11.mlp.fc1.weight": 0.9,
        "student.backbone.blocks.0.mlp.fc1.weight": 0.9**12,
        "student.backbone.patch_embed.proj.weight": 0.2 * 0.9**13,
        "student.backbone.cls_token": 0.9**13,
        "student.backbone.norm.bias": 1.0,
        "student.head.0.weight": 1.0,
        "student.head.4.weight": 1.0,
    }.items():
        assert _group_of(built, groups, name)["lr_scale"] == pytest.approx(rate), name
    assert _group_of(built, groups, "student.backbone.norm.bias")["weight_decay"] == 0
    assert sum(len(g["params"]) for g in groups) == sum(p.requires_grad for p in built.parameters())


def test_frozen_backbone_learns_after_its_epochs():
    built, groups = _groups(freeze_backbone_epochs=2)
    block, head = (_group_of(built, groups, f"student.{n}") for n in ("backbone.norm.weight", "head.0.weight"))
    for epoch, rates in {1.9: [0, 1], 2: [1, 1]}.items():
        for group in (block, head):
            set_schedules(group, lr=1, peak_lr=1, weight_decay=0.1, epoch=epoch)
        assert [block["lr"], head["lr"]] == rates
    assert block["name"] == "the backbone's biases and norms"


def test_every_encoder_of_cmc_has_its_own_depths():
    built, groups = _groups("cmc", arch="conv_small", patch_size=None, layer_decay=0.5)
    for encoder in (0, 1):
        first = f"student.backbone.encoders.{encoder}.layers.0.conv.weight"
        assert _group_of(built, groups, first)["lr_scale"] == 0.5**5


def test_multiplier_without_patches_is_refused():
    with pytest.raises(ConfigError, match="--patch_embed_lr_mult: ConvSmall has no patches"):
        _groups(arch="conv_small", patch_size=None, patch_embed_lr_mult=0.2)
