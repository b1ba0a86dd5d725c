"""The dictionary of facebookresearch/dino: its utils.load_pretrained_weights and its head, written by hand."""

import pytest
import timm
import torch
from torch import nn
from torch.nn.functional import gelu, linear, normalize

from fasttrain.checkpoint.card import newest
from fasttrain.checkpoint.state import whole_tensors
from fasttrain.cli import main
from fasttrain.config.resolve import resolve
from fasttrain.engine.build import build_method
from fasttrain.errors import ConfigError
from fasttrain.export.dino import _their_arch, dino_head, write_dino
from fasttrain.export.vit import plain_vit
from fasttrain.pipelines import Pixels
from fasttrain.pretrained import Backbone, Blueprint, from_run, from_timm

_STOCK = ["--timm", "vit_tiny_patch16_224", "--size", 32]


def _export(source, folder):
    """Export a network; return the file's content."""
    file = folder / "dino.pth"
    assert main(["export", *map(str, source), "--format", "dino", "--output", str(file)]) == 0
    return torch.load(file, weights_only=True)


def test_dino_scripts_read_both_branches_of_a_run(dino_run, tmp_path):
    """They strip ``module.`` and ``backbone.``, and load the names that match, which must be all names."""
    content, tensors = _export([dino_run], tmp_path), whole_tensors(newest(dino_run))
    for key, prefix in (("teacher", ""), ("student", "module.")):
        assert all(name.startswith("module.") == (key == "student") for name in content[key])
        state = {name.replace("module.", "").replace("backbone.", ""): x for name, x in content[key].items()}
        vit = from_timm("vit_tiny_patch16_224", size=32).network
        keys = vit.load_state_dict(state, strict=False)
        assert keys.missing_keys == []
        assert {name.split(".")[0] for name in keys.unexpected_keys} == {"head"}
        images = torch.rand(2, 3, 32, 32)
        assert torch.equal(vit(images), from_run(dino_run, key).network(images))
        head = content[key][f"{prefix}head.last_layer.weight_v"]
        assert torch.equal(head, tensors[f"{key}.prototypes.weight"])


def test_dino_of_a_network_without_branches_has_it_twice(tmp_path, capsys):
    content = _export(_STOCK, tmp_path)
    assert all(torch.equal(tensor, content["student"][f"module.{k}"]) for k, tensor in content["teacher"].items())
    assert " --arch vit_tiny --patch_size 16 " in capsys.readouterr().out


@pytest.mark.parametrize("options", [{"use_bn_in_head": False}, {"use_bn_in_head": True}, {"norm_last_layer": False}])
def test_dino_head_gives_the_same_logits(options):
    """DINOHead: Linear, [BatchNorm], GELU twice, Linear; then unit norm and weight-normalised prototypes."""
    config = resolve("dino", {"recipe": "cifar", "hidden_dim": 16, "bottleneck_dim": 8, "out_dim": 12, **options})
    student = build_method(config, images=100, world_size=1).student.eval()
    for layer in student.head.modules():
        if isinstance(layer, nn.BatchNorm1d):
            layer.running_mean.normal_()
    if student.prototypes.norm is not None:
        nn.init.uniform_(student.prototypes.norm)
    theirs = dino_head(student.state_dict())
    features = torch.randn(5, student.backbone.num_features)
    x, step = features, 3 if config.settings.use_bn_in_head else 2
    for first in (0, step, 2 * step):
        x = linear(x, theirs[f"head.mlp.{first}.weight"], theirs[f"head.mlp.{first}.bias"])
        if first == 2 * step:
            break
        if step == 3:
            names = ("running_mean", "running_var", "weight", "bias")
            x = nn.functional.batch_norm(x, *(theirs[f"head.mlp.{first + 1}.{name}"] for name in names))
        x = gelu(x)
    g, v = theirs["head.last_layer.weight_g"], theirs["head.last_layer.weight_v"]
    logits = normalize(x, dim=1) @ (g * v / v.norm(dim=1, keepdim=True)).T
    ours = normalize(student.head(features), dim=1) @ student.prototypes().T
    torch.testing.assert_close(logits, ours, rtol=1e-5, atol=1e-5)


def test_dino_head_with_batch_norm_at_its_end_is_left_out():
    config = resolve("dino", {"recipe": "cifar", "hidden_dim": 16, "use_bn_at_bottleneck": True, "out_dim": 12})
    assert dino_head(build_method(config, images=100, world_size=1).student.state_dict()) == {}


def test_dino_line_names_other_sizes_and_channels(tmp_path):
    pixels = Pixels(channels=1, mean=(0.5,), std=(0.25,))
    blueprint = Blueprint("vit_tiny", 28, encoders=(1,), patch_size=7, pixels=pixels)
    line = write_dino(Backbone(blueprint.build().eval(), blueprint, "grey"), tmp_path / "a b.pth")
    assert " --pretrained_weights 'a b.pth' " in line
    assert "img_size=[28], in_chans=1" in line


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_dino_arch_is_known_by_its_shape(size):
    blueprint = Blueprint(f"vit_{size}_patch16_224", 32)
    with torch.device("meta"):
        assert _their_arch(Backbone(blueprint.build(), blueprint, "it")) == f"vit_{size}"


@pytest.mark.parametrize(("arch", "options"), [("vit_tiny", {"num_heads": 6}), ("vit_large", {})])
def test_dino_refuses_other_plain_vits(arch, options, tmp_path):
    blueprint = Blueprint(arch=arch, size=32, **options)
    with torch.device("meta"):
        backbone = Backbone(blueprint.build(), blueprint, "it")
    with pytest.raises(ConfigError, match=f"--format: .*{arch}"):
        write_dino(backbone, tmp_path / "dino.pth")


_OTHERS = ["test_resnet", "test_vit3", "test_vit_relpos"]  # timm 1.0.28 does not have the last one


@pytest.mark.parametrize("name", [name for name in _OTHERS if timm.is_model(name)])
def test_dino_refuses_other_networks(tmp_path, name):
    backbone = from_timm(name)
    assert plain_vit(backbone.network) is None
    with pytest.raises(ConfigError, match=f"--format: .*{name}"):
        write_dino(backbone, tmp_path / "dino.pth")
