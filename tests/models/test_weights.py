"""Weights of timm, lightly and facebookresearch/dino are read under timm's names, whole or not at all."""

import argparse
import pickle

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import adapt_input_conv
from torch import nn

from fasttrain.cli import main
from fasttrain.errors import ConfigError
from fasttrain.models.architectures import create_backbone
from fasttrain.models.weights import load_weights, metadata, read_metadata, read_weights, save_tensors
from fasttrain.pretrained import from_run
from tests.small_runs import flags, train_few_steps


@pytest.fixture(scope="module")
def resnet():
    return timm.create_model("resnet18", num_classes=10).eval()


@pytest.fixture(scope="module")
def vit():
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, depth=2).eval()


def _vit(size=32, **options):
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=size, depth=2, **options).eval()


def _prefixed(network, prefix):
    return {prefix + name: tensor for name, tensor in network.state_dict().items()}


def _equal(network, other):
    ours, theirs = network.state_dict(), other.state_dict()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def _saved(content, path):
    torch.save(content, path)
    return path


def test_safetensors_and_torch_files_of_timm(resnet, tmp_path):
    save_file(resnet.state_dict(), tmp_path / "r.safetensors")
    for path in (
        tmp_path / "r.safetensors",
        _saved({"state_dict": resnet.state_dict(), "epoch": 3}, tmp_path / "r.pth"),
    ):
        network = timm.create_model("resnet18", num_classes=0)
        load_weights(network, read_weights(path), "it")  # the classifier is left behind
        assert torch.equal(network.layer4[1].conv2.weight, resnet.layer4[1].conv2.weight)
        assert torch.equal(network.bn1.running_var, resnet.bn1.running_var)


@pytest.mark.parametrize("key", ["teacher", "student"])
def test_dino_s_full_checkpoints(vit, tmp_path, key):
    """The teacher where there is one; the student is wrapped by DistributedDataParallel."""
    torch.manual_seed(1)
    other = _vit()
    head = {"head.mlp.0.weight": torch.randn(4, 192), "head.last_layer.weight_g": torch.ones(5, 1)}
    content = {
        "student": _prefixed(vit, "module.backbone.") | head,
        "epoch": 1,
        "args": argparse.Namespace(arch="vit_tiny", lr=5e-4, local_crops_scale=(0.05, 0.4)),
        "dino_loss": {"center": torch.ones(1, 5)},
    }
    if key == "teacher":
        content = {
            **content,
            "student": _prefixed(other, "module.backbone."),
            "teacher": _prefixed(vit, "backbone.") | head,
        }
    actual = _vit()
    load_weights(actual, read_weights(_saved(content, tmp_path / "checkpoint.pth")), "it")
    _equal(actual, vit)


def test_lightly_s_resnets_are_numbered(resnet, tmp_path):
    """nn.Sequential(*list(resnet.children())[:-1]) in a LightningModule, with a projection head next to it."""
    numbered = nn.Sequential(*list(resnet.children())[:-1])
    content = {"state_dict": _prefixed(numbered, "backbone.") | {"projection_head.layers.0.weight": torch.ones(2, 2)}}
    actual = timm.create_model("resnet18", num_classes=0)
    load_weights(actual, read_weights(_saved(content, tmp_path / "last.ckpt")), "it")
    _equal(actual, timm_without_head(resnet))


def timm_without_head(resnet):
    bare = timm.create_model("resnet18", num_classes=0)
    bare.load_state_dict({k: v for k, v in resnet.state_dict().items() if not k.startswith("fc.")})
    return bare


@pytest.mark.parametrize("prefix", ["backbone.vit.", "teacher_backbone.", "_orig_mod.backbone."])
def test_lightly_s_vits(vit, tmp_path, prefix):
    content = _prefixed(vit, prefix)
    if prefix == "backbone.vit.":
        content["backbone.mask_token"] = torch.zeros(1, 1, 192)
    if prefix.startswith("teacher"):
        content |= {f"student_backbone.{name}": tensor + 1 for name, tensor in vit.state_dict().items()}
    actual = _vit()
    load_weights(actual, read_weights(_saved(content, tmp_path / "last.ckpt")), "it")
    _equal(actual, vit)


def test_positions_are_interpolated_to_another_size(vit):
    larger = _vit(64)
    load_weights(larger, vit.state_dict(), "it")
    assert torch.equal(larger.blocks[1].mlp.fc1.weight, vit.blocks[1].mlp.fc1.weight)
    assert torch.equal(larger.pos_embed[:, 0], vit.pos_embed[:, 0])
    corner = larger.pos_embed[0, 1:].unflatten(0, (4, 4)).mean((0, 1))
    torch.testing.assert_close(corner, vit.pos_embed[0, 1:].mean(0), rtol=0, atol=1e-2)
    assert larger.pos_embed.shape == (1, 17, 192)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda s: s.pop("blocks.1.norm1.weight"), "it has no 'blocks.1.norm1.weight'"),
        (lambda s: s.update(extra=torch.ones(2)), "it has 'extra'"),
        (lambda s: s.update(cls_token=torch.ones(1, 1, 3)), r"'cls_token' is \[1, 1, 3\], not \[1, 1, 192\]"),
        (lambda s: s.update(pos_embed=torch.ones(1, 5, 3)), r"'pos_embed' is \[1, 5, 3\], not"),
    ],
)
def test_another_network_s_weights_change_nothing(vit, change, why):
    actual, state = _vit(), dict(vit.state_dict())
    before = {name: tensor.clone() for name, tensor in actual.state_dict().items()}
    change(state)
    with pytest.raises(ConfigError, match=f"FILE.*{why}"):
        load_weights(actual, state, "FILE")
    assert all(torch.equal(tensor, before[name]) for name, tensor in actual.state_dict().items())


def test_old_files_without_batch_counts_are_read():
    network = create_backbone("conv_small")
    state = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    load_weights(create_backbone("conv_small"), state, "it")


@pytest.mark.parametrize("kind", ["timm", "dino"])
def test_a_run_starts_from_an_export(dino_run, images, tmp_path, kind):
    """With a learning rate of 0 the backbones stay what the file holds, whatever the seed would have made."""
    file = tmp_path / {"timm": "vit.safetensors", "dino": "vit.pth"}[kind]
    assert main(["export", str(dino_run), "--format", kind, "--output", str(file)]) == 0
    vit = ("--arch", "vit_tiny", "--local_crops_number", 0, "--lr", 0, "--min_lr", 0, "--seed", 5)
    run = train_few_steps(images, tmp_path / "run", *vit, "--init_from", file, method="dino")
    for which in ("teacher", "student"):
        _equal(from_run(run, which).network, from_run(dino_run).network)


def test_resumed_run_does_not_read_its_first_weights(images, dino_run, tmp_path, capsys):
    file, output = tmp_path / "vit.safetensors", tmp_path / "run"
    assert main(["export", str(dino_run), "--format", "timm", "--output", str(file)]) == 0
    vit = ("--arch", "vit_tiny", "--local_crops_number", 0, "--init_from", file)
    train_few_steps(images, output, *vit, method="dino")
    assert "in the layout of timm" in capsys.readouterr().out
    file.unlink()
    train_few_steps(images, output, *vit, "--limit_steps", 3, method="dino")
    assert "resumed after step 2" in capsys.readouterr().out


def test_eval_reports_weights_of_another_project(images, resnet, tmp_path, capsys):
    path = _saved({"state_dict": _prefixed(resnet, "module.encoder_q.")}, tmp_path / "moco.pth")
    command = ["eval", "--timm", "resnet18", "--pretrained", str(path), "--data_path", str(images), "--size", "32"]
    assert main([*command, "--metrics", "knn", "--knn_k", "1", "--cache", "none", "--num_workers", "1"]) == 0
    err = capsys.readouterr().err
    assert "MoCo" in err
    assert "dropped fc (2)" in err


def test_tensors_with_several_names_are_stored(tmp_path):
    layer = nn.Linear(2, 2)
    shared = nn.ModuleDict({"a": layer, "b": layer})
    save_tensors(shared, tmp_path / "s.safetensors", {})
    other = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    load_weights(other, read_weights(tmp_path / "s.safetensors"), "it")
    _equal(other, shared)


def test_a_run_does_not_start_from_another_network(images, dino_run, tmp_path, capsys):
    file = tmp_path / "vit.safetensors"
    assert main(["export", str(dino_run), "--format", "timm", "--output", str(file)]) == 0
    capsys.readouterr()
    for path, line in ((file, "another network than ConvSmall"), (tmp_path / "no.pth", "no such file")):
        command = flags(images, tmp_path / "run", "--init_from", path)
        assert main(["train", *command]) == 2
        err = capsys.readouterr().err
        assert line in err
        assert err.count("\n") == 1


class _Touches:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_is_refused(tmp_path):
    path = _saved({"teacher": _Touches(tmp_path / "marker")}, tmp_path / "c.pth")
    with pytest.raises(ConfigError, match=r"c.pth: holds more than tensors \(.*open\) and is not loaded") as error:
        read_weights(path)
    assert "weights_only" not in str(error.value)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("content", [b"not a pickle", b"\x80\x02cbuiltins\ngetattr\n.", b"\x80\x04\x95"])
def test_foreign_bytes_are_refused_without_torchs_advice(content, tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"x.pth: ") as error:
        read_weights(path)
    assert "weights_only" not in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["half.pth", "half.safetensors"])
def test_half_a_file_is_an_error(resnet, tmp_path, name):
    path = tmp_path / name
    if path.suffix == ".pth":
        torch.save(resnet.state_dict(), path)
    else:
        save_file(resnet.state_dict(), path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ConfigError, match=rf"{name}: is damaged \(.+\)"):
        read_weights(path)


def test_nothing_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"is a folder without model.safetensors"):
        read_weights(tmp_path)
    with pytest.raises(ConfigError, match=r"none.pth: no such file"):
        read_weights(tmp_path / "none.pth")
    with pytest.raises(ConfigError, match="holds no weights"):
        read_weights(_saved({"epoch": 1}, tmp_path / "empty.pth"))
    with pytest.raises(ConfigError, match="holds no weights"):
        read_weights(_saved([torch.ones(1)], tmp_path / "list.pth"))


def test_metadata_is_read_back(tmp_path):
    about = {"arch": "resnet18", "mean": [0.1, 0.2]}
    save_file({"x": torch.ones(1)}, tmp_path / "a.safetensors", metadata=metadata(about))
    save_file({"x": torch.ones(1)}, tmp_path / "b.safetensors")
    assert read_metadata(tmp_path / "a.safetensors") == about
    assert read_metadata(tmp_path / "b.safetensors") is None
    assert read_metadata(tmp_path / "c.pth") is None


def test_first_convolution_is_adapted_as_timm_does():
    weights = timm.create_model("resnet18", num_classes=0).state_dict()
    network = timm.create_model("resnet18", num_classes=0, in_chans=13)
    load_weights(network, weights, "file")
    assert torch.equal(network.conv1.weight, adapt_input_conv(13, weights["conv1.weight"]))


@pytest.mark.parametrize("content", [b"a text", pickle.dumps({"a": 1}), b""])
def test_file_without_tensors_is_one_clear_line(tmp_path, content):
    """The line ended with empty brackets, or named a number that torch had looked up."""
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(ConfigError, match="x.pth: is (no file of tensors, or )?(is )?(damaged|empty)") as error:
        read_weights(tmp_path / "x.pth")
    assert "()" not in str(error.value)
    assert "(no " not in str(error.value)
