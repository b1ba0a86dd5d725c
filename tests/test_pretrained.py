"""A backbone from a run, an exported file or timm is the trained network, or one line says why not."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from fasttrain.checkpoint.card import newest
from fasttrain.checkpoint.state import whole_tensors
from fasttrain.cli.source import SourceOptions, add_source, open_backbone
from fasttrain.config.arguments import Parser
from fasttrain.config.resolve import resolve
from fasttrain.engine.build import build_method
from fasttrain.errors import ConfigError
from fasttrain.models.weights import metadata
from fasttrain.pipelines import Pixels
from fasttrain.pretrained import (
    Blueprint,
    from_file,
    from_run,
    from_timm,
    timm_arguments,
)


def _open(*arguments):
    """Return the network that the flags of eval and export name."""
    parser = Parser("eval", "")
    add_source(parser)
    namespace, (options,) = parser.options([str(a) for a in arguments], SourceOptions)
    return open_backbone(namespace, options)


def _weights(backbone):
    return backbone.network.state_dict()


def test_run_without_a_teacher_gives_the_student(simclr_run):
    backbone, state = from_run(simclr_run), whole_tensors(newest(simclr_run), "student.backbone.")
    assert all(torch.equal(tensor, state[name]) for name, tensor in _weights(backbone).items())
    assert backbone.name == "simclr student, step 2"
    assert backbone.config.method == "simclr"
    assert not any(p.requires_grad for p in backbone.network.parameters())
    assert not backbone.network.training
    assert from_run(newest(simclr_run)).name == backbone.name


def test_run_with_a_teacher_gives_it_unless_student_is_chosen(dino_run):
    teacher, student = from_run(dino_run), from_run(dino_run, "student")
    assert teacher.name == "dino teacher, step 2"
    for backbone, which in ((teacher, "teacher"), (student, "student")):
        state = whole_tensors(newest(dino_run), f"{which}.backbone.")
        assert all(torch.equal(tensor, state[name]) for name, tensor in _weights(backbone).items())
    assert not torch.equal(_weights(teacher)["cls_token"], _weights(student)["cls_token"])


def test_missing_teacher_is_refused(simclr_run):
    with pytest.raises(ConfigError, match="--which: simclr"):
        from_run(simclr_run, "teacher")


def test_run_with_a_missing_or_wrong_config_is_refused(simclr_run, tmp_path):
    copy = shutil.copytree(simclr_run, tmp_path / "run")
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("arch: conv_small", "arch: resnet18"))
    with pytest.raises(ConfigError, match=r"step-00000002: .*ResNet: none of its names"):
        from_run(copy)
    (copy / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        from_run(copy)


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("simclr", {"recipe": "cifar"}),
        ("simclr", {"recipe": "cifar", "arch": "resnet18"}),
        ("dino", {"recipe": "demo", "arch": "vit_tiny", "patch_size": 7, "num_heads": 6}),
        ("cmc", {"recipe": "cifar"}),
        ("cmc", {"recipe": "demo"}),
        ("mocov3", {"recipe": "cifar", "arch": "vit_tiny", "patch_size": 8}),
    ],
)
def test_blueprint_builds_the_network_of_the_method(method, values):
    """The same names and shapes, the same function, and the same again from what is written into a file."""
    config = resolve(method, {"hidden_dim": 8, **values} if method != "cmc" else values)
    expected = build_method(config, images=100, world_size=1).backbone.eval()
    blueprint = Blueprint.of(config)
    assert Blueprint.read(json.loads(json.dumps(blueprint.as_dict())), Path("f")) == blueprint
    network = blueprint.build().eval()
    network.load_state_dict(expected.state_dict())
    images = torch.randn(2, blueprint.pixels.channels, blueprint.size, blueprint.size)
    with torch.no_grad():
        assert torch.equal(network(images), expected(images))


def test_stock_model_equals_timms():
    torch.manual_seed(7)
    expected = timm.create_model("resnet18", num_classes=0).state_dict()
    backbone = from_timm("resnet18", seed=7)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in _weights(backbone).items())
    assert (backbone.blueprint.size, backbone.blueprint.stock) == (224, True)
    assert backbone.name == "timm resnet18, random, seed 7"
    assert isinstance(backbone.network.maxpool, nn.MaxPool2d)  # no stem for small images


def test_stock_model_is_built_for_another_size(tmp_path):
    backbone = from_timm("vit_tiny_patch16_224", size=64)
    assert backbone.network(torch.randn(1, 3, 64, 64)).shape == (1, 192)
    small = from_timm("resnet18", size=64)
    assert small.blueprint.size == 64
    torch.save(from_timm("vit_tiny_patch16_224").network.state_dict(), tmp_path / "vit.pth")
    resized = from_timm("vit_tiny_patch16_224", size=64, pretrained=tmp_path / "vit.pth")
    assert resized.name == "timm vit_tiny_patch16_224, vit.pth"
    assert resized.network.pos_embed.shape == (1, 17, 192)


def test_stock_model_is_normalised_for_its_weights(tmp_path):
    """timm's vit_tiny_patch16_224 is for weights that want 0.5, and so were ours evaluated."""
    network = from_timm("vit_tiny_patch16_224").network
    ours = Blueprint("vit_tiny", 224, pixels=Pixels(mean=(0.4,) * 3, std=(0.2,) * 3, interpolation="linear"))
    save_file(network.state_dict(), tmp_path / "ours.safetensors", metadata=metadata(ours.as_dict()))
    save_file(network.state_dict(), tmp_path / "any.safetensors")
    for name, file, mean in (
        ("vit_tiny_patch16_224", "ours", 0.4),
        ("vit_tiny_patch16_224", "any", 0.5),
        ("vit_small_patch16_224.dino", None, 0.485),
    ):
        backbone = from_timm(name, pretrained=file and tmp_path / f"{file}.safetensors").blueprint
        assert backbone.pixels.mean[0] == mean


def test_stock_model_of_an_impossible_size_is_refused():
    with pytest.raises(ConfigError, match=r"'nest_tiny' cannot be built: .* \(for images of 50 pixels\)"):
        from_timm("nest_tiny", size=50)


def test_wrong_name_or_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="timm model 'resnet81' is unknown; did you mean resnet18"):
        from_timm("resnet81")
    torch.save({"conv1.weight": torch.ones(2)}, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=r"w.pth: .*ResNet: it has no 'bn1.weight' and 98 others"):
        from_timm("resnet18", pretrained=tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=r"w.pth: .*--timm NAME --pretrained"):
        from_file(tmp_path / "w.pth")
    about = Blueprint("conv_small", 32).as_dict()
    for wrong in ({"arch": 3}, {"size": "large"}, {"mean": [0.5]}, {"interpolation": "lanczos"}):
        save_file({"x": torch.ones(1)}, tmp_path / "w.safetensors", metadata=metadata(about | wrong))
        with pytest.raises(ConfigError, match=r"w\.safetensors: "):
            from_file(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "--timm"),
        (["run", "--timm", "resnet18"], "--timm"),
        (["none"], "none: "),
        (["none", "--pretrained", "x"], "--pretrained: .*--timm"),
        (["--timm", "resnet18", "--which", "student"], "--which: "),
        (["--timm", "resnet18", "--size", "0"], "--size: .*0"),
        ([__file__, "--which", "student"], "--which: "),
        ([__file__], "test_pretrained.py"),
    ],
)
def test_source_flags_that_conflict_are_refused(arguments, line):
    with pytest.raises(ConfigError, match=line):
        _open(*arguments)


def test_source_flags_choose_the_network(dino_run):
    assert _open(dino_run, "--which", "student").name == "dino student, step 2"
    assert _open("--timm", "resnet18", "--seed", 3).name == "timm resnet18, random, seed 3"


@pytest.mark.parametrize(
    ("blueprint", "expected"),
    [
        (Blueprint("resnet18", 224), ("resnet18", {})),
        (Blueprint("resnet18", 96, encoders=(1,)), ("resnet18", {"in_chans": 1})),
        (Blueprint("vit_tiny", 32, patch_size=8), ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8})),
        (
            Blueprint("vit_tiny", 224, num_heads=6),
            ("vit_tiny_patch16_224", {"img_size": 224, "num_heads": 6}),
        ),
        (Blueprint("resnetv2_50", 32), ("resnetv2_50", {})),
        (Blueprint("resnet26t", 32), ("resnet26t", {})),
        (Blueprint("deit_tiny_patch16_224", 96), ("deit_tiny_patch16_224", {"img_size": 96})),
        (Blueprint("gmlp_ti16_224", 96), ("gmlp_ti16_224", {"img_size": 96})),
        (Blueprint("xcit_nano_12_p16_224", 96), ("xcit_nano_12_p16_224", {"img_size": 96})),
        (Blueprint("vit_tiny_patch16_224", 224, stock=True), ("vit_tiny_patch16_224", {})),
        (Blueprint("vit_tiny_patch16_224", 64, stock=True), ("vit_tiny_patch16_224", {"img_size": 64})),
    ],
)
def test_timm_arguments_build_the_same_network(blueprint, expected):
    name, options = timm_arguments(blueprint)
    assert (name, options) == expected
    made = timm.create_model(name, num_classes=0, **options).state_dict()
    assert {k: v.shape for k, v in made.items()} == {k: v.shape for k, v in blueprint.build().state_dict().items()}


@pytest.mark.parametrize(
    ("blueprint", "what"),
    [
        (Blueprint("conv_small", 32), "conv_small"),
        (Blueprint("resnet18", 32), "resnet18 with CIFAR's stem, for images of 32 pixels,"),
        (replace(Blueprint("resnet18", 224), encoders=(1, 2)), "CMC's pair of resnet18"),
    ],
)
def test_network_that_timm_does_not_have_is_refused(blueprint, what):
    with pytest.raises(ConfigError, match=f"--format: {what}"):
        timm_arguments(blueprint)
