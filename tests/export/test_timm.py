"""timm and fasttrain build the network from an exported file."""

import pytest
import timm
import torch
from safetensors import safe_open

from fasttrain.cli import main
from fasttrain.errors import ConfigError
from fasttrain.export.check import check_same, random_images
from fasttrain.export.write import write_export
from fasttrain.pretrained import Blueprint, from_file, from_run, from_timm


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_timm_gives_the_same_features_of_a_run(dino_run, tmp_path, capsys, which):
    file = tmp_path / "vit.safetensors"
    assert main(["export", str(dino_run), "--which", which, "--format", "timm", "--output", str(file)]) == 0
    line = "timm.create_model('vit_tiny_patch16_224', checkpoint_path='vit.safetensors', num_classes=0, img_size=32"
    assert line in capsys.readouterr().out
    loaded = timm.create_model("vit_tiny_patch16_224", checkpoint_path=str(file), num_classes=0, img_size=32).eval()
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), from_run(dino_run, which).network(images), rtol=0, atol=1e-5)


_STOCK = ["test_resnet", "test_convnext", "test_maxvit"]  # timm 1.0.28 does not have the last one


@pytest.mark.parametrize("name", [name for name in _STOCK if timm.is_model(name)])
def test_timm_export_of_a_stock_network_is_unchanged(tmp_path, name):
    file, expected = tmp_path / "n.safetensors", from_timm(name, seed=3)
    write_export(expected, file, "timm")
    read = from_file(file)
    assert read.blueprint == expected.blueprint
    loaded = timm.create_model(name, checkpoint_path=str(file), num_classes=0).state_dict()
    for state in (loaded, read.network.state_dict()):
        assert state.keys() == expected.network.state_dict().keys()
        assert all(torch.equal(tensor, state[key]) for key, tensor in expected.network.state_dict().items())


def test_own_network_is_written_as_safetensors_only(simclr_run, tmp_path):
    file, expected = tmp_path / "own.safetensors", from_run(simclr_run)
    with pytest.raises(ConfigError, match="--format: .*conv_small"):
        write_export(expected, file, "timm")
    assert list(tmp_path.iterdir()) == []
    write_export(expected, file, "safetensors")
    read = from_file(file)
    assert read.blueprint == expected.blueprint
    images = random_images(expected.blueprint, 2)
    assert torch.equal(read.network(images), expected.network(images))
    with safe_open(file, "pt") as content:
        assert content.metadata()["format"] == "pt"  # transformers needs it


def test_check_same_refuses_other_features():
    backbone, other = from_timm("resnet18", size=32), from_timm("resnet18", size=32, seed=1).network
    assert check_same(backbone, backbone.network, "it") == 0
    narrow = Blueprint("conv_small", 32).build().eval()
    for reader, problem in (
        (other, r"differ by \d\.\de"),
        (lambda images: other(images) * torch.nan, "differ by nan"),
        (narrow, r"\[1, 512\], got \[1, 128\]"),
    ):
        with pytest.raises(ConfigError, match=f"--format: it .*{problem}"):
            check_same(backbone, reader, "it")
