"""A backbone from a run, an exported file or timm is the network that was trained, or a line says why not."""

import argparse
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
from fasttrain.config.resolve import resolve
from fasttrain.engine.build import build_method
from fasttrain.errors import ConfigError
from fasttrain.models.weights import metadata
from fasttrain.pretrained import (
    Blueprint,
    add_source_flags,
    from_file,
    from_run,
    from_timm,
    open_backbone,
    timm_arguments,
)


def _given(*arguments):
    parser = argparse.ArgumentParser()
    add_source_flags(parser)
    return parser.parse_args([str(a) for a in arguments])


def _weights(backbone):
    return backbone.network.state_dict()


def test_a_run_s_student(simclr_run):
    found, state = from_run(simclr_run), whole_tensors(newest(simclr_run), "student.backbone.")
    assert all(torch.equal(tensor, state[name]) for name, tensor in _weights(found).items())
    assert found.name == "simclr student, step 2"
    assert found.config.method == "simclr"
    assert not any(p.requires_grad for p in found.network.parameters())
    assert not found.network.training
    assert from_run(newest(simclr_run)).name == found.name


def test_a_run_s_teacher_unless_the_student_is_asked_for(dino_run):
    teacher, student = from_run(dino_run), from_run(dino_run, "student")
    assert teacher.name == "dino teacher, step 2"
    for found, which in ((teacher, "teacher"), (student, "student")):
        state = whole_tensors(newest(dino_run), f"{which}.backbone.")
        assert all(torch.equal(tensor, state[name]) for name, tensor in _weights(found).items())
    assert not torch.equal(_weights(teacher)["cls_token"], _weights(student)["cls_token"])


def test_a_teacher_that_is_not_there_is_an_error(simclr_run):
    with pytest.raises(ConfigError, match="simclr has no teacher; leave --which out or choose student"):
        from_run(simclr_run, "teacher")


def test_a_run_without_its_configuration_or_with_another_is_an_error(simclr_run, tmp_path):
    copy = shutil.copytree(simclr_run, tmp_path / "run")
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("arch: conv_small", "arch: resnet18"))
    with pytest.raises(
        ConfigError, match=r"step-00000002 is of another network than this ResNet: it has no 'conv1.weight'"
    ):
        from_run(copy)
    (copy / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"config.yaml is missing, so the run's network is unknown"):
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
def test_a_blueprint_builds_what_the_method_builds(method, values):
    """The same names and shapes, the same function, and the same again from what is written into a file."""
    config = resolve(method, {"hidden_dim": 8, **values} if method != "cmc" else values)
    wanted = build_method(config, images=100, world_size=1).backbone.eval()
    blueprint = Blueprint.of(config)
    assert Blueprint.read(json.loads(json.dumps(blueprint.as_dict())), Path("f")) == blueprint
    network = blueprint.build().eval()
    network.load_state_dict(wanted.state_dict())
    images = torch.randn(2, blueprint.channels, blueprint.size, blueprint.size)
    with torch.no_grad():
        assert torch.equal(network(images), wanted(images))


def test_a_stock_model_is_timm_s():
    torch.manual_seed(7)
    wanted = timm.create_model("resnet18", num_classes=0).state_dict()
    found = from_timm("resnet18", seed=7)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in _weights(found).items())
    assert (found.blueprint.size, found.blueprint.stock) == (224, True)
    assert found.name == "timm resnet18, random, seed 7"
    assert isinstance(found.network.maxpool, nn.MaxPool2d)  # no stem for small images


def test_a_stock_model_for_another_size(tmp_path):
    found = from_timm("vit_tiny_patch16_224", size=64)
    assert found.network(torch.randn(1, 3, 64, 64)).shape == (1, 192)
    small = from_timm("resnet18", size=64)
    assert small.blueprint.size == 64
    torch.save(from_timm("vit_tiny_patch16_224").network.state_dict(), tmp_path / "vit.pth")
    resized = from_timm("vit_tiny_patch16_224", size=64, pretrained=tmp_path / "vit.pth")
    assert resized.name == "timm vit_tiny_patch16_224, vit.pth"
    assert resized.network.pos_embed.shape == (1, 17, 192)


def test_a_stock_model_with_our_weights_is_normalised_as_they_are(tmp_path):
    """timm's vit_tiny_patch16_224 is for weights that want 0.5, and so were ours evaluated."""
    network = from_timm("vit_tiny_patch16_224").network
    ours = Blueprint("vit_tiny", 224, mean=(0.4, 0.4, 0.4), std=(0.2, 0.2, 0.2), interpolation="linear")
    save_file(network.state_dict(), tmp_path / "ours.safetensors", metadata=metadata(ours.as_dict()))
    save_file(network.state_dict(), tmp_path / "any.safetensors")
    for name, file, mean in (
        ("vit_tiny_patch16_224", "ours", 0.4),
        ("vit_tiny_patch16_224", "any", 0.5),
        ("vit_small_patch16_224.dino", None, 0.485),
    ):
        found = from_timm(name, pretrained=file and tmp_path / f"{file}.safetensors").blueprint
        assert found.mean[0] == mean


def test_a_stock_model_that_cannot_be_of_a_size_is_an_error():
    with pytest.raises(ConfigError, match=r"'nest_tiny' cannot be built: .* \(for images of 50 pixels\)"):
        from_timm("nest_tiny", size=50)


def test_names_and_files_that_are_wrong_are_errors(tmp_path):
    with pytest.raises(ConfigError, match="timm model 'resnet81' is unknown; did you mean resnet18"):
        from_timm("resnet81")
    torch.save({"conv1.weight": torch.ones(2)}, tmp_path / "w.pth")
    with pytest.raises(
        ConfigError, match=r"w.pth is of another network than this ResNet: 'conv1.weight' is \[2\], not"
    ):
        from_timm("resnet18", pretrained=tmp_path / "w.pth")
    with pytest.raises(
        ConfigError, match=r"w.pth holds 1 tensors but does not say of which network; .*--timm NAME --pre"
    ):
        from_file(tmp_path / "w.pth")
    about = Blueprint("conv_small", 32).as_dict()
    for wrong in ({"arch": 3}, {"size": "large"}, {"mean": [0.5]}, {"interpolation": "lanczos"}):
        save_file({"x": torch.ones(1)}, tmp_path / "w.safetensors", metadata=metadata(about | wrong))
        with pytest.raises(
            ConfigError, match=r"w.safetensors does not say how to build its network \(.+\); export it again"
        ):
            from_file(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "which network"),
        (["run", "--timm", "resnet18"], "which network"),
        (["none"], "none: no such run or file"),
        (["none", "--pretrained", "x"], "--pretrained goes with --timm"),
        (["--timm", "resnet18", "--which", "student"], "--which is for runs"),
        (["--timm", "resnet18", "--size", "0"], "--size must be at least 1"),
        ([__file__, "--which", "student"], "an exported file holds one network"),
        ([__file__], "test_backbones.py"),
    ],
)
def test_flags_that_do_not_go_together_are_errors(arguments, line):
    with pytest.raises(ConfigError, match=line):
        open_backbone(_given(*arguments))


def test_flags_choose_the_network(dino_run):
    assert open_backbone(_given(dino_run, "--which", "student")).name == "dino student, step 2"
    assert open_backbone(_given("--timm", "resnet18", "--seed", 3)).name == "timm resnet18, random, seed 3"


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
def test_timm_builds_the_same_network(blueprint, expected):
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
def test_what_timm_does_not_have_is_an_error(blueprint, what):
    with pytest.raises(ConfigError, match=f"{what} is no network of timm's; --format safetensors and onnx have it"):
        timm_arguments(blueprint)
