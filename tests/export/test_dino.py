"""facebookresearch/dino's dictionary: what its utils.load_pretrained_weights does to it, and its head, by hand."""

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


def _export(source, file):
    return main(["export", *map(str, source), "--format", "dino", "--output", str(file)])


@pytest.mark.parametrize("key", ["teacher", "student"])
def test_its_scripts_read_both_branches(dino_run, tmp_path, key):
    """They strip ``module.`` and ``backbone.``, and load what fits, which must be everything."""
    assert _export([dino_run], tmp_path / "dino.pth") == 0
    state = torch.load(tmp_path / "dino.pth", weights_only=True)[key]
    assert all(name.startswith("module.") == (key == "student") for name in state)
    state = {name.replace("module.", "").replace("backbone.", ""): tensor for name, tensor in state.items()}
    vit = from_timm("vit_tiny_patch16_224", size=32).network
    left = vit.load_state_dict(state, strict=False)
    assert left.missing_keys == []
    assert {name.split(".")[0] for name in left.unexpected_keys} == {"head"}
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(vit(images), from_run(dino_run, key).network(images))


@pytest.mark.parametrize("options", [{"use_bn_in_head": False}, {"use_bn_in_head": True}, {"norm_last_layer": False}])
def test_its_head_gives_our_logits(options):
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


def test_a_head_with_batch_norm_at_its_end_is_left_out():
    config = resolve("dino", {"recipe": "cifar", "hidden_dim": 16, "use_bn_at_bottleneck": True, "out_dim": 12})
    assert dino_head(build_method(config, images=100, world_size=1).student.state_dict()) == {}


def test_heads_are_those_of_the_run(dino_run, tmp_path):
    assert _export([dino_run], tmp_path / "dino.pth") == 0
    content, state = torch.load(tmp_path / "dino.pth", weights_only=True), whole_tensors(newest(dino_run))
    for part, name in (("student", "module.head.last_layer.weight_v"), ("teacher", "head.last_layer.weight_v")):
        assert torch.equal(content[part][name], state[f"{part}.prototypes.weight"])


def test_a_network_without_branches_is_both(tmp_path):
    assert _export(["--timm", "vit_tiny_patch16_224", "--size", 32], tmp_path / "dino.pth") == 0
    content = torch.load(tmp_path / "dino.pth", weights_only=True)
    assert all(torch.equal(tensor, content["student"][f"module.{k}"]) for k, tensor in content["teacher"].items())


def test_the_line_names_their_network(tmp_path, capsys):
    """Their scripts build a vit_small unless told."""
    assert _export(["--timm", "vit_tiny_patch16_224", "--size", 32], tmp_path / "dino.pth") == 0
    assert " --arch vit_tiny --patch_size 16 " in capsys.readouterr().out


def test_the_line_says_what_their_scripts_do_not_build(tmp_path):
    blueprint = Blueprint(
        "vit_tiny", 28, encoders=(1,), patch_size=7, pixels=Pixels(channels=1, mean=(0.5,), std=(0.25,))
    )
    line = write_dino(Backbone(blueprint.build().eval(), blueprint, "grey"), tmp_path / "a b.pth")
    assert " --pretrained_weights 'a b.pth' " in line
    assert "(build its ViT with img_size=[28], in_chans=1; its scripts assume 224 pixels of 3 channels)" in line


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_their_networks_are_known_by_their_shapes(size):
    blueprint = Blueprint(f"vit_{size}_patch16_224", 32)
    with torch.device("meta"):
        assert _their_arch(Backbone(blueprint.build(), blueprint, "it")) == f"vit_{size}"


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        ({"num_heads": 6}, "vit_tiny has width 192, 12 blocks and 6 heads"),
        ({"arch": "vit_large"}, "vit_large has width 1024, 24 blocks and 16 heads"),
    ],
)
def test_a_vit_that_they_do_not_build_is_one_line(network, shape, tmp_path):
    blueprint = Blueprint(**{"arch": "vit_tiny", "size": 32} | network)
    with torch.device("meta"):
        backbone = Backbone(blueprint.build(), blueprint, "it")
    with pytest.raises(ConfigError, match=shape) as told:
        write_dino(backbone, tmp_path / "dino.pth")
    assert "choose timm, hf, onnx or safetensors" in str(told.value)


_OTHERS = ["test_resnet", "test_vit3", "test_vit_relpos"]  # the last is not in timm 1.0.28 yet


@pytest.mark.parametrize("name", [name for name in _OTHERS if timm.is_model(name)])
def test_other_networks_are_one_line(tmp_path, capsys, name):
    assert plain_vit(from_timm(name).network) is None
    assert _export(["--timm", name], tmp_path / "dino.pth") == 2
    line = f"fasttrain: --format dino is for plain ViTs, this is {name}; choose timm, hf, onnx or safetensors\n"
    assert capsys.readouterr().err == line
