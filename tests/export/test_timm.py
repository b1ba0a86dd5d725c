"""timm builds our network from our file, and so do we."""

import pytest
import timm
import torch
from safetensors import safe_open

from fasttrain.cli import main
from fasttrain.errors import ConfigError
from fasttrain.export.check import check_same, random_images
from fasttrain.pretrained import Blueprint, from_file, from_run, from_timm


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_timm_gives_the_same_features_of_a_run_s_vit(dino_run, tmp_path, capsys, which):
    file = tmp_path / "vit.safetensors"
    assert main(["export", str(dino_run), "--which", which, "--format", "timm", "--output", str(file)]) == 0
    line = "timm.create_model('vit_tiny_patch16_224', checkpoint_path='vit.safetensors', num_classes=0, img_size=32"
    assert line in capsys.readouterr().out
    loaded = timm.create_model("vit_tiny_patch16_224", checkpoint_path=str(file), num_classes=0, img_size=32).eval()
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), from_run(dino_run, which).network(images), rtol=0, atol=1e-5)


_STOCK = ["test_resnet", "test_convnext", "test_maxvit"]  # the last is not in timm 1.0.28 yet


@pytest.mark.parametrize("name", [name for name in _STOCK if timm.is_model(name)])
def test_stock_networks_come_through_unchanged(tmp_path, name):
    file = tmp_path / "n.safetensors"
    assert main(["export", "--timm", name, "--seed", "3", "--format", "timm", "--output", str(file)]) == 0
    wanted = from_timm(name, seed=3)
    found = from_file(file)
    assert found.blueprint == wanted.blueprint
    loaded = timm.create_model(name, checkpoint_path=str(file), num_classes=0).state_dict()
    for state in (loaded, found.network.state_dict()):
        assert state.keys() == wanted.network.state_dict().keys()
        assert all(torch.equal(tensor, state[key]) for key, tensor in wanted.network.state_dict().items())


def test_ours_is_refused_for_timm_and_written_for_ourselves(simclr_run, tmp_path, capsys):
    file = tmp_path / "own.safetensors"
    assert main(["export", str(simclr_run), "--format", "timm", "--output", str(file)]) == 2
    line = "fasttrain: conv_small is no network of timm's; --format safetensors and onnx have it\n"
    assert capsys.readouterr().err == line
    assert list(tmp_path.iterdir()) == []
    assert main(["export", str(simclr_run), "--format", "safetensors", "--output", str(file)]) == 0
    found, wanted = from_file(file), from_run(simclr_run)
    assert found.blueprint == wanted.blueprint
    images = random_images(wanted.blueprint, 2)
    assert torch.equal(found.network(images), wanted.network(images))
    with safe_open(file, "pt") as content:
        assert content.metadata()["format"] == "pt"  # transformers asks for it


def test_what_is_read_back_must_be_the_same():
    backbone, other = from_timm("resnet18", size=32), from_timm("resnet18", size=32, seed=1)
    assert check_same(backbone, backbone.network, "it") == 0
    with pytest.raises(ConfigError, match=r"it gives other features, \d\.\de[+-]\d\d apart; choose another --format"):
        check_same(backbone, other.network, "it")
    with pytest.raises(ConfigError, match="it gives other features, nan apart"):
        check_same(backbone, lambda images: other.network(images) * torch.nan, "it")
    with pytest.raises(ConfigError, match=r"it gives features \[1, 128\], not \[1, 512\]"):
        check_same(backbone, Blueprint("conv_small", 32).build().eval(), "it")
